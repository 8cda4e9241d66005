"""The option that every command of a client has."""

import os
from typing import Annotated

import typer


def _default_target() -> str:
    return f"localhost:{os.environ.get('FATHOM_GRPC_PORT', '9000')}"


Target = Annotated[
    str,
    typer.Option(
        envvar="FATHOM_TARGET", help="host:port of the gRPC service", default_factory=_default_target
    ),
]
