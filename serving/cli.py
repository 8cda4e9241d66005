"""The command ``fathom``."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from serving.bench.cli import app as bench
from serving.errors import RequestError, ServeConfigError
from serving.sessions.cli import app as sessions
from serving.target import Target

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(bench, name="bench")
app.add_typer(sessions, name="sessions")


@app.command()
def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="checkpoint folders, zoo/NAME or Hub ids")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file that says what to serve")] = None,
    grpc_port: Annotated[int | None, typer.Option(envvar="FATHOM_GRPC_PORT")] = None,
    http_port: Annotated[int | None, typer.Option(envvar="FATHOM_HTTP_PORT")] = None,
    ingress: Annotated[str | None, typer.Option(help="direct, proxy or haproxy")] = None,
) -> None:
    """Serve models until interrupted."""
    from serving.cluster import local
    from serving.config import ServeConfig, validated

    file = ServeConfig.read(config) if config is not None else ServeConfig.parse({}, "options")
    changes: dict[str, Any] = {"grpc_port": grpc_port, "http_port": http_port, "ingress": ingress}
    if models:
        changes["models"] = models
    given = {key: value for key, value in changes.items() if value is not None}
    local.serve(validated(ServeConfig, {**file.model_dump(), **given}, "options"))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads it from standard input")],
    target: Target,
    model: Annotated[str, typer.Option(help="which one; may be left out where only one is served")] = "",
    max_tokens: Annotated[int, typer.Option(help="tokens to generate at most")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token always")] = 0.7,
    top_k: Annotated[int, typer.Option(help="sample from so many likeliest tokens; 0: all")] = 0,
    top_p: Annotated[
        float, typer.Option(help="sample from the likeliest tokens of so much probability")
    ] = 0.95,
    seed: Annotated[int | None, typer.Option(help="the same seed gives the same text")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="end before this string; may be given again")] = None,
    timeout: Annotated[float | None, typer.Option(help="seconds")] = None,
    depth: Annotated[
        str | None, typer.Option(help="full, fixed(2), gate(0.8), confidence(entropy, 0.5), ...")
    ] = None,
    show_depth: Annotated[bool, typer.Option(help="colour each token by its depth")] = False,
    session: Annotated[str, typer.Option(help="continue this session (see fathom sessions)")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="print each message as a JSON object on a line")
    ] = False,
) -> None:
    """Continue a prompt; the text streams."""
    from protos.fathom.v1 import inference_pb2 as pb
    from serving import client
    from serving.engine.depth import DepthPolicy

    text = typer.get_text_stream("stdin").read() if prompt == "-" else prompt
    sampling = pb.SamplingParams(
        max_tokens=_natural("--max-tokens", max_tokens), temperature=temperature, top_p=top_p
    )
    sampling.top_k = _natural("--top-k", top_k)
    sampling.stop.extend(stop or [])
    if seed is not None:
        sampling.seed = _natural("--seed", seed)
    request = pb.GenerateRequest(
        model=model, text=text, sampling=sampling, timeout_s=timeout, session_id=session
    )
    policy = DepthPolicy() if depth is None else DepthPolicy.parse(depth)
    if depth is not None:
        request.depth.CopyFrom(client.policy(policy))
    with client.connected(target) as channel:
        # Of a chain the depth is its own number of layers.
        deepest = len(policy.layers) or (client.deepest(channel, model) if show_depth else 1)
        for number, message in enumerate(client.generate(channel, request)):
            if as_json:
                typer.echo(json.dumps(client.as_dict(message), ensure_ascii=False))
                continue
            if number == 0:
                typer.secho(text, nl=False, dim=True)
            if show_depth:
                client.coloured(message, deepest)
            else:
                typer.echo(message.text, nl=False)
        if not as_json:
            typer.echo()


@app.command()
def models(target: Target, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List what a server serves."""
    from rich.console import Console
    from rich.table import Table

    from serving import client

    with client.connected(target) as channel:
        served = client.models(channel)
    if as_json:
        typer.echo(json.dumps([client.as_dict(model) for model in served]))
        return
    table = Table("name", "family", "parameters", "dtype", "state", "slots", "replicas", "depth")
    for m in served:
        state = f"{m.state_bytes_per_sequence / 1e3:,.0f} kB"
        table.add_row(
            m.name,
            m.family,
            f"{m.parameters:,}",
            m.dtype,
            state,
            str(m.slots),
            str(m.replicas),
            str(m.max_depth),
        )
    Console().print(table)


@app.command()
def top(
    target: Annotated[
        str,
        typer.Option(
            envvar="FATHOM_HTTP_TARGET",
            help="host:port of the HTTP service",
            default_factory=lambda: f"localhost:{os.environ.get('FATHOM_HTTP_PORT', '8000')}",
        ),
    ],
    interval: Annotated[float, typer.Option(help="seconds between two looks")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="print one frame and end")] = False,
) -> None:
    """Show what a server does: slots, throughput, latency and depths, by model and replica."""
    from serving.top import scraper, show

    show(scraper(target), interval, once)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="folder, zoo/NAME or Hub id")],
    memory: Annotated[str | None, typer.Option(help="for all states together, as in 500MB or 16GiB")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Say what a checkpoint is, what serving it takes, and what is wrong with it."""
    from models.inspection import inspect as look
    from serving.inspection import as_table, bytes_of

    report = look(checkpoint, None if memory is None else bytes_of("--memory", memory))
    typer.echo(json.dumps(asdict(report))) if as_json else as_table(report)
    if not report.usable:
        raise typer.Exit(1)


@app.command()
def keygen(
    name: Annotated[str, typer.Argument(help="of whoever will use the key")],
) -> None:
    """Make an API key: the key goes to its user, the entry into the keys file."""
    from serving.gateway.keys import digest, new_secret

    secret = new_secret()
    typer.echo(f"key: {secret}", err=True)
    typer.echo(f"- name: {name}\n  sha256: '{digest(secret)}'")


@app.command()
def convert(
    checkpoint: Annotated[str, typer.Argument(help="plain: folder, zoo/NAME or Hub id")],
    target: Annotated[Path, typer.Argument(help="folder to write the recursive checkpoint to")],
    sharing: Annotated[
        str, typer.Option(help="cycle, sequence, middle_cycle or middle_sequence")
    ] = "middle_cycle",
    recursions: Annotated[int, typer.Option(help="passes through the shared layers")] = 2,
    start: Annotated[str, typer.Option(help="of the shared layers: stepwise, average or lower")] = "stepwise",
    rank: Annotated[int, typer.Option(help="of the update at each depth; 0: none")] = 0,
    alpha: Annotated[float | None, typer.Option(help="of the updates; by default their rank")] = None,
    skipped: Annotated[str, typer.Option(help="absent, propagate or last_exited")] = "absent",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Turn a plain checkpoint into a recursive one, and say how far its logits are from the original's."""
    from models.convert import Recursion
    from models.convert import convert as into
    from models.load import DTYPES

    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype = {dtype}: must be one of {', '.join(DTYPES)}")
    how = Recursion.parse(sharing, recursions, start, rank, alpha, skipped)
    found = into(checkpoint, target, how, DTYPES[dtype])
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    typer.echo(f"{target}: on {found.tokens} tokens, against {checkpoint}:")
    typer.echo(f"  largest difference of two logits {found.largest:.4g}")
    typer.echo(f"  divergence {found.divergence:.4g} nats a token")
    typer.echo(f"  the same likeliest token {found.agreement:.1%}")


def _natural(flag: str, value: int) -> int:
    if value < 0:
        raise typer.BadParameter(f"{flag} = {value}: must be 0 or more")
    return value


def main() -> None:
    """The entry point. What a person can mend is said in one line, without a traceback."""
    try:
        app()
    except (RequestError, ServeConfigError) as error:
        raise SystemExit(f"fathom: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        # By name, so that no command imports torch or grpc only to be ready for their errors.
        if type(error).__module__ in ("models.errors", "serving.client"):
            raise SystemExit(f"fathom: {error}") from None
        raise


if __name__ == "__main__":
    main()
