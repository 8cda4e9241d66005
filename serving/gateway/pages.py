"""The page at `/`: a few files that travel with the package and load nothing from elsewhere."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def routes() -> list[Route]:
    """One for each file; the page itself is `/`."""
    found = (file for file in files("serving.gateway").joinpath("page").iterdir() if file.is_file())
    return [_route(file.name, file.read_bytes()) for file in found]


def _route(name: str, content: bytes) -> Route:
    kind = KINDS["." + name.rpartition(".")[2]]

    async def page(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return Route("/" if name == "index.html" else f"/{name}", page)
