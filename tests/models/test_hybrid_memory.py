"""Layers of constant state and layers that grow, of one model, live in one budget of memory."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config import ModelSpec
from serving.engine.build import build
from serving.engine.core import Request
from serving.engine.engine import Engine
from serving.engine.params import SamplingParams
from serving.errors import OverloadedError, ServeConfigError
from tests.models.reference import publish

ROPE = {"rope_type": "default", "rope_theta": 30.0}
HYBRIDS: dict[str, dict[str, Any]] = {
    "olmo_hybrid": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24, "intermediate_size": 34,
                    "num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"],
                    "linear_num_key_heads": 3, "linear_num_value_heads": 3,
                    "linear_key_head_dim": 5, "linear_value_head_dim": 3},
    "qwen3_next": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 24, "head_dim": 8,
                   "linear_key_head_dim": 5, "linear_value_head_dim": 7, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 6, "num_experts": 0, "intermediate_size": 34, "num_hidden_layers": 2,
                   "layer_types": ["full_attention", "linear_attention"],
                   "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "gla": {"num_heads": 2, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
            "attn": {"layers": [1], "num_heads": 2}},
}  # fmt: skip
LONGEST = 40


def held(engine: Engine) -> int:
    """Bytes of all states, with the tables that say where they lie."""
    pool = engine.runner.pool  # type: ignore[attr-defined]
    return int(pool.nbytes + sum(p.tables.nbytes for p in pool.pages.values()))


@pytest.fixture(scope="module", params=HYBRIDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    common = {"model_type": request.param, "vocab_size": 31, "eos_token_id": 0}
    publish(common | HYBRIDS[request.param], path)
    return path


def spec(folder: Path, **given: Any) -> ModelSpec:
    return ModelSpec(
        path=str(folder), dtype="float32", max_tokens=LONGEST, prefix_cache_mb=0, threads=1, **given
    )


@given(
    megabytes=st.floats(0.05, 0.4),
    kv_tokens=st.sampled_from([None, 48, 112]),
    lengths=st.lists(st.integers(1, LONGEST - 1), min_size=1, max_size=5),
)
@settings(max_examples=3)
def test_admission_never_takes_more_than_the_budget(
    folder: Path, megabytes: float, kv_tokens: int | None, lengths: list[int]
) -> None:
    try:
        engine = build(spec(folder, state_memory_mb=megabytes, kv_tokens=kv_tokens))[0]
    except ServeConfigError:  # not enough for one sequence: see below
        return
    assert held(engine) <= 1e6 * megabytes
    pages = engine.runner.pool.pages[0]  # type: ignore[attr-defined]
    assert engine.scheduler.budget.capacity == kv_tokens or kv_tokens is None
    submitted = 0
    for i, length in enumerate(lengths):
        try:
            params = SamplingParams(temperature=0, max_tokens=LONGEST - length, ignore_eos=True)
            engine.submit(Request(str(i), [1 + i] * length, params))
            submitted += 1
        except OverloadedError:
            continue
    finished = 0
    while engine.busy:
        finished += sum(out.usage is not None for out in engine.step())
        assert len(engine.scheduler.running) <= engine.scheduler.slots.capacity
        assert pages.available >= 0
    assert finished == submitted > 0
    assert pages.available == pages.count  # all given back


def test_more_memory_means_more_sequences_and_never_too_many(folder: Path) -> None:
    slots = []
    for megabytes in (0.1, 0.2, 0.4):
        engine = build(spec(folder, state_memory_mb=megabytes))[0]
        capacity = engine.scheduler.slots.capacity
        slots.append(capacity)
        each = (held(engine) / 1e6) / (capacity + 1)
        assert megabytes - held(engine) / 1e6 < 2 * each + 0.02  # and hardly less than there is room for
    assert slots == sorted(slots) and slots[0] < slots[-1]


def test_too_little_memory_says_what_one_sequence_takes(folder: Path) -> None:
    with pytest.raises(ServeConfigError, match=rf"state_memory_mb = 0\.001.*{LONGEST} tokens.*a token"):
        build(spec(folder, state_memory_mb=0.001))
