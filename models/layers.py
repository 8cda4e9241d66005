"""The parts that every family is made of."""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrelu": lambda x: F.relu(x).square(),
    "swish": F.silu,
    "tanh": torch.tanh,
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, size: int, eps: float, affine: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight.float()
        return y.to(x.dtype)


class Linear(nn.Linear):
    """A projection. `torch.nn.Linear` without its random start: weights are loaded, or set by `models.train`."""

    def reset_parameters(self) -> None:
        pass


class Packed(nn.Module):
    """Several projections of one input, computed as one matrix product.

    Each part keeps its own name in a checkpoint: a Packed at ``attn.in_proj`` with parts q_proj and k_proj is read
    from ``attn.q_proj.weight`` and ``attn.k_proj.weight``.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], bias: bool | frozenset[str] = False):
        super().__init__()
        self.sizes = list(parts.values())
        self.names = list(parts)
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), in_features))
        self.biased = frozenset(parts) if bias is True else frozenset(bias or ())
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes))) if self.biased else None

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, beside this module; the rows that it fills)."""
        at = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            yield f"{name}.weight", self.weight[at : at + size]
            if self.bias is not None and name in self.biased:
                yield f"{name}.bias", self.bias[at : at + size]
            at += size


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, hidden: int, intermediate: int, activation: str = "silu", bias: bool = False):
        super().__init__()
        self.gate_up = Packed(hidden, {"gate_proj": intermediate, "up_proj": intermediate}, bias=bias)
        self.down_proj = Linear(intermediate, hidden, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x)
        return self.down_proj(self.activation(gate) * up)
