"""A small configuration of every family."""

from typing import Any

Raw = dict[str, Any]

FRAME: Raw = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "eos_token_id": 3}
_MLP: Raw = {"intermediate_size": 20}

SMALL: dict[str, Raw] = {
    name: {"model_type": name, **FRAME, **keys}
    for name, keys in {
        # flash-linear-attention
        "delta_net": {"num_heads": 3, "allow_neg_eigval": True, **_MLP},
        "gated_deltanet": {"num_heads": 3, "head_dim": 6, **_MLP},
        "gla": {"num_heads": 3, "use_short_conv": True, **_MLP},
        "gsa": {"num_heads": 3, "num_slots": 5, **_MLP},
        "hgrn": _MLP,
        "hgrn2": {"expand_ratio": 6, **_MLP},
        "kda": {"num_heads": 3, "head_dim": 6, **_MLP},
        "linear_attn": {"num_heads": 3, "norm_feature_map": True, "feature_map": "hedgehog", **_MLP},
        "retnet": {"num_heads": 3, **_MLP},
        "rwkv6": {"num_heads": 3, "proj_low_rank_dim": 3, "gate_low_rank_dim": 4, **_MLP},
        "rwkv7": {"head_dim": 6, "decay_low_rank_dim": 3, "gate_low_rank_dim": 3, "a_low_rank_dim": 2,
                  "v_low_rank_dim": 2, **_MLP},
        "samba": {"state_size": 3, "attn": {"layers": [1], "num_heads": 3, "window_size": 4}, **_MLP},
        "transformer": {"num_heads": 3, "num_kv_heads": 1, **_MLP},
        # transformers
        "falcon_mamba": {"state_size": 3, "layer_norm_epsilon": 1e-5},
        "mamba": {"state_size": 3, "layer_norm_epsilon": 1e-5},
        "mamba2": {"head_dim": 6, "num_heads": 8, "state_size": 5, "n_groups": 2, "layer_norm_epsilon": 1e-5},
        "olmo_hybrid": {"num_attention_heads": 3, "num_key_value_heads": 1, **_MLP},
        "qwen3_next": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 0,
                       "linear_key_head_dim": 4, "linear_value_head_dim": 6, "linear_num_key_heads": 2,
                       "linear_num_value_heads": 4, "full_attention_interval": 2, **_MLP},
        "recurrent_gemma": {"num_attention_heads": 3, "attention_window_size": 5, "num_hidden_layers": 3,
                            **_MLP},
        "rwkv": {},
        "xlstm": {"num_heads": 3, "num_hidden_layers": 2},
        # our own
        "aaren": {"num_heads": 3},
        "elman": {},
        "flashrnn": {"function": "gru", "num_heads": 3},
        "fsmn": {"order": 3, "stride": 2},
        "gru": {},
        "lru": {"state_size": 9},
        "lstm": _MLP,
        "multiresconv": {"depth": 3},
        "plstm": {"num_heads": 3},
        "s4d": {"state_size": 6},
        "slstm": {"num_heads": 3},
        "srwm": {"num_heads": 3},
        "tcnca": {"chunk_size": 8, "tcn_layers": 2, "z_dim": 6},
    }.items()
}  # fmt: skip
