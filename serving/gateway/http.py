"""The HTTP door: OpenAI's protocol, the page, metrics and liveness."""

import logging

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.config import GatewaySpec
from serving.errors import RequestError
from serving.gateway import pages
from serving.gateway.fleet import Fleet
from serving.gateway.keys import credential_of
from serving.gateway.metrics import GatewayMetrics
from serving.gateway.openai import OpenAi
from serving.gateway.requests import Requests
from serving.gateway.stats import read
from serving.gateway.web import HttpError, answer, refusal

log = logging.getLogger("fathom.gateway")


def make_app(requests: Requests, fleet: Fleet, spec: GatewaySpec, metrics: GatewayMetrics) -> FastAPI:
    """An ASGI application."""
    app = FastAPI(title="Fathom", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> Response:
        ready = all(fleet.replicas(name) for name in fleet.models)
        return Response(
            "ok\n" if ready else "loading\n", status_code=200 if ready else 503, media_type="text/plain"
        )

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(await metrics.scrape(fleet), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/fathom/stats")
    async def stats(request: Request) -> Response:
        caller = requests.keys.authenticate(credential_of(request.headers))
        told = read((await metrics.scrape(fleet)).decode(), [m for m in fleet.models if fleet.replicas(m)])
        told.models = {name: model for name, model in told.models.items() if caller.may_use(name)}
        return answer(told.to_json())

    app.router.routes.extend([*OpenAi(requests, fleet, spec, metrics).routes, *pages.routes()])

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        """No such path, or not with this method."""
        what = {404: "no such path", 405: "not with this method"}.get(error.status_code, str(error.detail))
        message = f"{request.method} {request.url.path}: {what}"
        return refusal(HttpError(error.status_code, "not_found", message), error.headers)

    @app.exception_handler(RequestError)
    async def unanswered(request: Request, error: RequestError) -> Response:
        return refusal(error)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return refusal(error)

    return app
