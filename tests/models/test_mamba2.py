"""Mamba-2 in flash-linear-attention's format with groups of heads, against transformers' torch path.

Both libraries give their tensors the same names. Head h takes B and C of group h // (heads / n_groups) in transformers,
and in flash-linear-attention's kernels and single step, as here; in its whole pass on a CPU it is h % n_groups.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fla")
pytest.importorskip("transformers")

import fla.models as fla
import torch
import transformers
from torch import Tensor

from tests.models.reference import assert_equal, randomise, save
from tests.models.test_transformers import plain_torch

SIZES: dict[str, dict[str, Any]] = {
    "two groups": {"head_dim": 5, "n_groups": 2, "state_size": 3, "hidden_size": 30, "chunk_size": 16},
    "a group for each head": {
        "head_dim": 9, "n_groups": 4, "state_size": 7, "hidden_size": 18, "conv_kernel": 2, "use_conv_bias": False,
        "use_bias": True, "chunk_size": 32,
    },
    "tied, narrow heads": {
        "head_dim": 2, "n_groups": 6, "state_size": 1, "expand": 3, "hidden_size": 20, "conv_kernel": 5,
        "tie_word_embeddings": True, "chunk_size": 8,
    },
    "limited steps": {
        "head_dim": 3, "n_groups": 3, "state_size": 16, "hidden_size": 36, "dt_limit": (0.2, 0.7), "norm_eps": 1e-2,
        "residual_in_fp32": False, "chunk_size": 64,
    },
}  # fmt: skip
TRANSFORMERS = {"norm_eps": "layer_norm_epsilon", "dt_limit": "time_step_limit"}
"""Keys of the one format that the other spells in another way."""


@pytest.mark.parametrize("case", SIZES)
def test_groups_of_heads(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 71, "num_hidden_layers": 2, "expand": 2, "norm_eps": 1e-5, **SIZES[case]}
    torch.manual_seed(0)
    theirs = fla.Mamba2ForCausalLM(fla.Mamba2Config(**sizes))
    randomise(theirs)
    save(theirs, tmp_path)

    plain_torch(transformers.Mamba2ForCausalLM, monkeypatch)
    sizes["num_heads"] = sizes["hidden_size"] * sizes["expand"] // sizes["head_dim"]
    config = transformers.Mamba2Config(**{TRANSFORMERS.get(key, key): value for key, value in sizes.items()})
    oracle = transformers.Mamba2ForCausalLM(config).eval()
    oracle.load_state_dict(theirs.state_dict())

    def logits(ids: Tensor) -> Tensor:
        return oracle(ids[None], use_cache=False).logits[0]

    assert_equal(tmp_path, logits)
