"""The command line of the fake server."""

import asyncio
import json
import signal
from typing import Annotated

import typer

from loadtest.fake import Behaviour, serve
from loadtest.loop import run_quick


def main(
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 50051,
    host: str = "127.0.0.1",
    ttft_ms: Annotated[float, typer.Option(min=0, help="from a request to its first token")] = 50.0,
    itl_ms: Annotated[float, typer.Option(min=0, help="from each token to the next")] = 5.0,
    tokens_per_message: Annotated[int, typer.Option(min=1)] = 1,
    slots: Annotated[int, typer.Option(min=0, help="requests served at a time; 0 for any number")] = 0,
    queue: Annotated[
        int, typer.Option(min=0, help="requests that may wait for a slot; 0 for any number")
    ] = 0,
    fail_every: Annotated[int, typer.Option(min=0, help="every so many requests fail; 0 for none")] = 0,
    fail_status: Annotated[str, typer.Option(help="the gRPC status that they fail with")] = "INTERNAL",
    model: str = "fake",
    max_tokens: Annotated[int, typer.Option(min=1, help="longest sequence")] = 1 << 20,
) -> None:
    """A server without a model, whose delays are known: fathom.v1, Open Inference Protocol and OpenAI's HTTP
    on one port. Prints its address at the start, and how well it kept its delays at the end, as JSON."""
    behaviour = Behaviour(
        ttft_ms / 1e3,
        itl_ms / 1e3,
        tokens_per_message,
        slots,
        queue,
        fail_every,
        fail_status,
        model,
        max_tokens,
    )

    async def forever() -> None:
        try:
            fake, server = await serve(behaviour, host, port)
        except OSError as error:
            raise SystemExit(f"Error: --port {port}: {error.strerror}") from None
        print(json.dumps({"listening": f"{host}:{server.sockets[0].getsockname()[1]}"}), flush=True)
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await stop.wait()
        print(json.dumps(fake.report()), flush=True)

    run_quick(forever())


if __name__ == "__main__":
    typer.run(main)
