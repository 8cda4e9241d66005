"""The linear recurrent unit (arXiv 2303.06349)."""

from collections.abc import Iterator
from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from kernels.diagonal.linear import lru
from kernels.linear import linear
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.generic import NAMES, GatedOutput, GenericConfig, decoder
from models.layers import Parted, saved_as
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["LRU", "NAMES", "Config", "build"]


class Config(GenericConfig):
    state_size: int | None = pydantic.Field(None, gt=0)  # default hidden_size
    glu: bool = True


class ComplexMatrix(Parted):
    """Real and imaginary part of a matrix, as one real one: side by side, or one below the other."""

    def __init__(self, name: str, rows: int, columns: int, dim: int):
        super().__init__()
        self.name, self.dim = name, dim
        self.weight = nn.Parameter(torch.empty(*((2 * rows, columns) if dim == 0 else (rows, 2 * columns))))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        for suffix, half in zip(("re", "im"), self.weight.chunk(2, self.dim), strict=True):
            yield f"{self.name}_{suffix}", half


class LRU(Mixer):
    """x = lambda x + gamma B u, y = Re(C x) + D u, with lambda = exp(-exp(nu) + i exp(theta)) inside the unit
    disc."""

    def __init__(self, c: Config):
        super().__init__()
        H, N = c.hidden_size, c.state_size or c.hidden_size
        self.N = N
        self.nu_log, self.theta_log, self.gamma_log = (nn.Parameter(torch.empty(N)) for _ in range(3))
        self.B = ComplexMatrix("B", N, H, 0)
        self.C = ComplexMatrix("C", H, N, 1)
        self.D = nn.Parameter(torch.empty(H))
        self.output = saved_as("output_linear", GatedOutput(H, H, c.glu))
        self._system: tuple[Tensor, Tensor, Tensor] | None = None

    def prepare(self) -> None:
        self._system = self._discrete()

    def _discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """lambda [2, N]; gamma B [2 N, H] and C [H, 2 N] as matrices on the two planes of a state."""
        size, angle = torch.exp(-self.nu_log.float().exp()), self.theta_log.float().exp()
        lam = torch.stack([size * angle.cos(), size * angle.sin()])
        B = self.B.weight * self.gamma_log.float().exp().repeat(2)[:, None].to(self.B.weight.dtype)
        real, imaginary = self.C.weight.chunk(2, 1)
        return lam, B, torch.cat([real, -imaginary], 1)

    def leaves(self) -> LayerLeaves:
        return {"x": Leaf((2, self.N))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        lam, B, C = self._system or self._discrete()
        h = lru(linear(x, B, None).unflatten(-1, (2, self.N)), lam, pool_of(state, "x"), *batch.index)
        return self.output(torch.addcmul(linear(h.flatten(-2).to(x.dtype), C, None), x, self.D))

    def flops(self) -> int:
        return 8 * self.N


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda: LRU(c))
