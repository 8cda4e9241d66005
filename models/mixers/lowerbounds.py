"""The lower bounds of HGRN's forget gates: they rise from layer to layer (arXiv 2311.04823, section 3.2)."""

import torch
from torch import Tensor, nn


class LowerBounds(nn.Module):
    """One table [layers, channels] for all layers of a model: sums over the layers of its softmax."""

    def __init__(self, layers: int, channels: int):
        super().__init__()
        self.lower_bounds = nn.Parameter(torch.empty(layers, channels))
        self._logs: list[tuple[Tensor, Tensor]] = []

    def prepare(self) -> None:
        self._logs = [self._log_bound(layer) for layer in range(len(self.lower_bounds))]

    def _log_bound(self, layer: int) -> tuple[Tensor, Tensor]:
        """Logs of a layer's bounds, and of what they leave, [channels] each. The first layer's are zero."""
        bound = self.lower_bounds.float().softmax(0)[1 : layer + 1].sum(0)
        return bound.log(), torch.log1p(-bound)

    def raise_log(self, log_gate: Tensor, layer: int) -> Tensor:
        """Log of a gate in (0, 1), [T, channels] -> log of the gate in (bound of the layer, 1)."""
        bound, rest = self._logs[layer] if self._logs else self._log_bound(layer)
        return torch.logaddexp(bound, rest + log_gate)
