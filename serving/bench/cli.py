"""The command ``fathom bench``."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help=__doc__)

Model = Annotated[str, typer.Option(help="checkpoint folder, zoo/NAME or Hub id")]
Dtype = Annotated[str, typer.Option()]
Threads = Annotated[int | None, typer.Option(help="processor threads; all where not given")]
ProcessorTime = Annotated[bool, typer.Option(help="of one thread, for a machine that is busy")]


@app.command()
def decode(
    model: Model = "zoo/gla",
    batch: Annotated[list[int], typer.Option(help="may be given again")] = [1, 8, 32, 128],  # noqa: B006
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Tokens/s by batch, and the share of what reading the weights once a step allows."""
    from serving.bench import decode as bench

    bench.run(model, batch, dtype, threads)


@app.command()
def long(
    model: Annotated[
        list[str], typer.Option(help="may be given again; ops: a small random one for each op")
    ] = ["zoo/gla"],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=3000)] = 100_000,
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Latency and memory at token 1,000 and at token 100,000."""
    from serving.bench import long as bench

    bench.run(model, tokens, dtype, threads)


@app.command()
def peers(
    batch: Annotated[list[int], typer.Option(help="may be given again")] = [1, 8, 32],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=4, help="of each sequence")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Threads = None,
    processor_time: ProcessorTime = False,
) -> None:
    """Against transformers' generate, on a checkpoint of Mamba-130M's shape with random weights."""
    from serving.bench import peers as bench

    bench.run(batch, tokens, rounds, threads, processor_time=processor_time)


@app.command()
def snapshots(
    model: Model = "zoo/gla",
    batch: Annotated[int, typer.Option(min=1)] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="of each sequence")] = 512,
    every: Annotated[
        int | None, typer.Option(min=1, help="tokens between two snapshots; as served by default")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Threads = None,
    processor_time: ProcessorTime = False,
) -> None:
    """What the snapshots cost from which a stream goes on after the loss of its replica."""
    from serving.bench import snapshots as bench

    bench.run(model, batch, tokens, every, rounds, threads, processor_time=processor_time)


@app.command()
def quality(
    model: Model = "zoo/looped-gla",
    depth: Annotated[list[str], typer.Option(help="policies; may be given again")] = ["full"],  # noqa: B006
    size: Annotated[int, typer.Option("--bytes", min=100, help="of each held-out file")] = 8000,
    threads: Threads = None,
) -> None:
    """Held-out bits per byte against depth, on the corpus of the zoo."""
    from serving.bench import quality as bench

    bench.run(model, depth, size, threads)


@app.command()
def gateway(
    model: Model = "zoo/gla",
    requests: Annotated[int, typer.Option(min=1)] = 200,
    streams: Annotated[int, typer.Option(min=1)] = 64,
    tokens: Annotated[int, typer.Option(min=1)] = 512,
    ingress: Annotated[str, typer.Option(help="direct, proxy or haproxy")] = "direct",
    grpc_port: Annotated[int, typer.Option()] = 9100,
    http_port: Annotated[int, typer.Option()] = 8100,
) -> None:
    """The same load in-process and through gRPC."""
    from serving.bench import gateway as bench

    bench.run(model, requests, streams, tokens, ingress, grpc_port, http_port)


@app.command()
def depth(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="may be given again; random: a larger one whose depths are replayed. All by default"
        ),
    ] = None,
    sequences: Annotated[list[int], typer.Option(help="may be given again")] = [8, 32, 128],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1, help="of each sequence at most")] = 96,
    dtype: Dtype = "auto",
    threads: Threads = None,
    batch_invariant: Annotated[bool, typer.Option(help="as served by default")] = True,
    processor_time: ProcessorTime = False,
) -> None:
    """Early exits in lock-step batches and continuously, against the full depth and the ideal."""
    from serving.bench import depth as bench

    bench.run(
        model or [],
        sequences,
        tokens,
        dtype,
        threads,
        batch_invariant=batch_invariant,
        processor_time=processor_time,
    )
