"""`make chaos`: a real server under load, its parts killed one after another. No stream may fail or differ by a token
from a quiet run. Prints a table, and one line of JSON; exits with 1 where a stream failed or differed.

    python -m tests.chaos [--streams 64] [--tokens 256] [--faults replica,replica,drain,gateway] [--ingress direct]

The pause of a stream is its longest gap about a fault. Of that, the replay is what its new replica needed, by its own
clock, to compute the tokens since the last snapshot again; the rest is noticing, sending, and the way to the client.
"""

import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import grpc
import typer
from rich.console import Console
from rich.table import Table

from protos.fathom.v1 import inference_pb2 as pb
from serving import client
from serving.config import ServeConfig

MODEL = "gla"
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]  # of each stream, as if from many machines
WINDOW_S = 10.0  # after a fault, in which a pause counts as its own


@dataclass
class Stream:
    """One request: what it said, and when."""

    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""
    usage: pb.Usage = field(default_factory=pb.Usage)  # of its last request to a replica

    def pause(self, since: float) -> float:
        """The longest gap, in seconds, that a fault at `since` may have caused."""
        gaps = pairwise(self.times)
        return max((b - a for a, b in gaps if b >= since and a <= since + WINDOW_S), default=0.0)

    def replay(self, since: float) -> float:
        """Seconds until its replica had computed again what a fault at `since` had lost: 0 where it lost nothing."""
        began = self.times[-1] - self.usage.decode_s if self.times else since
        return self.usage.queue_s + self.usage.prefill_s if began > since else 0.0


class Load:
    """Streams that run at a time, each in a thread of its own, as a user's program would."""

    def __init__(self, target: str, streams: int, tokens: int):
        self._target = target
        self._tokens = tokens
        self.streams = [Stream() for _ in range(streams)]
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(streams)]

    def start(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def progress(self) -> float:
        """Share of all tokens that have come."""
        return sum(len(s.ids) for s in self.streams) / (len(self.streams) * self._tokens)

    def finish(self) -> list[Stream]:
        for thread in self._threads:
            thread.join()
        return self.streams

    def _run(self, index: int) -> None:
        stream = self.streams[index]
        sampling = pb.SamplingParams(
            max_tokens=self._tokens, temperature=0.8 if index % 2 else 0.0, seed=index, ignore_eos=True
        )
        request = pb.GenerateRequest(
            model=MODEL, text=f"def function_{index}(", sampling=sampling, timeout_s=300
        )
        try:
            with grpc.insecure_channel(self._target, OWN_CONNECTION) as channel:
                for message in client.generate(channel, request):
                    stream.ids += message.token_ids
                    stream.times.append(time.monotonic())
                    stream.usage = message.usage
        except grpc.RpcError as error:
            told = isinstance(error, grpc.Call)
            stream.error = f"{error.code()}: {error.details()}" if told else str(error)


def processes(part: str) -> list[int]:
    """Ids of this server's processes of a deployment: only those that this process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and part in (entry / "cmdline").read_text() and _ours(int(entry.name)):
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return sorted(found)


def _ours(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        stat = Path(f"/proc/{pid}/stat").read_text()
        pid = int(stat.rpartition(")")[2].split()[1])
    return False


def replicas_ready(target: str) -> int:
    """As every gateway knows of: each connection may meet another."""
    found = []
    for _ in range(8):
        with grpc.insecure_channel(target, OWN_CONNECTION) as channel:
            found.append(sum(model.replicas for model in client.models(channel)))
    return min(found)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("the server has not become whole again in time")
        time.sleep(0.1)


def kill(part: str) -> float:
    """Returns when."""
    victim = processes(part)[0]
    now = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    return now


def drain(config: ServeConfig, round_: int) -> float:
    """An upgrade: every replica is replaced, the new one first. Returns when it was asked for."""
    from ray import serve as ray_serve

    from serving.cluster import app

    spec = config.models[0].model_copy(update={"max_waiting": 2000 + round_})
    now = time.monotonic()
    ray_serve.run(app.model(spec.model_dump()), name=f"fathom-{MODEL}", route_prefix=None)
    return now


def main(
    streams: Annotated[int, typer.Option(min=1)] = 64,
    tokens: Annotated[int, typer.Option(min=8)] = 256,
    faults: Annotated[str, typer.Option(help="replica, drain, gateway")] = "replica,replica,drain,gateway",
    grpc_port: int = 9310,
    http_port: int = 8310,
    threads: int = 1,
    ingress: str = "direct",
) -> None:
    from serving.cluster.local import running

    target = f"localhost:{grpc_port}"
    config = ServeConfig.parse(
        {
            "models": [
                {"path": f"zoo/{MODEL}", "replicas": 2, "slots": streams, "threads": threads, "cpus": 0.1}
            ],
            "gateway": {"replicas": 2, "cpus": 0.1, "state_store": "memory://chaos"},
            "grpc_port": grpc_port,
            "http_port": http_port,
            "ingress": ingress,
        },
        "chaos",
    )
    rows = []
    with running(config):
        quiet = Load(target, streams, tokens).start().finish()
        calm = [max((b - a for a, b in pairwise(s.times)), default=0.0) for s in quiet]
        rows.append(_row("none", quiet, quiet, calm, [0.0] * len(calm)))
        for round_, fault in enumerate(faults.split(",")):
            wait_for(lambda: replicas_ready(target) == 2, 180)
            load = Load(target, streams, tokens).start()
            wait_for(lambda load=load: load.progress() > 0.2, 120)  # type: ignore[misc]
            if fault == "drain":
                since = drain(config, round_)
            else:
                since = kill(
                    "ServeReplica:fathom:gateway"
                    if fault == "gateway"
                    else f"ServeReplica:fathom-{MODEL}:engine"
                )
            ended = load.finish()
            pauses = [s.pause(since) for s in ended]
            replays = [0.0 if fault == "drain" else s.replay(since) for s in ended]
            rows.append(_row(fault, quiet, ended, pauses, replays))
    _print(rows)
    if any(row["failed"] or row["different"] for row in rows):
        raise typer.Exit(1)


def _row(
    fault: str, quiet: list[Stream], ended: list[Stream], pauses: list[float], replays: list[float]
) -> dict[str, object]:
    errors = sorted({s.error for s in ended if s.error})
    rests = [max(0.0, pause - replay) for pause, replay in zip(pauses, replays, strict=True)]
    for error in errors:
        typer.echo(f"{fault}: {error}", err=True)
    return {
        "fault": fault,
        "streams": len(ended),
        "failed": sum(bool(s.error) for s in ended),
        "different": sum(not s.error and s.ids != q.ids for s, q in zip(ended, quiet, strict=True)),
        "gap_ms_p50": round(1000 * statistics.median(pauses)),
        "gap_ms_max": round(1000 * max(pauses)),
        "replayed": sum(r > 0 for r in replays),
        "replay_ms_max": round(1000 * max(replays)),
        "rest_ms_p50": round(1000 * statistics.median(rests)),
        "rest_ms_max": round(1000 * max(rests)),
    }


def _print(rows: list[dict[str, object]]) -> None:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=110).print(table)
    print(json.dumps({"chaos": rows}))


if __name__ == "__main__":
    typer.run(main)
