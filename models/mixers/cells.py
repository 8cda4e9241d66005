"""Elman, GRU and LSTM with one dense recurrent matrix, named and laid out as in torch.nn.RNN, GRU and
LSTM."""

from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn

from kernels.cell import KINDS, cell
from kernels.linear import linear
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.generic import NAMES, GenericConfig, decoder
from models.layers import Linear
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "Cell", "Config", "build"]


class Config(GenericConfig):
    inert: ClassVar[frozenset[str]] = frozenset()

    model_type: Literal["elman", "gru", "lstm"]
    cell_size: int | None = pydantic.Field(
        None, gt=0
    )  # default hidden_size; otherwise with a projection back
    bias: bool = True
    nonlinearity: Literal["tanh", "relu"] = "tanh"  # of an Elman network

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.nonlinearity != "tanh" and self.model_type != "elman":
            raise ValueError(f"nonlinearity = {self.nonlinearity!r}: only elman has a choice")
        return self

    @property
    def kind(self) -> str:
        return "elman_relu" if self.nonlinearity == "relu" else self.model_type


class Cell(Mixer):
    """A recurrent cell over the whole width: gates from the token and, through a dense matrix, from the
    state."""

    def __init__(self, c: Config):
        super().__init__()
        D = c.cell_size or c.hidden_size
        self.kind, self.width = c.kind, D
        self.gates, self.states = len(KINDS[c.kind].gates), len(KINDS[c.kind].states)
        self.weight_ih = nn.Parameter(torch.empty(self.gates * D, c.hidden_size))
        self.weight_hh = nn.Parameter(torch.empty(self.gates * D, D))
        self.bias_ih = nn.Parameter(torch.empty(self.gates * D)) if c.bias else None
        self.bias_hh = nn.Parameter(torch.empty(self.gates * D)) if c.bias else None
        self.out_proj = None if c.cell_size is None else Linear(D, c.hidden_size, bias=False)
        self._recurrent: tuple[Tensor, Tensor | None] | None = None

    def prepare(self) -> None:
        R, bias = self._matrices()
        # The CPU kernel computes in float32: better once than at every token.
        self._recurrent = (R if R.is_cuda else R.float()).contiguous(), bias

    def _matrices(self) -> tuple[Tensor, Tensor | None]:
        """R [G, 1, from, to] and its bias [G, 1, D]."""
        R = self.weight_hh.view(self.gates, 1, self.width, self.width).transpose(-1, -2)
        return R, None if self.bias_hh is None else self.bias_hh.view(self.gates, 1, self.width)

    def leaves(self) -> LayerLeaves:
        return {"cell": Leaf((self.states, 1, self.width))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        wx = linear(x, self.weight_ih, self.bias_ih).view(-1, self.gates, 1, self.width)
        R, bias = self._recurrent or self._matrices()
        h = cell(self.kind, wx, R, bias, pool_of(state, "cell"), *batch.index).flatten(-2).to(x.dtype)
        return h if self.out_proj is None else self.out_proj(h)

    def flops(self) -> int:
        return 8 * self.states * self.width


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda: Cell(c))
