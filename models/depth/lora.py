"""Relaxation: a low-rank update of the core's projections for each depth (arXiv 2410.20672, eq. 2).

y = W x + B_d A_d x        A_d: [r, in], B_d: [out, r], for the depth d of the token
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernels.depth import depth_lora
from models.decoder import Block
from models.layers import Packed


class TokenDepths:
    """The depth of each token of the batch that is running, [T]: known to the decoder, looked at by its LoRAs."""

    value: Tensor


class DepthLora(nn.Module):
    """The updates of one projection, or of the several that a Packed computes as one: each has factors of its own."""

    def __init__(
        self, projection: nn.Module, depths: int, rank: int, scale: float, token_depths: TokenDepths
    ):
        super().__init__()
        weight = projection.weight
        assert isinstance(weight, Tensor)
        self.sizes = list(projection.sizes) if isinstance(projection, Packed) else [weight.shape[0]]
        self.A = nn.Parameter(torch.zeros(depths, len(self.sizes), rank, weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(depths, weight.shape[0], rank))
        self.scale = scale
        self._depths = token_depths

    @property
    def parameters_of_one_depth(self) -> int:
        return (self.A.numel() + self.B.numel()) // len(self.A)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, in] -> what each part adds, [T, size of the part]."""
        out, at = [], 0
        for i, size in enumerate(self.sizes):
            B = self.B[:, at : at + size]
            out.append(depth_lora(x, self.A[:, i], B, self._depths.value) * self.scale)
            at += size
        return tuple(out)


def projections(block: Block) -> Iterator[tuple[str, nn.Module]]:
    """The linear maps of a layer that can be relaxed, by path."""
    for path, module in block.named_modules():
        if isinstance(module, (nn.Linear, Packed)):
            yield path, module


def relax(block: Block, depths: int, rank: int, scale: float, token_depths: TokenDepths) -> None:
    """Give every projection of a layer its updates."""
    loras = {path: DepthLora(p, depths, rank, scale, token_depths) for path, p in projections(block)}
    block.loras = nn.ModuleDict({path.replace(".", "_"): lora for path, lora in loras.items()})
    for path, projection in list(projections(block)):
        if path in loras:
            projection.register_forward_hook(_adding(loras[path]))


def _adding(lora: DepthLora) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
        added = lora(inputs[0])
        if isinstance(output, tuple):
            return tuple(y + dy for y, dy in zip(output, added, strict=True))
        return output + added[0]

    return hook
