"""The Serve configuration of an overlay on as many Ray nodes as its RayService asks for: it serves, is
upgraded under load, and loses nodes under load, both with and without notice."""

import asyncio
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import grpc
import pytest
import yaml

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc, models_pb2, models_pb2_grpc
from serving.client import DEAD
from serving.gateway.keys import digest, new_secret
from tests.deploy.manifests import DEPLOY, Object, only, rendered, serve_config
from tests.deploy.nodes import Cluster, Node, cluster, wait

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

PROMPTS = ["def read_json(path):", "class Stack:", "import os\n", "for i in range(10):"]
TOKENS = 200


KEY = new_secret()
METADATA = (("authorization", f"Bearer {KEY}"),)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head, the two workers of the overlay, and one that has room for what a lost one carried."""
    service = only(rendered("cpu"), "RayService")
    with cluster(service, tmp_path_factory.mktemp("cluster"), spare=1) as made:
        entry = {"name": "tester", "sha256": digest(KEY)}
        (made.folder / "keys.yaml").write_text(yaml.safe_dump({"keys": [entry]}))
        yield made


def configuration(overlay: str, folder: Path) -> Object:
    """The overlay's, but for the paths where a pod has its volumes."""
    config = serve_config(overlay)
    spec = config["applications"][0]["args"]["spec"]
    spec["keys_file"], spec["state_store"] = str(folder / "keys.yaml"), str(folder / "state")
    return config


def _ready(node: Node) -> bool:
    with urllib.request.urlopen(f"http://{node.address}:8000/healthz", timeout=5) as answer:
        return bool(answer.status == 200)


def engines(made: Cluster) -> list[dict[str, Any]]:
    return made.applications()["fathom-gla"]["deployments"]["engine"]["replicas"]


def ask(number: int, model: str) -> pb.GenerateRequest:
    """Greedy, so that what comes is known."""
    sampling = pb.SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return pb.GenerateRequest(model=model, text=PROMPTS[number % len(PROMPTS)], sampling=sampling)


async def generate(
    channel: grpc.aio.Channel, number: int, model: str = "gla", gaps: list[float] | None = None
) -> list[int]:
    """The tokens; `gaps` takes the seconds between any two messages."""
    stream = inference_pb2_grpc.InferenceStub(channel).Generate(
        ask(number, model), timeout=120, metadata=METADATA
    )
    tokens: list[int] = []
    before = None
    async for message in stream:
        now = time.monotonic()
        if gaps is not None and before is not None:
            gaps.append(now - before)
        tokens += message.token_ids
        before = now
    return tokens


@dataclass
class Load:
    """Streams that follow one another, several at a time."""

    expected: list[list[int]]
    done: int = 0
    wrong: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # seconds between two messages of a stream

    @classmethod
    @asynccontextmanager
    async def on(cls, addresses: list[str], streams: int = 8) -> AsyncIterator["Load"]:
        """Inside, under load; at the end every stream has ended."""
        channels = [grpc.aio.insecure_channel(f"{address}:9000") for address in addresses]
        load = cls([await generate(channels[0], number) for number in range(len(PROMPTS))])
        stop = asyncio.Event()
        tasks = [
            asyncio.create_task(load._stream(channels[number % len(channels)], number, stop))
            for number in range(streams)
        ]
        try:
            await load.more(streams)
            yield load
            await load.more(2 * streams)
        finally:
            stop.set()
            await asyncio.gather(*tasks)
            for channel in channels:
                await channel.close()

    async def more(self, streams: int) -> None:
        """Until so many more have ended."""
        until = self.done + streams
        while self.done < until:
            await asyncio.sleep(0.1)

    async def _stream(self, channel: grpc.aio.Channel, number: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            try:
                got, expected = (
                    await generate(channel, number, gaps=self.gaps),
                    self.expected[number % len(PROMPTS)],
                )
                if got != expected:
                    same = next(
                        (n for n, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]),
                        0,
                    )
                    self.wrong.append(
                        f"{len(got)} tokens, other than without a disturbance from the {same}th on"
                    )
            except grpc.aio.AioRpcError as error:
                self.wrong.append(f"{error.code().name}: {error.details()}")
            self.done += 1


async def later(what: str, condition: Any) -> None:
    """`wait` beside the load."""
    await asyncio.to_thread(wait, what, condition)


@pytest.mark.parametrize("overlay", ["multi-model", "cpu"])  # what follows goes on with the last
async def test_the_embedded_configuration_serves(nodes: Cluster, overlay: str) -> None:
    await asyncio.to_thread(nodes.deploy, configuration(overlay, nodes.folder))
    await later("all applications run", nodes.running)
    await later("the gateways know the replicas", lambda: all(_ready(n) for n in nodes.workers))
    models = [a["args"] for a in serve_config(overlay)["applications"][1:]]
    minima = {m.get("name", "gla"): m["autoscaling"]["min_replicas"] for m in models}
    for node in nodes.workers:
        async with grpc.aio.insecure_channel(f"{node.address}:9000") as channel:
            listed = await models_pb2_grpc.ModelsStub(channel).List(
                models_pb2.ListModelsRequest(), metadata=METADATA
            )
            assert {m.name: m.replicas for m in listed.models} == minima
            for model in minima:
                assert len(await generate(channel, 0, model)) == TOKENS
    # What Prometheus scrapes: the head's proxy, which knows every gateway.
    with urllib.request.urlopen(f"http://{nodes.head.address}:8000/metrics", timeout=10) as answer:
        text = answer.read().decode()
    slots = [line for line in text.splitlines() if line.startswith("fathom:slots{")]
    assert len(slots) == sum(minima.values())


async def test_nobody_is_served_without_a_key(nodes: Cluster) -> None:
    async with grpc.aio.insecure_channel(f"{nodes.workers[0].address}:9000") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await models_pb2_grpc.ModelsStub(channel).List(models_pb2.ListModelsRequest())
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_replicas_are_where_the_configuration_wants_them(nodes: Cluster) -> None:
    gateways = nodes.applications()["fathom"]["deployments"]["gateway"]["replicas"]
    assert len({replica["node_ip"] for replica in gateways}) == 2  # max_replicas_per_node: 1
    for replica in [*gateways, *engines(nodes)]:
        assert replica["node_ip"] != nodes.head.address


@pytest.mark.parametrize("token", ["", "another"])
def test_nobody_deploys_without_the_clusters_token(nodes: Cluster, token: str) -> None:
    with pytest.raises(HTTPError) as caught:
        nodes.call("/api/serve/applications/", {"applications": []}, token=token)
    assert caught.value.code in (401, 403)
    assert set(nodes.applications()) == {"fathom", "fathom-gla"}


async def test_an_upgrade_in_place_fails_no_stream(nodes: Cluster) -> None:
    config = configuration("cpu", nodes.folder)
    config["applications"][1]["args"]["prefill_tokens"] = 128
    before = {replica["replica_id"] for replica in engines(nodes)}

    def replaced() -> bool:
        now = engines(nodes)
        return not before & {r["replica_id"] for r in now} and all(r["state"] == "RUNNING" for r in now)

    async with Load.on([node.address for node in nodes.workers]) as load:
        await asyncio.to_thread(nodes.deploy, config)
        await later("every replica is a new one", replaced)
        await later("the application runs", nodes.running)
    assert not load.wrong, load.wrong


async def test_a_worker_that_is_drained_fails_no_stream(nodes: Cluster) -> None:
    leaving = next(n for n in nodes.workers if n.address == engines(nodes)[0]["node_ip"])
    staying = [n for n in nodes.workers if n is not leaving]
    async with Load.on([node.address for node in staying]) as load:
        drain = leaving.run("/bin/bash", str(DEPLOY / "drain.sh"), "120")
        output, _ = await asyncio.to_thread(drain.communicate)
        assert drain.returncode == 0, output.decode()
        await later("the worker has left", lambda: nodes.alive() == len(staying) + 1)
    nodes.workers.remove(leaving)
    leaving.remove()
    assert not load.wrong, load.wrong
    assert leaving.address not in {replica["node_ip"] for replica in engines(nodes)}


async def test_a_worker_that_dies_costs_at_most_the_streams_of_its_gateway(nodes: Cluster) -> None:
    """The others go on elsewhere, with the same tokens; and once Ray has noticed, all is well again."""
    dying = next(n for n in nodes.workers if n.address == engines(nodes)[0]["node_ip"])
    async with Load.on([node.address for node in nodes.workers if node is not dying]) as load:
        before = max(load.gaps)
        load.gaps.clear()
        dying.kill()
        await later("Ray notices", lambda: nodes.alive() == len(nodes.workers))
        lost = len(load.wrong)
        await load.more(16)
        assert len(load.wrong) == lost, load.wrong
        pause = max(load.gaps)
        print(f"the longest pause: {pause:.2f} s, and {before:.2f} s before")
        assert pause < 3, "of streams whose gateway lives"
    nodes.workers.remove(dying)
    # Ray's proxy tells of a gateway's death in more than one way; our client takes all of them for a break.
    broken = ("UNAVAILABLE", *(f"INTERNAL: .*{told}" for told in DEAD))
    assert all(re.match("|".join(broken), text, re.DOTALL) for text in load.wrong), load.wrong
    assert len(load.wrong) <= 8, load.wrong  # each of the streams once
