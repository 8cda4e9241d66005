"""The HTTP door of a server that is really there, with each ingress."""

import json
import socket
import time
import urllib.request
from collections.abc import Iterator

import httpx
import openai
import pytest

from serving.config import ServeConfig
from tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", params=["direct", "proxy"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from serving.cluster.local import running

    folder = tiny.checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    raw = {
        "models": [{"path": str(folder), "slots": 4}],
        "gateway": {"state_store": str(tmp_path_factory.mktemp("state"))},
        "grpc_port": free_port(),
        "http_port": free_port(),
        "ingress": request.param,
    }
    with running(ServeConfig.parse(raw, "test")):
        yield f"http://127.0.0.1:{raw['http_port']}"


def slots_taken(url: str) -> float:
    with urllib.request.urlopen(f"{url}/v1/fathom/stats", timeout=20) as answer:
        return float(json.load(answer)["models"]["tiny"]["running"])


def test_streams_errors_and_the_page_go_through_it(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        options = {"model": "tiny", "prompt": "def f", "temperature": 0, "max_tokens": 30}
        whole = client.completions.create(**options).choices[0].text
        chunks = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
        assert "".join(chunks) == whole and len(chunks) > 1
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nobody", prompt="a")
    with httpx.Client(base_url=url, timeout=30) as raw:
        json_body = {"content-type": "application/json"}
        assert raw.post("/v1/completions", content=b"{", headers=json_body).status_code == 400
        assert raw.post("/v1/completions", content=b"{}").status_code == 415
        endless = (b"a" * (1 << 17) for _ in range(80))
        assert raw.post("/v1/completions", content=endless, headers=json_body).status_code == 413
        answered = raw.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "mine"})
        assert answered.headers["x-request-id"] == "mine" and answered.json()["id"] == "cmpl-mine"
        assert raw.get("/").text.startswith("<!doctype html>")
        assert raw.get("/page.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_slot(url: str, stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": 500_000, "ignore_eos": True, "stream": stream}
    with httpx.Client(base_url=url, timeout=3) as client:
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body)
    deadline = time.monotonic() + 20
    while slots_taken(url) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert slots_taken(url) == 0
