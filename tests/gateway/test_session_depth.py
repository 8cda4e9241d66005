"""Sessions whose turns differ in their depth policy: each turn says what it would say without a session, whatever
policies the kept state was made under."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.fathom.v1 import inference_pb2 as pb
from protos.fathom.v1 import inference_pb2_grpc, sessions_pb2, sessions_pb2_grpc
from serving import client
from serving.config import GatewaySpec
from serving.engine.depth import DepthPolicy
from tests import tiny
from tests.gateway.harness import house
from tests.gateway.ingress import grpc_port, patient  # noqa: F401  (used by being here)
from tests.gateway.test_depth_policies import NESTED

ROUTED: dict[str, Any] = {
    "model_type": "routed",
    "base": {**tiny.GLA, "num_hidden_layers": 4},
    "num_recursions": 3,
    "mor": {"type": "expert", "expert": {"sampling": "aux_loss", "alpha": 2.0, "gating": "residual"}},
}
MODELS = {
    "plain": tiny.GLA,
    "llama": {name: value for name, value in NESTED.items() if name not in ("exits", "widths")},
    "looped": tiny.LOOPED,
    "propagate": {**tiny.LOOPED, "skipped": "propagate"},
    "routed": ROUTED,
    "nested": NESTED,
}
POLICIES = {
    "plain": ["full", "chain(0, 1)", "chain(0, 0, 1)", "chain(1)", "chain(1, 0, 1, 1)"],
    "looped": [
        "full",
        "fixed(1)",
        "fixed(2)",
        "gate(0.6)",
        "confidence(entropy, 4)",
        "converged(cosine, 0.3)",
    ],
    "routed": ["full", "fixed(1)", "fixed(3)", "router", "router(min=2)", "confidence(entropy, 4)"],
    "nested": [
        "full",
        "fixed(1)",
        "fixed(3)",
        "confidence(entropy, 4)",
        "full(width=0.5)",
        "fixed(3, width=0.5)",
    ],
}
POLICIES["llama"], POLICIES["propagate"] = POLICIES["plain"], POLICIES["looped"]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two ports: of a server with sessions and a prefix cache, and of one that computes all anew."""
    folder = tmp_path_factory.mktemp("models")
    folders = [tiny.checkpoint(folder / name, config) for name, config in MODELS.items()]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def do(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(300)

    servers = _served(folders, folder / "store")
    yield do(anext(servers))
    do(anext(servers, None))
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


async def _served(folders: list[Path], store: Path) -> AsyncIterator[tuple[str, str]]:
    @asynccontextmanager
    async def port(spec: GatewaySpec, cache: int) -> AsyncIterator[str]:
        async with house(*folders, gateway=spec, prefix_cache_mb=cache) as h, grpc_port(h.rpc) as target:
            yield target
            await h.idle()

    async with (
        port(GatewaySpec(state_store=str(store), max_sessions=1000), 16) as kept,
        port(GatewaySpec(), 0) as anew,
    ):
        yield kept, anew


Told = tuple[list[int], list[int], pb.Usage]


def said(channel: grpc.Channel, policy: str, ids: list[int], **given: Any) -> Told:
    sampling = pb.SamplingParams(temperature=0, max_tokens=7, ignore_eos=True, seed=3)
    depth = client.policy(DepthPolicy.parse(policy))
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=ids), sampling=sampling, depth=depth, **given)
    messages = list(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60))
    tokens = [token for message in messages for token in message.token_ids]
    return tokens, [depth for message in messages for depth in message.depths], messages[-1].usage


TURNS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), min_size=2, max_size=5)


@pytest.mark.parametrize("name", MODELS)
def test_a_turn_says_what_it_says_without_a_session(name: str, targets: tuple[str, str]) -> None:
    with grpc.insecure_channel(targets[0]) as kept, grpc.insecure_channel(targets[1]) as anew:
        sessions = sessions_pb2_grpc.SessionsStub(kept)

        @settings(max_examples=8)
        @given(turns=TURNS)
        def check(turns: list[tuple[int, int]]) -> None:
            session_id = sessions.Create(sessions_pb2.CreateSessionRequest(model=name)).session_id
            history: list[int] = []
            last = ""
            for number, (choice, length) in enumerate(turns):
                policy = POLICIES[name][choice % len(POLICIES[name])]
                new = [(7 * number + 11 * length + i * i) % 290 + 1 for i in range(length)]
                tokens, depths, usage = said(kept, policy, new, session_id=session_id, model=name)
                expected, their_depths, _ = said(anew, policy, history + new, model=name)
                assert (tokens, depths) == (expected, their_depths), f"turn {number}, {policy} after {last}"
                if policy == last:
                    assert usage.cached_tokens >= len(history) - 1
                elif last:
                    assert usage.cache_miss_reason in ("policy", ""), "seen under this one, too"
                history += new + tokens
                last = policy

        check()
