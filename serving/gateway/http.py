"""The HTTP door: metrics and liveness."""

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serving.gateway.fleet import Fleet
from serving.gateway.metrics import GatewayMetrics


def make_app(fleet: Fleet, metrics: GatewayMetrics) -> FastAPI:
    app = FastAPI(title="Fathom", docs_url=None, redoc_url=None)

    @app.get("/healthz")
    async def healthz() -> Response:
        ready = all(fleet.replicas(name) for name in fleet.models)
        return Response(
            "ok\n" if ready else "loading\n", status_code=200 if ready else 503, media_type="text/plain"
        )

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(await metrics.scrape(fleet), media_type=CONTENT_TYPE_LATEST)

    return app
