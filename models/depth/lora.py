"""Relaxation: a low-rank update of the core's projections for each depth (arXiv 2410.20672, eq. 2).

y = W x + B_d A_d x        A_d: [r, in], B_d: [out, r], for the depth d of the token
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernels.depth import depth_lora
from kernels.pool import Floats
from models.decoder import Block
from models.layers import Packed, RMSNorm, saved_as


class TokenDepths:
    """The depth of each token of the batch that is running, [T]: known to the decoder, looked at by its LoRAs."""

    value: Tensor


class DepthLora(nn.Module):
    """The updates of one projection, or of the several that a Packed computes as one: each has factors of its own."""

    def __init__(
        self,
        projection: nn.Module,
        depths: int,
        rank: int,
        scale: float,
        token_depths: TokenDepths,
        untied: bool = False,
    ):
        """`untied`: a bias of the projection is corrected at each depth too."""
        super().__init__()
        weight = projection.weight
        assert isinstance(weight, Tensor)
        self.sizes = list(projection.sizes) if isinstance(projection, Packed) else [weight.shape[0]]
        self.A = nn.Parameter(torch.zeros(depths, len(self.sizes), rank, weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(depths, weight.shape[0], rank))
        biased = untied and getattr(projection, "bias", None) is not None
        self.bias = nn.Parameter(torch.zeros(depths, weight.shape[0])) if biased else None
        self.scale = scale
        self._depths = token_depths

    @property
    def parameters_of_one_depth(self) -> int:
        return sum(p.numel() for p in self.parameters()) // len(self.A)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in], or [T, heads, in] -> what is added, [T, out] or [T, heads, out], all parts side by side."""
        depths = self._depths.value
        if x.dim() == 3:
            depths = depths.repeat_interleave(x.shape[1])
        added = depth_lora(x.flatten(0, -2), self.A, self.B, depths, self.sizes) * self.scale
        return (added if self.bias is None else added + self.bias[depths]).unflatten(0, x.shape[:-1])


class DepthNorm(nn.Module):
    """An RMS norm whose weight depends on the depth of the token."""

    array: Floats | None = None  # as an RMSNorm has; here there is no single one

    def __init__(self, norm: RMSNorm, depths: int, token_depths: TokenDepths):
        super().__init__()
        self.weight = None if norm.weight is None else nn.Parameter(torch.ones(depths, *norm.size))
        self.bias = None if norm.bias is None else nn.Parameter(torch.zeros(depths, *norm.size))
        self.size, self.eps = norm.size, norm.eps
        self._depths = token_depths
        if hasattr(norm, "saved_as"):
            saved_as(str(norm.saved_as), self)

    @property
    def parameters_of_one_depth(self) -> int:
        return sum(p[0].numel() for p in self.parameters())

    def copy(self, depth: int, norm: nn.Module) -> None:
        """Take over a norm's weight for one depth."""
        for name, parameter in self.named_parameters():
            parameter[depth] = norm.get_parameter(name)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, ..., size]."""
        y, middle = x if self.weight is None else x.to(self.weight.dtype), (1,) * (x.dim() - 2)
        y = nn.functional.rms_norm(y, self.size, eps=self.eps)
        for by, parameter in ((torch.mul, self.weight), (torch.add, self.bias)):
            if parameter is not None:
                y = by(y, parameter[self._depths.value].view(len(x), *middle, *self.size))
        return y


def projections(block: Block) -> Iterator[tuple[str, nn.Module]]:
    """The linear maps of a layer that can be relaxed, by path."""
    for path, module in block.named_modules():
        if isinstance(module, (nn.Linear, Packed)):
            yield path, module


def relax(
    block: Block, depths: int, rank: int, scale: float, token_depths: TokenDepths, untied: bool = False
) -> None:
    """Give every projection of a layer its updates, and (`untied`) norms and biases a value for each depth."""
    loras = {path: DepthLora(p, depths, rank, scale, token_depths, untied) for path, p in projections(block)}
    block.loras = nn.ModuleDict({path.replace(".", "_"): lora for path, lora in loras.items()})
    for path, projection in list(projections(block)):
        if path in loras:
            projection.register_forward_hook(_adding(loras[path]))
    for path, module in list(block.named_modules()):
        if untied and type(module) is RMSNorm:
            above, _, name = path.rpartition(".")
            setattr(block.get_submodule(above), name, DepthNorm(module, depths, token_depths))


def _adding(lora: DepthLora) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        added = lora(inputs[0])
        if isinstance(output, tuple):
            parts = added.split([y.shape[-1] for y in output], -1)  # as the caller cuts them
            return tuple(y + dy for y, dy in zip(output, parts, strict=True))
        return output + added

    return hook
