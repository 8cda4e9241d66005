"""The lower bounds of HGRN's forget gates: they rise from layer to layer (arXiv 2311.04823, section 3.2)."""

import torch
from torch import Tensor, nn


class LowerBounds(nn.Module):
    """One table [layers, channels] for all layers of a model: sums over the layers of its softmax."""

    def __init__(self, layers: int, channels: int):
        super().__init__()
        self.lower_bounds = nn.Parameter(torch.empty(layers, channels))
        self._logs: tuple[Tensor, Tensor] | None = None

    def prepare(self) -> None:
        """Once the weights are there, and stay as they are."""
        self._logs = self._tables()

    def _tables(self) -> tuple[Tensor, Tensor]:
        shares = self.lower_bounds.float().softmax(0)
        bounds = shares.cumsum(0) - shares[0]
        return bounds.log(), torch.log1p(-bounds)

    def raise_log(self, log_gate: Tensor, layer: int) -> Tensor:
        """Log of a gate in (0, 1), [T, channels] -> log of the gate in (bound of the layer, 1)."""
        bound, rest = self._logs or self._tables()
        return torch.logaddexp(bound[layer], rest[layer] + log_gate)

    def values(self, layer: int) -> Tensor:
        """The bounds of one layer [channels]."""
        return (self._logs or self._tables())[0][layer].exp()
