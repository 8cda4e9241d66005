"""Gateways with ports of their own, as processes under Ray: one of two is killed; all are told to stop with everything
open."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc
from tests import tiny
from tests.gateway.test_http_on_ray import free_port

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]
TOKENS = 600
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@contextmanager
def served(folder: Path, **gateway: object) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """The process, its gRPC and its HTTP port."""
    ports = free_port(), free_port()
    config = folder.parent / "serving.yaml"
    settings = {
        "models": [{"path": str(folder)}],
        "gateway": gateway,
        "grpc_port": ports[0],
        "http_port": ports[1],
    }
    config.write_text(yaml.safe_dump(settings))
    command = [str(Path(sys.executable).with_name("fathom")), "serve", "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            assert any("is ready" in line for line in server.stdout)
            yield server, *ports
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGTERM)
                try:
                    server.wait(90)
                finally:
                    server.kill()


def ask(tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="def f", sampling=pb.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    )


def gateways(server: subprocess.Popen[str]) -> list[int]:
    """Process ids of its gateways."""
    parents: dict[int, int] = {}
    named = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            title = (entry / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if b"ServeReplica:fathom:gateway" in title:
            named.append(int(entry.name))

    def ours(pid: int) -> bool:
        while pid > 1 and pid != server.pid:
            pid = parents.get(pid, 0)
        return pid == server.pid

    return sorted(filter(ours, named))


def listening(port: int) -> int:
    """Sockets that listen at the port."""
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    return sum(line[1].endswith(f":{port:04X}") and line[3] == "0A" for line in lines)


def until(what: object, port: int, count: int) -> None:
    for _ in range(600):
        if listening(port) == count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{what}: {listening(port)} sockets listen, not {count}")


def test_one_of_two_gateways_is_killed(tmp_path: Path) -> None:
    with served(tiny.checkpoint(tmp_path / "tiny"), replicas=2) as (server, port, page), ExitStack() as open_:
        until("both are up", port, 2)
        target = f"127.0.0.1:{port}"
        channels = [open_.enter_context(grpc.insecure_channel(target, OWN_CONNECTION)) for _ in range(16)]
        streams = [inference_pb2_grpc.InferenceStub(c).Generate(ask(TOKENS)) for c in channels]
        had = [list(next(stream).token_ids) for stream in streams]
        victim = gateways(server)[0]
        os.kill(victim, signal.SIGKILL)

        def finish(
            channel: grpc.Channel, stream: Iterator[pb.GenerateResponse], ids: list[int]
        ) -> list[grpc.StatusCode]:
            """As a client that takes up again on the same channel what breaks. The first connection after the death
            may yet be given to the dying one."""
            codes = []
            while len(codes) < 4:
                try:
                    for message in stream:
                        ids += message.token_ids
                    break
                except grpc.RpcError as error:
                    codes.append(error.code())
                    request = ask(TOKENS)
                    request.resumed_token_ids.extend(ids)
                    stub = inference_pb2_grpc.InferenceStub(channel)
                    stream = stub.Generate(request, wait_for_ready=True)
            return codes

        with ThreadPoolExecutor(16) as threads:
            codes = list(threads.map(finish, channels, streams, had))
        assert {code for told in codes for code in told} == {grpc.StatusCode.UNAVAILABLE}
        assert [] in codes  # the other one's clients noticed nothing
        assert all(ids == had[0] for ids in had) and len(had[0]) == TOKENS
        with urllib.request.urlopen(f"http://127.0.0.1:{page}/healthz", timeout=5) as answer:
            assert answer.status == 200
        until("another is started", port, 2)
        until("with its HTTP port", page, 2)
        assert victim not in gateways(server)


def test_told_to_stop_with_everything_open(tmp_path: Path) -> None:
    with served(tiny.checkpoint(tmp_path / "tiny")) as (server, port, page), ExitStack() as open_:
        channel = open_.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", OWN_CONNECTION))
        stream = inference_pb2_grpc.InferenceStub(channel).Generate(ask(1_000_000))
        next(stream)
        next(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest()))
        body = json.dumps(
            {"prompt": "a", "max_tokens": 1_000_000, "ignore_eos": True, "stream": True}
        ).encode()
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
        )
        for sent in (
            b"",
            b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n",  # and keeps the connection
            head + b"500\r\n\r\n{",
            head + str(len(body)).encode() + b"\r\n\r\n" + body,  # and does not read
        ):
            client = open_.enter_context(socket.create_connection(("127.0.0.1", page)))
            client.sendall(sent)
        time.sleep(1)
        started = time.monotonic()
        server.send_signal(signal.SIGTERM)
        assert server.communicate(timeout=90)[0].splitlines() == ["stopping"]
        assert server.returncode == 0
        assert time.monotonic() - started < 45
        with pytest.raises(grpc.RpcError) as told:
            list(stream)
        assert told.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
