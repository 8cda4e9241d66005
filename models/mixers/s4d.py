"""S4D (arXiv 2206.11893), the diagonal form of LSSL and S4: a linear time-invariant system for every
channel."""

from typing import Any

import pydantic
import torch
from torch import Tensor, nn

from kernels.diagonal.linear import s4d
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.generic import NAMES, GatedOutput, GenericConfig, decoder
from models.layers import saved_as
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "S4D", "Config", "build"]


class Config(GenericConfig):
    state_size: int = pydantic.Field(64, ge=2)  # N: half of it is kept, the other half its conjugates
    glu: bool = True

    @pydantic.field_validator("state_size")
    @classmethod
    def _even(cls, size: int) -> int:
        if size % 2:
            raise ValueError("must be even")
        return size


class S4D(Mixer):
    """x' = A x + u for each channel, held over steps dt; y = 2 Re(C x) + D u, with A diagonal and complex."""

    def __init__(self, c: Config):
        super().__init__()
        H, N = c.hidden_size, c.state_size // 2
        self.H, self.N = H, N
        kernel = {"log_dt": (H,), "log_A_real": (H, N), "A_imag": (H, N), "C": (H, N, 2)}
        self.kernel = nn.ParameterDict(
            {name: nn.Parameter(torch.empty(shape)) for name, shape in kernel.items()}
        )
        self.D = nn.Parameter(torch.empty(H))
        self.output = saved_as("output_linear", GatedOutput(H, H, c.glu))
        self._system: tuple[Tensor, Tensor] | None = None

    def prepare(self) -> None:
        self._system = self._discrete()

    def _discrete(self) -> tuple[Tensor, Tensor]:
        """Transition and readout of one step, [2, N, H] each: real and imaginary parts."""
        k = {name: p.float() for name, p in self.kernel.items()}
        A = torch.complex(-k["log_A_real"].exp(), k["A_imag"])  # [H, N]
        step = A * k["log_dt"].exp()[:, None]
        C = torch.view_as_complex(k["C"].contiguous()) * torch.special.expm1(step) / A
        planes = (torch.stack([z.real, z.imag]).transpose(1, 2).contiguous() for z in (step.exp(), C))
        lam, c = planes
        return lam, c

    def leaves(self) -> LayerLeaves:
        return {"x": Leaf((2, self.N, self.H))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        lam, c = self._system or self._discrete()
        return self.output(s4d(x, lam, c, self.D.float(), pool_of(state, "x"), *batch.index).to(x.dtype))

    def flops(self) -> int:
        return 12 * self.N * self.H


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda: S4D(c))
