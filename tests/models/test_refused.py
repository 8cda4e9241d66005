"""What no family here computes is refused, naming the file, the key, its value and what it may be."""

from typing import Any

import pytest

from models.checkpoint import alternatives
from models.errors import ConfigError
from models.registry import FAMILIES, build, family

FRAME: dict[str, Any] = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gla", {"use_gv": True}, "use_gv = True"),
    ("gla", {"attnres_block_size": 2}, "attnres_block_size = 2"),
    ("gla", {"hidden_act": "powlu"}, "hidden_act = 'powlu': must be one of silu, swish"),
    ("gla", {"feature_map": "elu"}, "feature_map = 'elu': must be one of gelu"),
    ("gla", {"expand_k": 0.4}, "hidden_size * expand_k = 4.8 must be a multiple of num_heads = 4"),
    ("gla", {"num_heads": 6, "num_kv_heads": 4}, "num_heads = 6 must be a multiple of num_kv_heads = 4"),
    ("gla", {"hidden_size": None}, "hidden_size = None"),
    ("gla", {"attn": {"layers": [0, 0], "num_heads": 2}}, "attn.layers = [0, 0]"),
    (
        "gla",
        {"attn": {"layers": [2], "num_heads": 2}},
        "attn.layers = [2]: each of the 2 layers at most once",
    ),
    ("gla", {"attn": {"layers": [1], "num_heads": 4}}, "attn: num_heads = 4"),
    ("gla", {"attn": {"layers": [1], "num_heads": 2, "qk_norm": True}}, "qk_norm = True"),
    ("linear_attn", {"feature_map": "taylor"}, "feature_map = 'taylor'"),
    ("retnet", {"num_heads": 4}, "heads of 3 key channels: must be even"),
    ("gsa", {"exapnd_v": 2}, "expand_v = 2: must be 1"),
    ("hgrn2", {"expand_ratio": 5}, "hidden_size = 12 must be a multiple of expand_ratio = 5"),
    ("kda", {"safe_gate": True}, "safe_gate needs a lower_bound from -5, got None"),
    ("gated_deltanet", {"num_v_heads": 7}, "num_v_heads = 7 must be a multiple of num_heads = 6"),
    ("rwkv7", {"attn": {"layers": [1], "num_heads": 2}, "head_dim": 4}, "attn = "),
    ("rwkv7", {"head_dim": 4, "value_dim": [12, 24]}, "value_dim = [12, 24]"),
    ("mamba", {"hidden_act": "snake"}, "hidden_act = 'snake': must be one of gelu, "),
    ("mamba", {"hidden_act": "gelu", "norm_eps": 1e-5}, "hidden_act = 'gelu'"),  # flash-linear-attention's
    ("mamba", {"time_step_rank": 0}, "time_step_rank"),
    ("mamba2", {"num_heads": 5, "head_dim": 4}, "must be num_heads * head_dim = 5 * 4"),
    ("xlstm", {"embedding_dim": 8}, "embedding_dim = 8 must be hidden_size = 12"),
    ("recurrent_gemma", {"block_types": ["recurrent", "conv"]}, "block_types.1 = 'conv'"),
    ("recurrent_gemma", {"num_attention_heads": 6, "rope_scaling": {"type": "yarn"}}, "rope_type = 'yarn'"),
    (
        "qwen3_next",
        {"num_experts": 8, "mlp_only_layers": [0]},
        "num_experts = 8: must be 0, or every layer in ",
    ),
    ("qwen3_next", {}, "layer 0 is a mixture of experts, which is not supported"),
    ("qwen3_next", {"num_experts": 0, "layer_types": ["linear_attention"]}, "layer_types has 1 entries"),
    ("olmo_hybrid", {"num_attention_heads": 4, "layer_types": ["sliding"]}, "layer_types.0 = 'sliding'"),
    ("flashrnn", {}, "function = None: a flashrnn has one"),
    ("slstm", {"function": "gru"}, "function = 'gru'"),
    ("gru", {"nonlinearity": "relu"}, "nonlinearity = 'relu': only elman has a choice"),
    ("s4d", {"state_size": 5}, "state_size = 5: must be even"),
    ("aaren", {"num_heads": 5}, "hidden_size = 12 must be a multiple of num_heads = 5"),
    ("plstm", {"transitions": "tanh"}, "transitions = 'tanh': is no key of this format"),
    ("gla", {"vocab_size": "31", "num_heads": 2}, "vocab_size = '31': must be a number"),
    ("gla", {"num_heads": 2, "num_hidden_layers": True}, "num_hidden_layers = True: must be a number"),
    ("gla", {"num_heads": 2, "use_output_gate": 0}, "use_output_gate = 0: must be true or false"),
    ("gla", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: "),
    ("gla", {"norm_eps": -1}, "norm_eps = -1: "),
    ("gla", {"norm_eps": float("nan")}, "norm_eps = nan: "),
    ("gla", {"expand_k": float("inf")}, "expand_k = inf: "),
    ("gla", {"num_heads": 2, "vocab_size": 10**30}, "describes no model that can be built"),
    ("rwkv7", {"head_dim": 4, "value_dim": []}, "value_dim = []"),
    ("recurrent_gemma", {"num_attention_heads": 3, "rope_parameters": 7}, "rope_parameters = 7"),
    ("mamba", {"layer_norm_epsilon": -1e-5}, "layer_norm_epsilon = -1e-05"),
    ("bert", {}, "model_type = 'bert': must be one of "),
]


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    REFUSED,
    ids=[f"{model}-{'-'.join(keys)}" for model, keys, _ in REFUSED],
)
def test_refused(model_type: str, keys: dict[str, Any], message: str) -> None:
    raw = {"model_type": model_type, **FRAME, **keys}
    with pytest.raises(ConfigError) as caught:
        build(raw, "here/config.json")
    assert str(caught.value).startswith("here/config.json: ")
    assert message in str(caught.value)


def test_every_problem_is_found() -> None:
    raw = {"model_type": "gla", **FRAME, "use_gv": True, "hidden_act": "powlu", "vocab_size": 0}
    fields = {problem.field for problem in family(raw, "x").Config.problems(raw, "x")}
    assert fields == {"use_gv", "hidden_act", "vocab_size"}


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_nothing_at_all_is_refused(model_type: str) -> None:
    """Whatever a config.json lacks, the error is one that a person can read."""
    with pytest.raises(ConfigError):
        family({"model_type": model_type}, "x").build({"model_type": model_type}, "x")


def test_names_with_alternatives() -> None:
    assert alternatives("a.b.w") == [["a.b.w"]]
    assert alternatives("a|b.w") == [["a.w"], ["b.w"]]
    assert alternatives("q+k.w") == [["q.w", "k.w"]]
    assert alternatives("x.a|b.q+k.w") == [["x.a.q.w", "x.a.k.w"], ["x.b.q.w", "x.b.k.w"]]
