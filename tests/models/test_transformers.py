"""Families in transformers' formats, against that library's own torch code.

Its caches are left out of the comparison: the whole sequence in one pass, which is where its code is
simplest.
"""

import inspect
import sys
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
    "mamba-gelu": {"state_size": 3, "hidden_act": "gelu", "conv_kernel": 1},
    "falcon_mamba": {"state_size": 7, "mixer_rms_eps": 1e-3, "time_step_rank": 3},
    "recurrent_gemma": {"num_attention_heads": 3, "num_key_value_heads": 1, "lru_width": 36,
                        "hidden_size": 24, "attention_window_size": 6, "intermediate_size": 34,
                        "num_hidden_layers": 4,
                        "logits_soft_cap": 3.0},
    "recurrent_gemma-plain": {"num_attention_heads": 5, "block_types": ["attention", "recurrent"],
                              "conv1d_width": 2, "attention_bias": True, "hidden_size": 40,
                              "attention_window_size": 100, "intermediate_size": 20, "rms_norm_eps": 1e-3,
                              "hidden_activation": "silu", "tie_word_embeddings": False,
                              "rope_parameters": {"rope_type": "default", "rope_theta": 50.0,
                                                  "partial_rotary_factor": 1.0}},
    "olmo_hybrid": {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24,
                    "intermediate_size": 34, "pad_token_id": None, "rope_parameters": None,
                    "hidden_act": "gelu"},
    "olmo_hybrid-rope": {"num_attention_heads": 5, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
                         "linear_key_head_dim": 5, "linear_value_head_dim": 3, "linear_conv_kernel_dim": 3,
                         "linear_allow_neg_eigval": False, "attention_bias": True, "intermediate_size": 20,
                         "layer_types": ["full_attention", "linear_attention", "full_attention"],
                         "num_hidden_layers": 3, "tie_word_embeddings": True, "pad_token_id": None,
                         "rope_parameters": {"rope_type": "default", "rope_theta": 30.0}},
    "qwen3_next": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
                   "linear_key_head_dim": 5, "linear_value_head_dim": 7, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 6,
                   "num_experts": 0, "intermediate_size": 34, "num_hidden_layers": 4},
    "qwen3_next-bias": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10, "num_experts": 0,
                        "linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 3,
                        "linear_num_value_heads": 3, "intermediate_size": 20, "attention_bias": True,
                        "layer_types": ["full_attention", "linear_attention"], "tie_word_embeddings": True,
                        "linear_conv_kernel_dim": 2, "rms_norm_eps": 1e-3,
                        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0,
                                            "partial_rotary_factor": 0.6}},
    "qwen3_next-dense": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 4,
                         "linear_key_head_dim": 3, "linear_value_head_dim": 5, "linear_num_key_heads": 1,
                         "linear_num_value_heads": 2, "intermediate_size": 20, "hidden_act": "relu",
                         "full_attention_interval": 2, "mlp_only_layers": [0], "decoder_sparse_step": 3},
    "rwkv": {"rescale_every": 2, "num_hidden_layers": 5, "layer_norm_epsilon": 1e-3},
    "rwkv-tied": {"attention_hidden_size": 42, "intermediate_size": 17, "tie_word_embeddings": True,
                  "rescale_every": -1},
    "mamba2": {"head_dim": 5, "num_heads": 12, "state_size": 7, "n_groups": 3, "chunk_size": 16,
               "hidden_act": "tanh"},
    "mamba2-tied": {"head_dim": 6, "num_heads": 5, "expand": 1, "state_size": 3, "n_groups": 1,
                    "conv_kernel": 3, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True,
                    "chunk_size": 32,
                    "time_step_limit": (0.5, 0.9), "layer_norm_epsilon": 1e-3, "residual_in_fp32": False},
    "xlstm": {"num_heads": 5, "autocast_kernel_dtype": "float32", "ffn_round_up_to_multiple_of": 7},
    "xlstm-tied": {"num_heads": 3, "autocast_kernel_dtype": "float32", "tie_word_embeddings": True,
                   "add_out_norm": False},
    "xlstm-fused": {"num_heads": 3, "autocast_kernel_dtype": "float32", "weight_mode": "fused",
                    "use_bias": True, "qk_dim_factor": 0.7, "v_dim_factor": 1.3, "gate_soft_cap": 2.0,
                    "output_logit_soft_cap": 1.5, "ffn_proj_factor": 1.1, "norm_eps": 1e-3, "eps": 1e-2},
}  # fmt: skip


# By class: other libraries register classes of their own under some of the same names.
CLASSES = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM),
    "recurrent_gemma": (transformers.RecurrentGemmaConfig, transformers.RecurrentGemmaForCausalLM),
    "olmo_hybrid": (transformers.OlmoHybridConfig, transformers.OlmoHybridForCausalLM),
    "qwen3_next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
    "rwkv": (transformers.RwkvConfig, transformers.RwkvForCausalLM),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM),
    "xlstm": (transformers.xLSTMConfig, transformers.xLSTMForCausalLM),
}


def plain_torch(causal_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library finds flash-linear-attention it calls that, on a CPU too, where it cannot run."""
    module = sys.modules[causal_lm.__module__]
    for name, function in list(vars(module).items()):
        own = inspect.unwrap(function) if inspect.isfunction(function) else function
        if own is not function and own.__module__ == module.__name__:
            monkeypatch.setattr(module, name, own)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_library(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config, causal_lm = CLASSES[case.split("-")[0]]
    plain_torch(causal_lm, monkeypatch)
    if case in ("xlstm-fused", "xlstm-tied"):  # the library's own start fails there
        monkeypatch.setattr(causal_lm.__base__, "_init_weights", lambda self, module: None)
    model = causal_lm(config(**{**TINY, **CASES[case]}))
    randomise(model)
    save(model, tmp_path)

    def logits(ids: Tensor) -> Tensor:
        return model(ids[None], use_cache=False).logits[0]

    assert_equal(tmp_path, logits)


MAMBA = frozenset({"intermediate_size", "time_step_rank"})
ATTENTION = frozenset({"layer_types", "num_key_value_heads", "rope_parameters"})
DERIVED = {
    "olmo_hybrid": ATTENTION
    | {"linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"},
    "qwen3_next": ATTENTION | {"mlp_only_layers"},
    "recurrent_gemma": ATTENTION | {"head_dim", "lru_width"},
    "mamba2": frozenset({"num_heads"}),
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "rwkv": frozenset({"attention_hidden_size", "intermediate_size"}),
    "xlstm": frozenset({"embedding_dim", "num_blocks"}),
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_is_read_or_known_to_be_inert(name: str) -> None:
    assert_config_is_covered(CLASSES[name][0](), derived=DERIVED.get(name, frozenset()))
