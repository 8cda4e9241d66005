"""Families in Fathom's own format, against the papers' equations written out in plain torch on the tensors of
a checkpoint, by the names that docs/formats.md gives them."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from models.errors import ConfigError
from models.generic import GenericConfig
from models.registry import FAMILIES, family
from tests.models.reference import assert_equal, publish

Weights = dict[str, Tensor]
Config = dict[str, Any]
TINY: Config = {"vocab_size": 71, "num_hidden_layers": 2, "hidden_size": 24, "eos_token_id": 3}


def torch_cell(w: Weights, c: Config, x: Tensor) -> Tensor:
    kind = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[c["model_type"]]
    options = {"nonlinearity": c["nonlinearity"]} if "nonlinearity" in c else {}
    module = kind(x.shape[1], c.get("cell_size", x.shape[1]), bias=c.get("bias", True), **options)
    module.load_state_dict({f"{name}_l0": w[name] for name in w if name != "out_proj.weight"})
    h = module(x[:, None])[0][:, 0]
    return h @ w["out_proj.weight"].T if "out_proj.weight" in w else h


def head_cell(w: Weights, c: Config, x: Tensor) -> Tensor:
    kind, H = c.get("function", "slstm"), c["num_heads"]
    D = x.shape[1] // H
    letters = {"elman": "h", "gru": "rzn", "lstm": "ifzo", "slstm": "ifzo"}[kind]
    wx = (x @ w["W.weight"].T).view(len(x), len(letters), H, D)
    outs = torch.empty(len(x), H, D)
    for j in range(H):
        h, cell, n, m = torch.zeros(D), torch.zeros(D), torch.zeros(D), torch.full((D,), -torch.inf)
        for t in range(len(x)):

            def gate(letter: str, recurrent: bool = True, t: int = t, j: int = j, h: Tensor = h) -> Tensor:
                inner = w[f"R_{letter}"][j] @ h + w[f"b_{letter}"][j] if recurrent else w[f"b_{letter}"][j]
                return wx[t, letters.index(letter), j] + inner

            if kind == "elman":
                h = torch.tanh(gate("h"))
            elif kind == "gru":
                r, z = gate("r").sigmoid(), gate("z").sigmoid()
                inner = w["R_g"][j] @ h + w["b_g"][j]
                h = z * h + (1 - z) * torch.tanh(gate("n", recurrent=False) + r * inner)
            elif kind == "lstm":
                cell = gate("f").sigmoid() * cell + gate("i").sigmoid() * gate("z").tanh()
                h = gate("o").sigmoid() * cell.tanh()
            else:
                log_f, i, z, o = F.logsigmoid(gate("f")), gate("i"), gate("z").tanh(), gate("o").sigmoid()
                peak = torch.maximum(log_f + m, i)
                forget, write = (log_f + m - peak).exp(), (i - peak).exp()
                cell, n, m = forget * cell + write * z, forget * n + write, peak
                h = o * cell / n
            outs[t, j] = h
    if "group_norm.weight" in w:
        outs = F.layer_norm(outs, (D,), eps=c.get("norm_eps", 1e-6)).flatten(1) * w["group_norm.weight"]
    return outs.flatten(1) @ w["out_proj.weight"].T


def gelu_out(w: Weights, c: Config, y: Tensor) -> Tensor:
    y = F.gelu(y) @ w["output_linear.linear.weight"].T + w["output_linear.linear.bias"]
    return F.glu(y) if c.get("glu", True) else y


def s4d(w: Weights, c: Config, x: Tensor) -> Tensor:
    """By its convolution kernel."""
    A = torch.complex(-w["kernel.log_A_real"].exp(), w["kernel.A_imag"]).to(torch.complex128)
    step = A * w["kernel.log_dt"].exp()[:, None]
    C = torch.view_as_complex(w["kernel.C"]).to(torch.complex128) * (step.exp() - 1) / A
    K = 2 * torch.einsum("hn,hnl->hl", C, (step[..., None] * torch.arange(len(x))).exp()).real
    y = [sum(K[:, s] * x[t - s] for s in range(t + 1)) for t in range(len(x))]
    return gelu_out(w, c, (torch.stack(y) + w["D"] * x).float())


def lru(w: Weights, c: Config, x: Tensor) -> Tensor:
    lam = torch.exp(torch.complex(-w["nu_log"].exp(), w["theta_log"].exp()))
    B = torch.complex(w["B_re"], w["B_im"]) * w["gamma_log"].exp()[:, None]
    C = torch.complex(w["C_re"], w["C_im"])
    h, y = torch.zeros_like(lam), []
    for u in x:
        h = lam * h + B @ u.to(B.dtype)
        y.append((C @ h).real + w["D"] * u)
    return gelu_out(w, c, torch.stack(y))


def aaren(w: Weights, c: Config, x: Tensor) -> Tensor:
    H = c["num_heads"]
    k, v = ((x @ w[f"{n}_proj.weight"].T).view(len(x), H, -1) for n in "kv")
    scores = torch.einsum("thd,hd->ht", k, w["query"]) / math.sqrt(k.shape[-1])
    later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    weights = scores[:, None].expand(-1, len(x), -1).masked_fill(later, -torch.inf).softmax(-1)  # [H, T, T]
    return torch.einsum("hts,shd->thd", weights, v).flatten(1) @ w["out_proj.weight"].T


def srwm(w: Weights, c: Config, x: Tensor) -> Tensor:
    D = x.shape[1] // c["num_heads"]
    outs = []
    for j in range(c["num_heads"]):
        W = {name: w[f"{'w' if name == 'b' else 'W'}_{name}"][j] for name in "yqkb"}  # [in, out]
        for t, token in enumerate(x):
            h = token[j * D : (j + 1) * D]
            h = h.softmax(0) if c.get("use_input_softmax", True) else h
            y, q, k, beta = (h @ W[name] for name in "yqkb")
            q, k, beta = q.softmax(0), k.softmax(0), beta.sigmoid()
            W = {n: W[n] + beta[i] * torch.outer(k, (q - k) @ W[n]) for i, n in enumerate("yqkb")}
            outs.append((t, j, y))
    y = torch.stack([y for *_, y in sorted(outs, key=lambda o: o[:2])]).view(len(x), -1)
    return y @ w["out_linear.weight"].T


def causal(x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """x [T, C], weight [C, 1, W]."""
    padded = F.pad(x.T, ((weight.shape[2] - 1) * dilation, 0))
    return F.conv1d(padded[None], weight, dilation=dilation, groups=len(weight))[0].T


def fsmn(w: Weights, c: Config, x: Tensor) -> Tensor:
    p = x @ w["linear.weight"].T
    return (p + causal(p, w["conv.weight"], c.get("stride", 1))) @ w["out_proj.weight"].T


def multiresconv(w: Weights, c: Config, x: Tensor) -> Tensor:
    y, left = x * w["w"][:, -1], x
    for i in range(c["depth"]):
        y = y + w["w"][:, c["depth"] - i] * causal(left, w["h1"], 2**i)
        left = causal(left, w["h0"], 2**i)
    return gelu_out(w, c, y + w["w"][:, 0] * left)


def rotate(x: Tensor, theta: float) -> Tensor:
    half = x.shape[1] // 2
    turn = torch.polar(torch.ones(()), torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half))
    z = torch.complex(x[:, :half], x[:, half:]) * turn
    return torch.cat([z.real, z.imag], 1)


def tcnca(w: Weights, c: Config, x: Tensor) -> Tensor:
    m = x
    for i in range(c["tcn_layers"]):
        m = F.silu(causal(m, w[f"tcn.{i}.weight"], c.get("dilation", 2) ** i))
    u, z, r, h = (m @ w[f"{n}_proj.weight"].T + w[f"{n}_proj.bias"] for n in "uzrh")
    v = F.silu(x @ w["v_proj.weight"].T + w["v_proj.bias"])
    q, k = (rotate(w["gamma"][i] * F.silu(z) + w["beta"][i], c.get("rope_theta", 1e4)) for i in range(2))
    place = torch.arange(len(x))
    chunk = place // c["chunk_size"]
    seen = (chunk[:, None] == chunk) & (place[:, None] >= place)
    o = (q @ k.T / math.sqrt(c["z_dim"])).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return u.sigmoid() * F.silu(h + (F.silu(r) * o) @ w["out_proj.weight"].T)


def plstm(w: Weights, c: Config, x: Tensor) -> Tensor:
    H = c["num_heads"]
    q, k, v = ((x @ w[f"{n}_proj.weight"].T).view(len(x), H, -1) for n in "qkv")
    gates = {
        n: x @ w[f"{n}_net.weight"].T + w[f"{n}_net.bias"] for n in ("source", "transition", "mark", "direct")
    }
    S, M, D = (gates[n].sigmoid() for n in ("source", "mark", "direct"))
    T = gates["transition"].tanh() if c.get("transition") == "tanh" else gates["transition"].sigmoid()
    C = torch.zeros(H, q.shape[2], v.shape[2])
    outs = []
    for t in range(len(x)):
        write = k[t, :, :, None] * v[t, :, None]
        seen = M[t, :, None, None] * C + D[t, :, None, None] * write
        outs.append(torch.einsum("hk,hkv->hv", q[t] * q.shape[2] ** -0.5, seen))
        C = T[t, :, None, None] * C + S[t, :, None, None] * write
    y = F.layer_norm(torch.stack(outs), (v.shape[2],), eps=c.get("norm_eps", 1e-6)).flatten(1)
    return (y * w["multihead_norm.weight"]) @ w["out_proj.weight"].T


MIXERS: dict[str, Callable[[Weights, Config, Tensor], Tensor]] = {
    "elman": torch_cell, "gru": torch_cell, "lstm": torch_cell, "flashrnn": head_cell, "slstm": head_cell,
    "s4d": s4d, "lru": lru, "aaren": aaren, "srwm": srwm, "fsmn": fsmn, "multiresconv": multiresconv,
    "tcnca": tcnca, "plstm": plstm,
}  # fmt: skip

CASES: dict[str, Config] = {
    "elman": {},
    "elman-relu": {"nonlinearity": "relu", "cell_size": 17, "bias": False},
    "gru": {"norm": "layernorm", "norm_eps": 1e-3},
    "gru-small": {"cell_size": 10, "bias": False, "tie_word_embeddings": True},
    "lstm": {"intermediate_size": 34},
    "lstm-large": {"cell_size": 33, "bias": False},
    "flashrnn-elman": {"function": "elman", "num_heads": 3},
    "flashrnn-gru": {"function": "gru", "num_heads": 4, "group_norm": True},
    "flashrnn-lstm": {"function": "lstm", "num_heads": 1, "hidden_size": 15},
    "flashrnn-slstm": {"function": "slstm", "num_heads": 2, "intermediate_size": 10, "hidden_act": "relu"},
    "slstm": {"num_heads": 3, "norm_eps": 1e-2, "tie_word_embeddings": True},
    "s4d": {"state_size": 6},
    "s4d-plain": {"state_size": 2, "glu": False, "intermediate_size": 17},
    "lru": {"state_size": 13},
    "lru-plain": {"glu": False, "tie_word_embeddings": True},
    "aaren": {"num_heads": 3},
    "aaren-one": {"num_heads": 1, "intermediate_size": 10, "norm": "layernorm"},
    "srwm": {"num_heads": 3},
    "srwm-raw": {"num_heads": 4, "use_input_softmax": False},
    "fsmn": {"order": 3, "memory_size": 17},
    "fsmn-strided": {"order": 4, "stride": 5, "tie_word_embeddings": True},
    "multiresconv": {"depth": 4, "kernel_size": 2},
    "multiresconv-wide": {"depth": 3, "kernel_size": 4, "glu": False},
    "tcnca": {"chunk_size": 7, "tcn_layers": 3, "kernel_size": 2, "z_dim": 6},
    "tcnca-wide": {"chunk_size": 64, "tcn_layers": 1, "kernel_size": 3, "z_dim": 4, "v_dim": 9,
                   "rope_theta": 9.0},
    "plstm": {"num_heads": 3, "qk_dim": 15},
    "plstm-signed": {"num_heads": 4, "transition": "tanh", "intermediate_size": 17},
}  # fmt: skip


def logits_of(w: Weights, c: Config, ids: Tensor) -> Tensor:
    """The frame of blocks around the mixer."""

    def norm(x: Tensor, name: str) -> Tensor:
        eps = c.get("norm_eps", 1e-6)
        if c.get("norm") == "layernorm":
            return F.layer_norm(x, x.shape[1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    x = w["embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        prefix = f"layers.{i}.mixer."
        mine = {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
        x = x + MIXERS[c["model_type"]](mine, c, norm(x, f"layers.{i}.norm"))
        if "intermediate_size" in c:
            h = norm(x, f"layers.{i}.mlp_norm")
            gate, up = (h @ w[f"layers.{i}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            act = {"silu": F.silu, "relu": F.relu}[c.get("hidden_act", "silu")]
            x = x + (act(gate) * up) @ w[f"layers.{i}.mlp.down_proj.weight"].T
    return norm(x, "norm") @ w["embeddings.weight" if c.get("tie_word_embeddings") else "lm_head.weight"].T


@pytest.mark.parametrize("case", CASES)
def test_equals_the_equations(case: str, tmp_path: Path) -> None:
    config = {"model_type": case.split("-")[0], **TINY, **CASES[case]}
    publish(config, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert_equal(tmp_path, lambda ids: logits_of(weights, config, ids))


def test_a_key_of_no_meaning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: num_head = 4: is no key of this format"):
        family({"model_type": "aaren"}, "x").build(
            {"model_type": "aaren", **TINY, "num_head": 4}, "config.json"
        )


def test_every_family_has_a_case() -> None:
    own = {name for name, module in FAMILIES.items() if issubclass(config_of(module), GenericConfig)}
    assert own == {case.split("-")[0] for case in CASES}


def config_of(module: str) -> type:
    return getattr(importlib.import_module(module), "Config", object)
