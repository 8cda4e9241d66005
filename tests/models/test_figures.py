"""The figures that `fathom inspect` gives, against counts that nobody here made: what files hold, torch's own count of
operations in the libraries' models, memory as it is allocated, and published shapes worked out by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from models.inspection import inspect
from models.registry import build
from models.state import StatePool
from tests.models.reference import publish
from tests.models.small import SMALL

BUDGET = 200_000  # bytes


@pytest.mark.parametrize("name", SMALL)
def test_what_a_file_holds_and_memory_takes(name: str, tmp_path: Path) -> None:
    publish({**SMALL[name], "max_position_embeddings": 40}, tmp_path)
    report = inspect(tmp_path, BUDGET)
    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert report.parameters == sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118

    layout = build(SMALL[name], "x")[1].layout()

    def allocated(slots: int) -> int:
        pool = StatePool(layout, slots, tokens=48 * slots, longest=40)  # whole pages of 16
        held = {leaf.untyped_storage().data_ptr(): leaf for layer in pool.layers for leaf in layer.values()}
        return sum(leaf.untyped_storage().nbytes() for leaf in held.values())

    assert report.slots is not None and report.slots > 0
    assert allocated(report.slots) <= BUDGET < allocated(report.slots + 1)


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # family -> shape, floats of state in one layer
    "mamba": ({"hidden_size": 768}, 1536 * 16 + 1536 * 3),  # the state, and what the convolution remembers
    "mamba2": ({"hidden_size": 768, "num_heads": 24, "n_groups": 1}, 24 * 64 * 128 + (1536 + 2 * 128) * 3),
    "rwkv": ({"hidden_size": 768}, 5 * 768),  # as its library keeps it
    "gla": ({"hidden_size": 2048}, 4 * 256 * 512),
    "retnet": ({"hidden_size": 2048}, 8 * 256 * 512),
    "delta_net": ({"hidden_size": 2048}, 16 * 128 * 128 + 3 * 2048 * 3),
    "gated_deltanet": ({"hidden_size": 2048}, 6 * 256 * 512 + (2 * 1536 + 3072) * 3),
    "hgrn": ({"hidden_size": 2048}, 2048),
    "hgrn2": ({"hidden_size": 2048}, 16 * 128 * 128),
    "gsa": ({"hidden_size": 2048}, 2 * 4 * 512 * 64),
    "rwkv6": ({"hidden_size": 2048}, 4 * 256 * 512 + 2 * 2048),
    "rwkv7": ({"hidden_size": 2048}, 32 * 64 * 64 + 2 * 2048),
    "xlstm": (
        {"hidden_size": 4096},
        8 * (256 * 512 + 256 + 16),
    ),  # C, n and m; one number takes a line of sixteen
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_state_of_published_shapes(name: str) -> None:
    shape, floats = PUBLISHED[name]
    raw = {"model_type": name, "vocab_size": 1000, "num_hidden_layers": 3, **shape}
    layout = build(raw, "x")[1].layout()
    assert layout.bytes_per_slot == pytest.approx(3 * 4 * floats, rel=0.001)


def multiplications(model: Any) -> int:
    """Operations of matrix products, as torch counts them, for a text of one token."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.tensor([[1]]), use_cache=False)
    return counter.get_total_flops()


COUNTED = [
    "gla", "gla-grouped", "retnet-grouped", "linear_attn", "delta_net-negative", "gated_deltanet-grouped",
    "kda-bounded", "gla-hybrid",
    "samba-attn", "gsa", "gsa-grouped", "hgrn-conv", "hgrn2-conv", "transformer", "rwkv6-tied", "rwkv7-wide",
]  # fmt: skip


@pytest.mark.parametrize("case", COUNTED)
def test_operations_of_the_projections(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the recurrence itself, which the library's plain functions do in their own way."""
    pytest.importorskip("fla")
    from fla.layers.rwkv7 import RWKV7Attention

    from tests.models.test_fla import CASES
    from tests.models.test_fla import build as theirs

    monkeypatch.setattr(RWKV7Attention, "_initialize_weights", lambda self, module: None)
    model = theirs(case, **CASES[case])
    ours = build(model.config.to_dict(), "x")[1]
    recurrences = sum(block.flops() for block in ours.blocks)
    assert ours.flops() - recurrences == pytest.approx(multiplications(model), rel=0.04)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["t2r", "elementwise_product"])
def test_operations_of_feature_maps(kind: str, tied: bool) -> None:
    """What a map with weights takes beyond one without: each head of a token goes through it."""
    pytest.importorskip("fla")
    from tests.models.test_fla import build as theirs

    def both(feature_map: str) -> tuple[float, int]:
        keys = {"num_heads": 6, "hidden_size": 96, "tie_feature_map_qk": tied}
        model = theirs("linear_attn", feature_map=feature_map, **keys)
        return build(model.config.to_dict(), "x")[1].flops(), multiplications(model)

    (ours, counted), (ours_without, counted_without) = both(kind), both("relu")
    assert ours - ours_without == pytest.approx(counted - counted_without, rel=0.07)
