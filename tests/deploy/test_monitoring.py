"""Dashboard and alerts ask for metrics that there are, and a real Prometheus answers each of their queries."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from protos.fathom.v1 import inference_pb2 as pb
from serving.cluster.metrics import EngineMetrics
from serving.config import GatewaySpec
from serving.gateway.fleet import Fleet
from serving.gateway.http import make_app
from serving.gateway.metrics import GatewayMetrics
from tests.deploy.manifests import DEPLOY, ROOT
from tests.gateway.harness import House, house
from tests.gateway.ingress import http_port
from tests.tiny import LOOPED, checkpoint

RULES: dict[str, Any] = yaml.safe_load((DEPLOY / "monitoring" / "rules.yaml").read_text())["spec"]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "monitoring" / "dashboard.json").read_text())
OPERATIONS = ROOT / "docs" / "operations.md"
UNIT_TESTS = Path(__file__).with_name("alerts.yaml")
SUFFIXES = ("_bucket", "_sum", "_count", "_total", "")
VARIABLES = {"$model": ".*", "$ttft_objective": "0.5", "$__rate_interval": "10s", "$__range": "30s"}


def panels() -> Iterator[tuple[str, str]]:
    """Title and expression of every query, its variables filled in."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def asked() -> set[str]:
    """Every metric that a query names."""
    queries = [expression for _, expression in panels()] + [rule["expr"] for rule in alerts()]
    return {name for query in queries for name in re.findall(r"fathom:\w+", query)}


async def families() -> set[str]:
    """Every metric that an engine and a gateway have."""
    engine = EngineMetrics("m", "r").text()
    gateway = await GatewayMetrics("g").scrape(Fleet([]))
    return set(re.findall(r"^# HELP (fathom:\w+) ", (engine + gateway).decode(), re.M))


def promtool(*arguments: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: Debian's package prometheus has it")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


async def test_queries_name_only_metrics_that_there_are() -> None:
    known = {name + suffix for name in await families() for suffix in SUFFIXES}
    known |= {name.removesuffix("_total") + suffix for name in await families() for suffix in SUFFIXES}
    assert asked() <= known, asked() - known


async def test_the_tables_of_the_documentation_are_complete() -> None:
    text = OPERATIONS.read_text()
    assert set(re.findall(r"^\| `(fathom:\w+)` \|", text, re.M)) == await families()
    assert set(re.findall(r"^\| `(Fathom\w+)` \(", text, re.M)) == {rule["alert"] for rule in alerts()}


def test_no_two_panels_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    shutil.copy(UNIT_TESTS, tmp_path)
    promtool("check", "rules", str(tmp_path / "rules.yaml"))
    promtool("test", "rules", str(tmp_path / UNIT_TESTS.name))


def test_every_alert_has_a_unit_test_and_says_what_it_means() -> None:
    text = UNIT_TESTS.read_text()
    for rule in alerts():
        assert rule["alert"] in text
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"].keys() == {"summary", "description"}


async def work(h: House, stop: asyncio.Event) -> None:
    """Requests at every depth, until told to stop."""
    number = 0
    while not stop.is_set():
        depth = pb.DepthPolicy(fixed=1 + number % 3)
        sampling = pb.SamplingParams(max_tokens=20, ignore_eos=True)
        request = pb.GenerateRequest(text="def f(x):", sampling=sampling, depth=depth)
        await h.stream("fathom.v1.Inference/Generate", request)
        number += 1
        await asyncio.sleep(0.05)


@asynccontextmanager
async def prometheus(target: str, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A Prometheus with our rules that scrapes a host:port each second."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed: Debian's package is prometheus")
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
    scrape = {"job_name": "fathom", "static_configs": [{"targets": [target]}]}
    intervals = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config = {"global": intervals, "rule_files": ["rules.yaml"], "scrape_configs": [scrape]}
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", trust_env=False, timeout=60) as client:
            while True:
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                try:
                    if (await client.get("/-/ready")).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait()


async def query(client: httpx.AsyncClient, expression: str) -> list[dict[str, Any]]:
    answer = (await client.get("/api/v1/query", params={"query": expression})).json()
    assert answer["status"] == "success", (expression, answer.get("error"))
    return answer["data"]["result"]


@pytest.mark.slow
async def test_a_real_prometheus_answers_every_query(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "looped", LOOPED)
    async with (
        house(folder) as h,
        http_port(make_app(h.requests, h.fleet, GatewaySpec(), h.metrics)) as url,
        prometheus(url.removeprefix("http://"), tmp_path) as client,
    ):
        stop = asyncio.Event()
        working = asyncio.create_task(work(h, stop))
        await h.unary("fathom.v1.Models/Get", b"")
        while not await query(client, "count_over_time(fathom:requests_total[10s]) >= 8"):
            await asyncio.sleep(0.2)  # scrapes enough for a rate
        for title, expression in panels():
            results = await query(client, expression)
            assert results, f"{title}: no data for {expression}"
            assert all(float(r["value"][1]) >= 0 for r in results), f"{title}: {results}"  # not so for NaN
        groups = (await client.get("/api/v1/rules")).json()["data"]["groups"]
        states = {
            rule["name"]: (rule["health"], rule["state"]) for group in groups for rule in group["rules"]
        }
        assert states == {rule["alert"]: ("ok", "inactive") for rule in alerts()}
        depths = await query(client, "sum by (depth) (fathom:generation_tokens_by_depth_total)")
        assert {r["metric"]["depth"] for r in depths} >= {"1", "2", "3"}
        stop.set()
        await working
        await h.idle()
