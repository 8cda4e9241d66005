"""The short causal convolution that many families put before their recurrence."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kernels.conv import conv
from kernels.pool import Floats, as_float32
from models.batch import Batch
from models.layers import ACTIVATIONS, Parted
from models.state import Leaf


class ShortConv(Parted):
    """Depthwise over the channels of all parts, `width` taps, then an activation, usually SiLU.

    Each part keeps its own name in a checkpoint, beside this module: weight [channels, 1, width] and bias
    [channels].
    """

    def __init__(
        self, parts: Mapping[str, int], width: int, bias: bool = False, activation: str | None = "silu"
    ):
        super().__init__()
        self.sizes = dict(parts)
        self.channels = sum(parts.values())
        self.weight = nn.Parameter(torch.empty(self.channels, width))
        self.bias = nn.Parameter(torch.empty(self.channels)) if bias else None
        self.silu = activation in ("silu", "swish")  # which the kernel does itself
        self.activation = None if activation is None or self.silu else ACTIVATIONS[activation]

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        at = 0
        for name, size in self.sizes.items():
            yield f"{name}.weight", self.weight[at : at + size, None]
            if self.bias is not None:
                yield f"{name}.bias", self.bias[at : at + size]
            at += size

    def leaf(self) -> Leaf:
        return Leaf((self.weight.shape[1] - 1, self.channels))

    def arrays(self) -> tuple[Floats, Floats]:
        """Taps [W, channels] and bias [channels], for kernels that contain the convolution."""
        bias = torch.zeros(self.channels) if self.bias is None else self.bias.detach()
        return as_float32(self.weight.detach().t()), as_float32(bias)

    def forward(self, x: Tensor, batch: Batch, pool: Tensor | None) -> Tensor:
        """x [T, channels] -> [T, channels]."""
        y = conv(x, self.weight, self.bias, pool, *batch.index, silu=self.silu)
        return y if self.activation is None else self.activation(y)
