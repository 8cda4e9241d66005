"""The real tritonclient against a real port. It wants another protobuf, so it has an environment of its own."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving import LLM, SamplingParams
from serving.config import GatewaySpec
from tests import tiny
from tests.gateway.harness import house
from tests.gateway.ingress import grpc_port, patient  # noqa: F401  (used by being here)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def interpreter(request: pytest.FixtureRequest) -> Path:
    """A Python that has tritonclient; kept in pytest's cache."""
    folder = request.config.cache.mkdir("tritonclient")  # type: ignore[union-attr]
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        command = [python, "-m", "pip", "install", "--quiet", "tritonclient[grpc]"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        if done.returncode:
            pytest.skip(f"tritonclient cannot be installed: {done.stderr.strip()[-200:]}")
        (folder / "complete").touch()
    return python


async def test_an_unmodified_tritonclient_is_served(tmp_path: Path, interpreter: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "tiny")
    llm = LLM(folder, dtype="float32")
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    expected = llm.generate("def f", greedy)[0]
    second = llm.generate([[*llm.encode("def f"), *expected.token_ids, *llm.encode("(x)")]], greedy)[0]
    spec = GatewaySpec(state_store=str(tmp_path / "state"))
    script = Path(__file__).with_name("triton_calls.py")
    async with house(folder, gateway=spec) as h, grpc_port(h.rpc) as address:
        client = await asyncio.create_subprocess_exec(
            interpreter, script, address, "tiny", stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = await client.communicate()
        assert client.returncode == 0, err.decode()
        await h.idle()
    told = json.loads(out)
    assert told["live"] and told["ready"] and told["model_ready"] == [True, False]
    assert told["server"]["name"] == "fathom"
    assert {tensor["name"] for tensor in told["model"]["outputs"]} >= {"text_output", "token_ids", "depths"}
    assert told["index"]["models"] == [{"name": "tiny", "version": "1", "state": "READY"}]
    whole = told["whole"]
    assert (whole["id"], whole["text"], whole["token_ids"]) == ("7", expected.text, expected.token_ids)
    assert whole["depths"] == [1] * 12 and len(whole["from_ids"]) == 4
    assert whole["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)
    streamed = told["streamed"]
    assert streamed["texts"] == {"stream": expected.text, "s1": expected.text, "s2": second.text}
    assert streamed["finals"] == ["s1", "s2", "stream"]
    assert len(streamed["errors"]) == 1 and "max_tokens = -1" in streamed["errors"][0]
    assert "NOT_FOUND" in told["refused"] and "must be one of tiny" in told["refused"]
