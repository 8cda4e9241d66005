"""`make soak`: an hour of mixed load on one server; its memory has to stay flat. Prints twenty lines, and one
of JSON; exits with 1 where memory grew by more than 2 % after the first quarter, or a request failed that should not
have.

    python -m tests.soak [--minutes 60] [--users 24]
"""

import json
import random
import threading
import time
from pathlib import Path
from typing import Annotated

import grpc
import typer

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc, sessions_pb2, sessions_pb2_grpc
from serving import client
from serving.config import ServeConfig
from tests.chaos import MODEL, processes

BOUND = 1.02
PARTS = {"engine": f"ServeReplica:fathom-{MODEL}:engine", "gateway": "ServeReplica:fathom:gateway"}


class Users:
    """Threads that ask, cancel, score, converse and send nonsense until they are told to stop."""

    def __init__(self, target: str, count: int):
        self.ended = 0
        self.failures: list[str] = []
        self._target = target
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        kinds = (self._generate, self._generate, self._cancel, self._score, self._converse, self._nonsense)
        with grpc.insecure_channel(self._target) as channel:
            while not self._stop.is_set():
                try:
                    rng.choice(kinds)(channel, rng)
                    self.ended += 1
                except grpc.RpcError as error:
                    self.failures.append(str(error.code()))

    def _request(self, rng: random.Random, tokens: int) -> pb.GenerateRequest:
        text = "".join(rng.choices("abcdef_ (:\n", k=rng.randrange(1, 400)))
        sampling = pb.SamplingParams(max_tokens=tokens, n=rng.choice([1, 1, 2]), ignore_eos=True)
        return pb.GenerateRequest(text=text, sampling=sampling)

    def _generate(self, channel: grpc.Channel, rng: random.Random) -> None:
        list(client.generate(channel, self._request(rng, rng.randrange(1, 150))))

    def _cancel(self, channel: grpc.Channel, rng: random.Random) -> None:
        stream = client.generate(channel, self._request(rng, 5000))
        for _ in range(rng.randrange(1, 5)):
            next(stream)
        stream.close()  # type: ignore[attr-defined]

    def _score(self, channel: grpc.Channel, rng: random.Random) -> None:
        inference_pb2_grpc.InferenceStub(channel).Score(
            pb.ScoreRequest(text="def f(x):" * rng.randrange(1, 50))
        )

    def _converse(self, channel: grpc.Channel, rng: random.Random) -> None:
        stub = sessions_pb2_grpc.SessionsStub(channel)
        session = stub.Create(sessions_pb2.CreateSessionRequest(ttl_s=60))
        for _ in range(3):
            request = self._request(rng, 10)
            request.sampling.n, request.session_id = 1, session.session_id
            list(client.generate(channel, request))
        stub.Delete(sessions_pb2.DeleteSessionRequest(session_id=session.session_id))

    def _nonsense(self, channel: grpc.Channel, rng: random.Random) -> None:
        send = channel.unary_unary("/fathom.v1.Inference/Score")
        try:
            send(rng.randbytes(40))
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise


def memory() -> dict[str, float]:
    """Resident megabytes of each part of the server."""
    sizes = {}
    for name, part in PARTS.items():
        (pid,) = processes(part)
        status = Path(f"/proc/{pid}/status").read_text()
        sizes[name] = int(status.partition("VmRSS:")[2].split()[0]) / 1e3
    return sizes


def main(
    minutes: Annotated[float, typer.Option(min=0.1)] = 60,
    users: Annotated[int, typer.Option(min=1)] = 24,
    grpc_port: int = 9320,
    http_port: int = 8320,
) -> None:
    from serving.cluster.local import running

    config = ServeConfig.parse(
        {"models": [f"zoo/{MODEL}"], "grpc_port": grpc_port, "http_port": http_port}, "soak"
    )
    with running(config):
        load = Users(f"localhost:{grpc_port}", users)
        samples = []
        try:
            for minute in range(1, 21):  # twenty samples, however long it is
                time.sleep(minutes * 60 / 20)
                samples.append(memory())
                shown = ", ".join(f"{name} {size:.0f} MB" for name, size in samples[-1].items())
                typer.echo(f"{minute * minutes / 20:.1f} min: {load.ended} requests, {shown}")
        finally:
            load.stop()
    settled = samples[len(samples) // 4 :]
    half = len(settled) // 2
    growth = {
        name: max(s[name] for s in settled[half:]) / max(s[name] for s in settled[:half]) for name in PARTS
    }
    print(
        json.dumps(
            {
                "soak": {
                    "minutes": minutes,
                    "requests": load.ended,
                    "failures": len(load.failures),
                    "memory_growth": {name: round(ratio, 4) for name, ratio in growth.items()},
                }
            }
        )
    )
    if load.failures or max(growth.values()) > BOUND:
        typer.echo(f"{sorted(set(load.failures))} {growth}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
