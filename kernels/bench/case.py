"""What a benchmark case is."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAMPLE = 4  # rows of a batch that are compared with the naive recurrence
TOLERANCE = 1e-3  # of the largest expected number; products run as three of tf32, sums in another order


@dataclass(frozen=True, slots=True)
class Trial:
    """One step of decoding: one token for each of `rows` sequences, in place on a pool of states."""

    step: Callable[[], Tensor]  # advances the states at every call; returns the outputs [rows, ...]
    expected: Tensor  # outputs of the first SAMPLE rows at the first call, by the naive recurrence
    bytes: int  # read and written once: states, inputs, outputs, weights
    fla: Callable[[], Any] | None = None  # the same by flash-linear-attention, from states side by side
    torch_step: Callable[[], Tensor] | None = None  # the same in torch, as one would compile it
    tolerance: float = TOLERANCE


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    make: Callable[..., Trial]  # (rows, device, **size)
    size: Mapping[str, int]  # a model's; H heads a row
    small: Mapping[str, int]  # for the interpreter

    def build(self, units: int, device: torch.device) -> Trial:
        """`units` states in all: rows times heads, at least one row."""
        return self.make(max(1, units // self.size["H"]), device, **self.size)

    def build_small(self) -> Trial:
        return self.make(3, torch.device("cpu"), **self.small)


@dataclass(frozen=True, slots=True)
class Rows:
    """Indices of a decoding batch: one token a segment, states at scattered slots."""

    slots: Tensor
    depths: Tensor
    offsets: Tensor

    @staticmethod
    def of(rows: int, device: torch.device) -> "Rows":
        torch.manual_seed(0)
        slots = torch.randperm(rows, device=device) + 1
        return Rows(slots, torch.zeros_like(slots), torch.arange(rows + 1, device=device))

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.slots, self.depths, self.offsets

    def pool(self, *shape: int, device: torch.device, fill: float | None = None) -> Tensor:
        """[rows + 1, 1, *shape], float32: small random numbers, or `fill`."""
        size = (len(self.slots) + 1, 1, *shape)
        return torch.randn(size, device=device) / 8 if fill is None else torch.full(size, fill, device=device)

    def sampled(self, pool: Tensor) -> Tensor:
        """A copy of the first rows' states [SAMPLE, *shape]."""
        return pool[self.slots[:SAMPLE], 0]


def by_row(naive: Callable[..., tuple[Any, ...]], *per_row: Tensor | None) -> Tensor:
    """Naive outputs of the first rows: `naive` gets the one token of a row of each tensor, and its state
    last."""
    outs = []
    for n in range(min(SAMPLE, next(len(x) for x in per_row if x is not None))):
        *inputs, state = per_row
        assert state is not None
        outs.append(naive(*(None if x is None else x[n : n + 1] for x in inputs), state[n])[0])
    return torch.cat(outs)


def moved(states: Tensor, rows: int, *others: Tensor | None) -> int:
    """Bytes: `rows` states of a pool read and written, the other tensors once."""
    one = states[0, 0].numel() * states.element_size()
    return 2 * rows * one + sum(x.numel() * x.element_size() for x in others if x is not None)


def fla(module: str, function: str, *tokens: Tensor, **options: Any) -> Callable[[], Any] | None:
    """A call of flash-linear-attention's kernel for one token a row, or None where it is not installed.
    `tokens` [rows, ...] become [rows, 1, ...], as do those options whose name is in the gates that it
    knows."""
    try:
        kernel = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    except (ImportError, AttributeError):
        return None
    per_token = [x.unsqueeze(1) for x in tokens]
    named = {k: x.unsqueeze(1) if k in ("g", "gk", "gv", "w", "beta") else x for k, x in options.items()}
    return lambda: kernel(*per_token, **named, output_final_state=True)
