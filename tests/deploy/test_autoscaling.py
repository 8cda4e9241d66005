"""Replicas by slots: the policy's laws, and one round up and down on a real Ray."""

import asyncio
import math
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc, models_pb2, models_pb2_grpc
from serving.cluster import autoscaling
from serving.cluster.autoscaling import RUNNING, SLOTS, WAITING, SlotLoad
from serving.config import Autoscaling, ModelSpec, ServeConfig, validated
from serving.errors import ServeConfigError
from tests.tiny import checkpoint

LOADS = st.lists(st.tuples(st.integers(0, 64), st.integers(0, 200)), min_size=1, max_size=8)


def context(slots: float, loads: list[tuple[float, float]], target: int = 1) -> Any:
    """What Ray Serve shows a policy: one (running, waiting) for each replica that has reported."""
    metrics = {
        SLOTS: {f"r{n}": slots for n in range(len(loads))},
        RUNNING: {f"r{n}": running for n, (running, _) in enumerate(loads)},
        WAITING: {f"r{n}": waiting for n, (_, waiting) in enumerate(loads)},
    }
    return SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=target)


def wanted(target_load: float, slots: float, loads: list[tuple[float, float]]) -> float:
    return SlotLoad(target_load)(context(slots, loads))[0]


@given(LOADS, st.integers(1, 64), st.floats(0.05, 1))
def test_as_many_replicas_as_wanted_are_no_fuller_than_the_target(
    loads: list[tuple[int, int]], slots: int, target_load: float
) -> None:
    busy = sum(running + waiting for running, waiting in loads)
    replicas = max(1, math.ceil(wanted(target_load, slots, loads) - 1e-9))
    assert busy / (replicas * slots) <= target_load * (1 + 1e-6)
    if replicas > 1:  # one less would be too full
        assert busy / ((replicas - 1) * slots) > target_load * (1 - 1e-6)


@given(LOADS, st.integers(1, 64))
def test_a_request_more_never_asks_for_fewer_replicas(loads: list[tuple[int, int]], slots: int) -> None:
    more = [(loads[0][0], loads[0][1] + 1), *loads[1:]]
    assert wanted(0.8, slots, more) > wanted(0.8, slots, loads)


@given(LOADS, st.integers(1, 64))
def test_a_replica_without_load_changes_nothing(loads: list[tuple[int, int]], slots: int) -> None:
    assert wanted(0.8, slots, [*loads, (0, 0)]) == pytest.approx(wanted(0.8, slots, loads))


@pytest.mark.parametrize(
    "metrics", [None, {}, {SLOTS: {"r0": 0.0}, RUNNING: {"r0": 0.0}, WAITING: {"r0": 0.0}}]
)
def test_without_a_report_the_number_stays(metrics: Any) -> None:
    assert SlotLoad(0.8)(SimpleNamespace(aggregated_metrics=metrics, target_num_replicas=3)) == (3.0, {})


def test_ray_serve_makes_the_policy_from_its_pickle() -> None:
    from ray.serve._private.autoscaling_state import _resolve_policy_callable

    made = autoscaling.options(Autoscaling(max_replicas=4, target_load=0.5))
    policy = _resolve_policy_callable(made.policy)
    assert policy(context(8, [(8, 4), (4, 0)])) == (4.0, {})
    assert (made.min_replicas, made.max_replicas) == (1, 4)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"max_replicas": 2, "min_replicas": 3}, "min_replicas = 3 is above max_replicas = 2"),
        ({"max_replicas": 2, "min_replicas": 0}, "min_replicas = 0"),
        ({"max_replicas": 2, "target_load": 0}, "target_load = 0"),
        ({}, "max_replicas"),
    ],
)
def test_a_wrong_setting_is_named(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ServeConfigError, match=said):
        validated(ModelSpec, {"path": "zoo/gla", "autoscaling": raw}, "model")


def test_a_model_asks_ray_for_a_number_or_for_bounds() -> None:
    from serving.cluster import app

    def config(raw: dict[str, Any]) -> Any:
        return app.model({"path": "zoo/gla", "device": "cpu", **raw})._bound_deployment._deployment_config

    assert config({"replicas": 3}).num_replicas == 3
    assert config({"replicas": 3}).autoscaling_config is None
    scaled = config({"autoscaling": {"min_replicas": 2, "max_replicas": 5}}).autoscaling_config
    assert (scaled.min_replicas, scaled.max_replicas) == (2, 5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.ray
def test_replicas_come_with_the_load_and_go_with_it(tmp_path: Path) -> None:
    from serving.cluster.local import running

    quick = {"look_back_s": 1, "upscale_delay_s": 0.5, "downscale_delay_s": 1}
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_load": 0.75, **quick}
    model = {"path": str(checkpoint(tmp_path / "tiny")), "slots": 4, "cpus": 0.1, "autoscaling": scaling}
    config = ServeConfig.parse(
        {"models": [model], "grpc_port": free_port(), "http_port": free_port()}, "test"
    )
    with running(config):
        asyncio.run(_more_and_less(f"127.0.0.1:{config.grpc_port}"))


async def _more_and_less(address: str) -> None:
    sampling = pb.SamplingParams(max_tokens=1_000_000, ignore_eos=True)
    request = pb.GenerateRequest(text="def f(x):", sampling=sampling)

    async def reads() -> None:
        async for _ in inference_pb2_grpc.InferenceStub(channel).Generate(request):
            pass

    async def replicas(wanted: int) -> None:
        while True:
            listed = await models_pb2_grpc.ModelsStub(channel).List(models_pb2.ListModelsRequest())
            if [m.replicas for m in listed.models] == [wanted]:
                return
            await asyncio.sleep(0.2)

    async with grpc.aio.insecure_channel(address) as channel:
        await replicas(1)
        staying = [asyncio.create_task(reads()) for _ in range(2)]
        going = [asyncio.create_task(reads()) for _ in range(2)]  # 4 of 4 slots: more than 3/4
        await replicas(2)
        for task in going:
            task.cancel()
        await replicas(1)
        assert not any(task.done() for task in staying)  # the replica that went has handed its sequences over
        for task in staying:
            task.cancel()
