"""Cells with block-diagonal recurrent matrices, one for each head: FlashRNN (arXiv 2412.07752) with its
layout of the weights, and xLSTM's sLSTM (arXiv 2405.04517)."""

from collections.abc import Iterator
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from kernels.cell import KINDS, cell
from models.batch import Batch
from models.decoder import Decoder, Mixer
from models.generic import NAMES, GenericConfig, decoder
from models.layers import GroupNorm, Linear, Parted
from models.state import LayerLeaves, LayerState, Leaf, pool_of

__all__ = ["NAMES", "Config", "HeadwiseCell", "build"]


class Config(GenericConfig):
    model_type: Literal["flashrnn", "slstm"]
    function: Literal["elman", "gru", "lstm", "slstm"] | None = None  # which cell: of flashrnn only
    num_heads: int = pydantic.Field(4, gt=0)
    group_norm: bool = False  # of the heads' outputs: slstm always has it

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "Config":
        if (self.function is None) == (self.model_type == "flashrnn"):
            raise ValueError(f"function = {self.function!r}: a flashrnn has one, and nothing else")
        self.heads_of("hidden_size", self.hidden_size, self.num_heads)
        return self

    @property
    def kind(self) -> str:
        return self.function or "slstm"


class Recurrence(Parted):
    """R [G, heads, to, from] and b of a checkpoint.

    A GRU's, in that format, have the order g, r, z: g is what the reset gate lets through, and b has the bias
    of the candidate's input as a fourth. Here the order is that of the gates r, z, n, and every bias is the
    recurrent one.
    """

    def __init__(self, kind: str, heads: int, width: int):
        super().__init__()
        gates = len(KINDS[kind].gates)
        self.order = (2, 0, 1) if kind == "gru" else tuple(range(gates))  # place here of each one there
        self.R = nn.Parameter(torch.empty(gates, heads, width, width))
        self.b = nn.Parameter(torch.empty(gates, heads, width))
        self.b_input = nn.Parameter(torch.empty(heads, width)) if kind == "gru" else None

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        letters = {1: "h", 3: "grz", 4: "ifzo"}[len(self.order)]
        for letter, place in zip(letters, self.order, strict=True):
            yield f"R_{letter}", self.R[place]
            yield f"b_{letter}", self.b[place]
        if self.b_input is not None:
            yield "b_n", self.b_input


class HeadwiseCell(Mixer):
    """A recurrent cell in each head: gates from the token and, through the head's own matrix, from its
    state."""

    def __init__(self, c: Config):
        super().__init__()
        D, H = c.hidden_size, c.num_heads
        self.kind, self.heads, self.width = c.kind, H, D // H
        self.gates, self.states = len(KINDS[c.kind].gates), len(KINDS[c.kind].states)
        self.W = Linear(D, self.gates * D, bias=False)
        self.recurrence = Recurrence(c.kind, H, D // H)
        normed = c.group_norm or c.model_type == "slstm"
        self.group_norm = GroupNorm(H, D, c.norm_eps, bias=False) if normed else None
        self.out_proj = Linear(D, D, bias=False)
        self._R: Tensor | None = None

    def prepare(self) -> None:
        R = self.recurrence.R.transpose(-1, -2)
        self._R = (R if R.is_cuda else R.float()).contiguous()

    def leaves(self) -> LayerLeaves:
        return {"cell": Leaf((self.states, self.heads, self.width))}

    def forward(self, x: Tensor, batch: Batch, state: LayerState | None) -> Tensor:
        wx = self.W(x).view(-1, self.gates, self.heads, self.width)
        if self.recurrence.b_input is not None:
            wx = torch.cat([wx[:, :2], (wx[:, 2] + self.recurrence.b_input).unsqueeze(1)], 1)
        R = self.recurrence.R.transpose(-1, -2) if self._R is None else self._R
        h = cell(self.kind, wx, R, self.recurrence.b, pool_of(state, "cell"), *batch.index).to(x.dtype)
        return self.out_proj(h.flatten(-2) if self.group_norm is None else self.group_norm(h))

    def flops(self) -> int:
        return 8 * self.states * self.heads * self.width


def build(raw: dict[str, Any], file: object) -> tuple[Config, Decoder]:
    c = Config.read(raw, file)
    return c, decoder(c, lambda: HeadwiseCell(c))
