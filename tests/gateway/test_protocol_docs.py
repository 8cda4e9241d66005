"""Every example of docs/protocol.md, run as it stands against real ports."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from serving.config import GatewaySpec
from serving.gateway.http import make_app
from tests import tiny
from tests.gateway.harness import house
from tests.gateway.ingress import grpc_port, http_port, patient  # noqa: F401  (used by being here)
from tests.gateway.test_triton import interpreter  # noqa: F401

ROOT = Path(__file__).parent.parent.parent
BLOCKS = re.findall(r"^```(\w+)(?: (\w+))?\n(.*?)^```$", (ROOT / "docs/protocol.md").read_text(), re.M | re.S)
EXAMPLES = [(kind, code) for kind, needs, code in BLOCKS if not needs]
WITH_TRITON = [code for _, needs, code in BLOCKS if needs == "tritonclient"]


@pytest.fixture(scope="module")
async def ports(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, str]]:
    folder = tiny.checkpoint(tmp_path_factory.mktemp("models") / "gla")
    spec = GatewaySpec(state_store=str(tmp_path_factory.mktemp("state")))
    async with (
        house(folder, gateway=spec) as h,
        grpc_port(h.rpc) as grpc_address,
        http_port(make_app(h.requests, h.fleet, spec, h.metrics)) as url,
    ):
        yield {"localhost:9000": grpc_address, "localhost:8000": url.removeprefix("http://")}
        await h.idle()


async def run(ports: dict[str, str], code: str, *command: str | Path) -> str:
    """What it prints; it must end well."""
    for standard, actual in ports.items():
        code = code.replace(standard, actual)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = await asyncio.create_subprocess_exec(
        *command, code, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await done.communicate()
    assert done.returncode == 0, err.decode()
    return out.decode(errors="replace")


@pytest.mark.parametrize(
    ("kind", "code"), EXAMPLES, ids=[f"{kind}-{n}" for n, (kind, _) in enumerate(EXAMPLES)]
)
async def test_an_example_runs(ports: dict[str, str], kind: str, code: str) -> None:
    if kind == "sh" and shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    command = {"python": (sys.executable, "-c"), "sh": ("sh", "-ec")}[kind]
    told = await run(ports, code, *command)
    assert told and '"error"' not in told


@pytest.mark.slow
@pytest.mark.parametrize("code", WITH_TRITON)
async def test_an_example_with_tritonclient_runs(ports: dict[str, str], interpreter: Path, code: str) -> None:  # noqa: F811
    assert "[1 1 1" in await run(ports, code, interpreter, "-c")


def test_there_are_examples_of_every_door() -> None:
    text = "".join(code for _, code in EXAMPLES) + "".join(WITH_TRITON)
    assert all(word in text for word in ("openai", "curl", "triton", "sessions_pb2"))
