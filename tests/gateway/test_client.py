"""The command line's client against a real port: sessions, keys, and a stream that breaks."""

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serving.cli import app
from serving.config import GatewaySpec
from serving.gateway.keys import digest
from tests import tiny
from tests.gateway.harness import house
from tests.gateway.ingress import grpc_port


async def run(*arguments: str) -> str:
    result = await asyncio.to_thread(CliRunner().invoke, app, list(arguments))
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


async def test_sessions_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys: [{{name: ann, sha256: '{digest('secret')}'}}]")
    spec = GatewaySpec(keys_file=str(keys), state_store=str(tmp_path / "store"))
    async with house(tiny.checkpoint(tmp_path / "tiny"), gateway=spec) as h, grpc_port(h.rpc) as target:
        monkeypatch.setenv("FATHOM_TARGET", target)
        refused = await asyncio.to_thread(CliRunner().invoke, app, ["sessions", "list"])
        assert refused.exit_code != 0
        monkeypatch.setenv("FATHOM_API_KEY", "secret")
        made = json.loads(await run("sessions", "create", "--ttl", "60"))
        name = made["session_id"]
        first = await run("generate", "--session", name, "--max-tokens", "4", "--json", "def f")
        assert json.loads(first.splitlines()[-1])["usage"]["prompt_tokens"] > 0
        fork = json.loads(await run("sessions", "fork", name))
        snapshot = json.loads(await run("sessions", "snapshot", name))
        assert fork["tokens"] == snapshot["tokens"]
        restored = json.loads(await run("sessions", "restore", snapshot["snapshot_id"]))
        await run("sessions", "delete", name)
        listed = json.loads(await run("sessions", "list"))
        assert {s["session_id"] for s in listed["sessions"]} == {fork["session_id"], restored["session_id"]}
        assert [m["name"] for m in json.loads(await run("models", "--json"))] == ["tiny"]
        await h.idle()
