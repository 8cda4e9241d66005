"""The parts that every family is made of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated import silu_product
from kernels.gated.mlp import MLPWeights, mlp_step
from kernels.linear import Blocked, Matrix, linear
from kernels.norm import few, rms_norm_step
from kernels.pool import Floats
from kernels.rotary import rotate_
from models.config import one_of

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_python": F.gelu,
    "gelu_python_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "laplace": lambda x: 0.5 + 0.5 * torch.erf((x - 0.707107) / (0.282095 * 2**0.5)),  # arXiv 2209.10655
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
    "mish": F.mish,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "swish": F.silu,
    "tanh": torch.tanh,
}
"""By the names that they have in the transformers library."""


def activation(name: str) -> str:
    """For validators: the name of one of these."""
    return one_of(name, ACTIVATIONS)


M = TypeVar("M", bound=nn.Module)


def saved_as(name: str, module: M) -> M:
    """A module whose name in a checkpoint is not that of the attribute that holds it here."""
    object.__setattr__(module, "saved_as", name)
    return module


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32, over the last dimension of `size`. What comes out is of the weight's
    type."""

    def __init__(self, size: int, eps: float, affine: bool = True, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.size = (size,)
        self.eps = eps
        self.array: Floats | None = None  # the weight, for decoding on a CPU

    def prepare(self) -> None:
        weight = torch.ones(self.size) if self.weight is None else self.weight.detach()
        if weight.is_cpu and weight.dtype is torch.float32 and self.bias is None:
            self.array = weight.numpy()

    def forward(self, x: Tensor) -> Tensor:
        if self.array is not None and few(x):
            return rms_norm_step(x, self.array, self.eps)
        y = F.rms_norm(
            x if self.weight is None else x.to(self.weight.dtype), self.size, self.weight, self.eps
        )
        return y if self.bias is None else y + self.bias


class OffsetRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), in float32: a weight of zeros leaves the scale alone."""

    def __init__(self, size: int, eps: float):
        super().__init__(size, eps)
        self._scale: Tensor | None = None

    def prepare(self) -> None:
        assert self.weight is not None
        self._scale = 1 + self.weight.float()
        if self.weight.is_cpu:
            self.array = self._scale.numpy()

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        if self.array is not None and few(x):
            return rms_norm_step(x, self.array, self.eps)
        scale = 1 + self.weight.float() if self._scale is None else self._scale
        return F.rms_norm(x.float(), self.size, scale, self.eps).to(x.dtype)


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension, in float32."""
    size = x.shape[-1]
    return F.rms_norm(x.contiguous(), (size,), eps=eps / size) * size**-0.5


def scale_of(norm: nn.Module | None) -> tuple[Floats, np.float32] | None:
    """What kernels that norm as well are given: the weight of an RMS norm on a CPU, and its epsilon. None of others."""
    if not isinstance(norm, RMSNorm) or norm.array is None:
        return None
    return norm.array, np.float32(norm.eps)


class GroupRMSNorm(nn.Module):
    """RMS norm of each of the groups that the last dimension is cut into."""

    def __init__(self, groups: int, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups = groups
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [T, size] -> [T, size]."""
        grouped = x.unflatten(-1, (self.groups, -1))
        return F.rms_norm(grouped, grouped.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class GroupNorm(nn.Module):
    """Layer norm of each of the groups that the last dimension is cut into."""

    def __init__(self, groups: int, size: int, eps: float, affine: bool = True, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size)) if affine else None
        self.bias = nn.Parameter(torch.zeros(size)) if affine and bias else None
        self.groups = groups
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [T, groups, size / groups], or [T, size] -> [T, size]."""
        return F.group_norm(x.reshape(x.shape[0], -1), self.groups, self.weight, self.bias, self.eps)


class Projection(nn.Module):
    """A weight [N, K] and a bias [N] or none, in blocks as well where it is final and on a CPU."""

    weight: Any
    bias: Any  # parameters; a plain nn.Linear says so itself
    blocked: Blocked | None = None

    def to_blocks(self) -> None:
        if self.blocked is None and self.weight.is_cpu and self.weight.dtype is torch.float32:
            self.blocked = Blocked(self.weight, None, self.bias)

    def project(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N]."""
        if self.blocked is not None and self.blocked.takes(x):
            return self.blocked(x)
        return linear(x, self.weight, self.bias)


class Linear(Projection, nn.Linear):
    """`torch.nn.Linear` without its random start: weights are loaded, or set by `models.train`."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)


def matrices(*projections: Projection) -> list[Matrix] | None:
    """What kernels that do several projections in one call are given: the weights in blocks. None where one of them has
    none, or is added to (a LoRA by depth)."""
    blocked = [p.blocked for p in projections if not p._forward_hooks]
    found = [b.matrix for b in blocked if b is not None]
    return found if len(found) == len(projections) else None


class Parted(nn.Module):
    """A module whose parameters are put together from several tensors of a checkpoint."""

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, beside this module; the part of a parameter that it fills)."""
        raise NotImplementedError


class Packed(Parted, Projection):
    """Several projections of one input, computed as one matrix product.

    Each part keeps its own name in a checkpoint: a Packed at ``attn.in_proj`` with parts q_proj and k_proj is
    read from ``attn.q_proj.weight`` and ``attn.k_proj.weight``.
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], bias: bool | frozenset[str] = False):
        super().__init__()
        self.sizes: Sequence[int] = list(parts.values())
        self.names = list(parts)
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), in_features))
        self.biased = frozenset(parts) if bias is True else frozenset(bias or ())
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes))) if self.biased else None

    def forward(self, x: Tensor, sizes: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """The projections, one tensor for each part, or cut into other `sizes`."""
        return self.project(x).split(sizes or self.sizes, dim=-1)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        at = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            yield f"{name}.weight", self.weight[at : at + size]
            if self.bias is not None and name in self.biased:
                yield f"{name}.bias", self.bias[at : at + size]
            at += size


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        activation: str = "silu",
        bias: bool = False,
        names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    ):
        """The first of two names in a checkpoint, where it has no more, is that of gate and up as one."""
        super().__init__()
        self.sizes = intermediate, intermediate
        parts = {name: 2 * intermediate // (len(names) - 1) for name in names[:-1]}
        self.gate_up = Packed(hidden, parts, bias=bias)
        self.down_proj = saved_as(names[-1], Linear(intermediate, hidden, bias=bias))
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        if self.activation is F.silu:
            (both,) = self.gate_up(x, (sum(self.sizes),))
            return self.down_proj(silu_product(both))
        gate, up = self.gate_up(x, self.sizes)
        return self.down_proj(self.activation(gate) * up)

    def with_norm(self, norm: nn.Module | None) -> Callable[[Floats], Floats] | None:
        """x + mlp(norm(x)) on a CPU in one call, where there is one for this norm and activation."""
        found, normed = matrices(self.gate_up, self.down_proj), scale_of(norm)
        if found is None or normed is None or self.activation is not F.silu:
            return None
        gate_up, down = found
        return mlp_step(MLPWeights(*normed, gate_up, down, self.sizes[0]))


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """cap tanh(x / cap): near x for small x, never beyond the cap. None: no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


class Rotary:
    """Rotary positions: each pair of channels is turned by position * base^(-2 i / dim)."""

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False):
        """`dim` channels, the first of a head, are turned; pairs lie half of them apart, or side by side."""
        if dim % 2:
            raise ValueError(f"rotary dimension = {dim}: must be even")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved
        self._frequencies: Tensor | None = None

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [T, H, D], positions [T] -> [T, H, D]."""
        return self._turn(x, *self._angles(x, positions))

    def both(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q [T, Hq, D], k [T, Hk, D], positions [T]: as above."""
        cos, sin = self._angles(q, positions)
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def rotate_(self, x: Tensor, positions: Tensor, heads: int, head_dim: int) -> None:
        """The first heads of x [T, at least heads * head_dim], float32 on a CPU, in place."""
        rotate_(x, positions, self._known(x.device), heads, head_dim, self.interleaved)

    def _known(self, device: torch.device) -> Tensor:
        """Frequencies, [dim / 2]."""
        if self._frequencies is None or self._frequencies.device != device:
            exponents = torch.arange(0, self.dim, 2, device=device).float() / self.dim
            self._frequencies = 1.0 / self.base**exponents
        return self._frequencies

    def _angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, [T, 1, dim / 2] each."""
        angles = (positions.float()[:, None] * self._known(x.device))[:, None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, rest = x[..., : self.dim], x[..., self.dim :]
        if self.interleaved:
            a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
            return turned if self.dim == x.shape[-1] else torch.cat([turned, rest], -1)
        a, b = turned.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)
