"""Families in transformers' formats, against that library's own torch code.

Its caches are left out of the comparison: the whole sequence in one pass, which is where its code is
simplest.
"""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from torch import Tensor

from tests.models.reference import assert_config_is_covered, assert_equal, randomise, save

TINY: dict[str, Any] = {"vocab_size": 71, "num_hidden_layers": 2, "hidden_size": 30, "eos_token_id": 3}

CASES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 5, "tie_word_embeddings": False},
    "mamba-tied": {"state_size": 3, "intermediate_size": 34, "conv_kernel": 2, "time_step_rank": 4,
                   "use_bias": True, "use_conv_bias": False, "layer_norm_epsilon": 1e-2,
                   "residual_in_fp32": False},
    "falcon_mamba": {"state_size": 7, "mixer_rms_eps": 1e-3, "time_step_rank": 3},
    "rwkv": {"rescale_every": 2, "num_hidden_layers": 5, "layer_norm_epsilon": 1e-3},
    "rwkv-tied": {"attention_hidden_size": 42, "intermediate_size": 17, "tie_word_embeddings": True,
                  "rescale_every": 0},
    "mamba2": {"head_dim": 5, "num_heads": 12, "state_size": 7, "n_groups": 3, "chunk_size": 16},
    "mamba2-tied": {"head_dim": 6, "num_heads": 5, "expand": 1, "state_size": 3, "n_groups": 1,
                    "conv_kernel": 3, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True,
                    "chunk_size": 32,
                    "time_step_limit": (0.5, 0.9), "layer_norm_epsilon": 1e-3, "residual_in_fp32": False},
    "xlstm": {"num_heads": 5, "autocast_kernel_dtype": "float32", "ffn_round_up_to_multiple_of": 7},
    "xlstm-fused": {"num_heads": 3, "autocast_kernel_dtype": "float32", "weight_mode": "fused",
                    "use_bias": True, "qk_dim_factor": 0.7, "v_dim_factor": 1.3, "gate_soft_cap": 2.0,
                    "output_logit_soft_cap": 1.5, "ffn_proj_factor": 1.1, "norm_eps": 1e-3, "eps": 1e-2},
}  # fmt: skip


# By class: other libraries register classes of their own under some of the same names.
CLASSES = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
    "rwkv": (transformers.RwkvConfig, transformers.RwkvForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
    "xlstm": (transformers.xLSTMConfig, transformers.xLSTMForCausalLM),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_library(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config, causal_lm = CLASSES[case.split("-")[0]]
    if case == "xlstm-fused":  # the library's own start fails there
        monkeypatch.setattr(causal_lm.__base__, "_init_weights", lambda self, module: None)
    model = causal_lm(config(**{**TINY, **CASES[case]}))
    randomise(model)
    save(model, tmp_path)

    def logits(ids: Tensor) -> Tensor:
        return model(ids[None], use_cache=False).logits[0]

    assert_equal(tmp_path, logits)


MAMBA = frozenset({"intermediate_size", "time_step_rank"})
DERIVED = {
    "mamba2": frozenset({"num_heads"}),
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "rwkv": frozenset({"attention_hidden_size", "intermediate_size"}),
    "xlstm": frozenset({"embedding_dim", "num_blocks"}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_is_read_or_known_to_be_inert(name: str) -> None:
    assert_config_is_covered(CLASSES[name][0](), derived=DERIVED.get(name, frozenset()))
