"""`fathom serve` as a process: told to stop, it takes everything down, and says so."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.gateway.test_http_on_ray import free_port

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_when_told(sign: signal.Signals, tmp_path: Path) -> None:
    folder = tiny.checkpoint(tmp_path / "tiny")
    ports = ["--grpc-port", str(free_port()), "--http-port", str(free_port())]
    command = [str(Path(sys.executable).with_name("fathom")), "serve", str(folder), *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        assert any("is ready" in line for line in server.stdout)
        server.send_signal(sign)
        assert server.communicate(timeout=60)[0].splitlines() == ["stopping"]
        assert server.returncode == 0
