"""flash-linear-attention's models on a CPU: its own configurations, blocks and layers, with plain torch in
place of every Triton kernel. What its `naive.py` files have is taken from there.

Importing this module rebinds those functions in every module of the library that holds one. Where there is a GPU, the
library runs as it is.
"""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import fla.layers.attn
    import fla.models
    from fla.modules import activations, norm, rotary, token_shift
    from fla.modules import causal_conv1d as convolution
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.gate import naive_gdn_gate
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.gsa.naive import naive_recurrent_gsa
    from fla.ops.hgrn.naive import naive_recurrent_hgrn
    from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.retention.naive import naive_retention
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
    from fla.ops.rwkv7 import fused_addcmul, fused_k_update, gate_output_correction


def rebind(module: Any, name: str, ours: Callable[..., Any]) -> None:
    """Put `ours` in place of a function, wherever the library has imported it, unless there is a GPU to run theirs."""
    if torch.cuda.is_available():
        return
    theirs = getattr(module, name)
    for holder in [m for n, m in sys.modules.items() if n.startswith("fla.") and m is not None]:
        for key, value in list(vars(holder).items()):
            if value is theirs:
                setattr(holder, key, ours)
            elif key == "ACT2FN" and isinstance(value, dict):
                value.update({k: ours for k, v in value.items() if v is theirs})


def layer_norm(
    x: Tensor, weight: Any, bias: Any, residual: Any = None, eps: float = 1e-5, prenorm: bool = False,
    residual_in_fp32: bool = False, is_rms_norm: bool = False, num_groups: int = 1,
) -> Any:  # fmt: skip
    x = x if residual is None else x + residual
    grouped = x.unflatten(-1, (num_groups, -1))
    if not is_rms_norm:
        grouped = grouped - grouped.mean(-1, keepdim=True)
    y = (grouped * (grouped.square().mean(-1, keepdim=True) + eps).rsqrt()).flatten(-2)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return (y, x) if prenorm else y


def rms_norm(*args: Any, **kwargs: Any) -> Any:
    return layer_norm(*args, **kwargs, is_rms_norm=True)


def rms_norm_linear(
    x: Tensor, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any, eps: float = 1e-5
) -> Tensor:
    return F.linear(layer_norm(x, norm_weight, norm_bias, eps=eps, is_rms_norm=True), weight, bias)


def rms_norm_gated(
    x: Tensor, g: Tensor, weight: Any, bias: Any, activation: str = "swish", eps: float = 1e-6, **_: Any
) -> Tensor:
    gate = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}[activation]
    return layer_norm(x, weight, bias, eps=eps, is_rms_norm=True) * gate(g)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, **_: Any
) -> tuple[Tensor, None]:
    """x [B, T, D], weight [D, W]."""
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    y = F.conv1d(padded, weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    return (y if activation is None else F.silu(y)), None


def short_convolution(self: Any, x: Tensor, **_: Any) -> tuple[Tensor, None]:
    return causal_conv1d(x, self.weight[:, 0], self.bias, self.activation)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, **_: Any) -> Tensor:
    assert not interleaved
    length, half = x.shape[1], cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:length, None], sin[:length, None]
    return torch.cat([a * c - b * s, a * s + b * c, rest], -1)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    assert causal
    place = torch.arange(q.shape[1], device=q.device)
    seen = place[:, None] >= place
    if window_size[0] >= 0:
        seen &= place[:, None] - place <= window_size[0]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def alone(f: Callable[..., Any], *names: str, **renamed: str) -> Callable[..., Any]:
    """A naive function that takes only some of what its kernel takes; it returns (result, no state)."""

    def call(**kwargs: Any) -> tuple[Tensor, None]:
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        given |= {ours: kwargs[theirs] for ours, theirs in renamed.items() if kwargs.get(theirs) is not None}
        out = f(**given)
        return (out[0] if isinstance(out, tuple) else out), None

    return call


def transposed(f: Callable[..., Any]) -> Callable[..., Any]:
    """For naive functions that want heads before tokens."""

    def call(**kwargs: Any) -> Any:
        out = f(
            **{
                k: v.transpose(1, 2) if isinstance(v, Tensor) and v.dim() > 2 else v
                for k, v in kwargs.items()
            }
        )
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


def delta_rule(*, use_qk_l2norm_in_kernel: bool, **given: Any) -> tuple[Tensor, None]:
    if use_qk_l2norm_in_kernel:
        given |= {"q": l2norm(given["q"]), "k": l2norm(given["k"])}
    return alone(transposed(delta_rule_recurrence), "q", "k", "v", "beta")(**given)


def gated(rule: Callable[..., Any], gate: Callable[..., Tensor], **given: Any) -> tuple[Tensor, None]:
    """A gated delta rule whose kernel takes everything before its activation."""
    assert all(given[f"use_{what}_in_kernel"] for what in ("qk_l2norm", "beta_sigmoid", "gate"))
    options = {} if given.get("lower_bound") is None else {"lower_bound": given["lower_bound"]}
    beta = given["beta"].sigmoid() * (2 if given["allow_neg_eigval"] else 1)
    g = gate(given["g"], given["A_log"], given["dt_bias"], **options)
    q, k, v = l2norm(given["q"]), l2norm(given["k"]), given["v"]
    group = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    return rule(q=q, k=k, v=v, g=g, beta=beta)[0], None


def kda_gate(*args: Any, **options: Any) -> Tensor:
    return (naive_kda_lowerbound_gate if options else naive_kda_gate)(*args, **options)


def rwkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, None]:
    rest = (y.transpose(1, 2) for y in (r, k, v, a, b, w))
    o = dplr_recurrence(*(y * y.shape[-1] ** 0.5 if i == 0 else y for i, y in enumerate(rest)))  # it scales q
    return (o[0] if isinstance(o, tuple) else o).transpose(1, 2), None


def token_difference(x: Tensor, *_: Any, output_cache: bool = False, **__: Any) -> Any:
    delta = F.pad(x, (0, 0, 1, -1)) - x
    return (delta, None) if output_cache else delta


NORMS: dict[str, Callable[..., Any]] = {
    "layer_norm": layer_norm,
    "group_norm": layer_norm,
    "rms_norm": rms_norm,
    "rms_norm_linear": rms_norm_linear,
}
for name, ours in NORMS.items():
    rebind(norm.layernorm, name, ours)
rebind(norm.fused_norm_gate, "rms_norm_gated", rms_norm_gated)
rebind(norm.l2norm, "l2norm", l2norm)
for name, plain in {
    "sigmoid": torch.sigmoid,
    "swish": F.silu,
    "sqrelu": lambda x: F.relu(x).square(),
}.items():
    rebind(activations.ops, name, plain)
rebind(activations.ops, "logsigmoid", lambda x, temperature=1.0: F.logsigmoid(x) / temperature)
rebind(activations.ops, "swiglu", lambda x, y: F.silu(x) * y)
rebind(activations.ops, "swiglu_linear", lambda x, y, weight, bias: F.linear(F.silu(x) * y, weight, bias))
rebind(token_shift, "token_shift", token_difference)
rebind(fused_addcmul, "fused_addcmul_rwkv7", fused_addcmul.torch_addcmul_rwkv7)
rebind(fused_k_update, "fused_k_rwkv7", fused_k_update.k_update_ref)
rebind(gate_output_correction, "gate_output_correction", gate_output_correction.gate_output_correction_ref)
rebind(rotary.ops, "rotary_embedding", rotary_embedding)
rebind(convolution.ops, "causal_conv1d", causal_conv1d)
if not torch.cuda.is_available():
    convolution.ShortConvolution.forward = short_convolution
fla.layers.attn.flash_attn_func = flash_attention

_gla = {
    "chunk": alone(naive_recurrent_gla, "q", "k", "v", gk="g"),
    "fused_recurrent": alone(naive_recurrent_gla, "q", "k", "v", "gk"),
}
for kind, ours in _gla.items():
    rebind(fla.ops.gla, f"{kind}_gla", ours)
for kind in ("chunk", "fused_chunk", "fused_recurrent"):
    rebind(
        fla.ops.linear_attn,
        f"{kind}_linear_attn",
        alone(naive_recurrent_linear_attn, "q", "k", "v", "normalize"),
    )
    rebind(fla.ops.retention, f"{kind}_retention", alone(transposed(naive_retention), "q", "k", "v"))
for kind in ("chunk", "fused_recurrent"):
    rebind(fla.ops.delta_rule, f"{kind}_delta_rule", delta_rule)
    rebind(
        fla.ops.gated_delta_rule,
        f"{kind}_gated_delta_rule",
        partial(gated, naive_recurrent_gated_delta_rule, naive_gdn_gate),
    )
    rebind(fla.ops.kda, f"{kind}_kda", partial(gated, naive_recurrent_kda, kda_gate))
    rebind(fla.ops.hgrn, f"{kind}_hgrn", alone(naive_recurrent_hgrn, "x", "g"))
    rebind(fla.ops.gsa, f"{kind}_gsa", alone(naive_recurrent_gsa, "q", "k", "v", "s", "g", "scale"))
    rebind(
        fla.ops.rwkv6,
        f"{kind}_rwkv6",
        alone(transposed(naive_recurrent_rwkv6), "k", "v", "w", "u", "scale", q="r"),
    )
rebind(fla.ops.rwkv7, "chunk_rwkv7", lambda r, w, k, v, a, b, **_: rwkv7(r, w, k, v, a, b))
rebind(
    fla.ops.rwkv7,
    "fused_mul_recurrent_rwkv7",
    lambda r, w, k, v, kk, a, **_: rwkv7(r, w, k, v, -kk, kk * a),
)
