"""What one call of a stage works on."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.pool import array_of

Ints = npt.NDArray[np.int64]

FEW = 32


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed tokens of several sequences, and where the state of each lies.

    The tokens of segment n are ``offsets[n] .. offsets[n + 1]``; a decoding sequence is a segment of one
    token, a prefill chunk a segment of many. All index tensors are int64, on the model's device.
    """

    slots: Tensor  # [N] slot of each segment's state; 0 is padding
    depths: Tensor  # [N] depth instance of each segment's state
    offsets: Tensor  # [N + 1]
    positions: Tensor  # [T] place of each token in its sequence
    seeds: Tensor | None = None  # [N] of each sequence, for models that draw at random
    # [T] bool: tokens that have left already, and pass through only to write the state that later tokens will look
    # for; their rows stay as they are.
    ghosts: Tensor | None = None
    width: float | Tensor = 1.0  # share of heads and hidden units in use: by all tokens, or by each, [T]

    @property
    def segments(self) -> int:
        return self.slots.shape[0]

    @property
    def decodes_few(self) -> bool:
        """Whether this is a decoding step of a few sequences, without gradients: one token of each, so few that reading
        the weights is what takes the time."""
        tokens = self.positions.shape[0]
        few = tokens == self.slots.shape[0] and tokens <= FEW
        return few and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    @property
    def token_depths(self) -> Tensor:
        """Depth of each token, [T]."""
        if self.segments == self.positions.shape[0]:
            return self.depths
        return self.depths.repeat_interleave(self.offsets.diff())

    @property
    def whole(self) -> bool:
        """Whether all tokens go through all of a layer: none is a ghost, none uses a part of its width."""
        return self.ghosts is None and not isinstance(self.width, Tensor) and self.width == 1.0

    @property
    def arrays(self) -> tuple[Ints, Ints, Ints]:
        """`index` as contiguous arrays of the host, for kernels of a CPU."""
        slots, depths, offsets = (np.ascontiguousarray(array_of(x)) for x in self.index)
        return slots, depths, offsets

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        """What kernels ask for: slots, depths, offsets."""
        return self.slots, self.depths, self.offsets

    def select(self, which: Tensor) -> tuple["Batch", Tensor]:
        """The batch of some segments (bool [N]), and which tokens they are [t]."""
        lengths = self.offsets.diff()
        tokens = which.repeat_interleave(lengths).nonzero().squeeze(1)
        offsets = torch.cat([self.offsets[:1], lengths[which].cumsum(0)])
        picked = Batch(
            self.slots[which],
            self.depths[which],
            offsets,
            self.positions[tokens],
            None if self.seeds is None else self.seeds[which],
            None if self.ghosts is None else self.ghosts[tokens],
            self.width[tokens] if isinstance(self.width, Tensor) else self.width,
        )
        return picked, tokens

    def alone(self, tokens: Tensor) -> "Batch":
        """Some of the tokens [t], each as a segment of its own."""
        owners = torch.searchsorted(self.offsets, tokens, right=True) - 1
        return Batch(
            self.slots[owners],
            self.depths[owners],
            torch.arange(len(tokens) + 1, device=tokens.device),
            self.positions[tokens],
            None if self.seeds is None else self.seeds[owners],
            None if self.ghosts is None else self.ghosts[tokens],
            self.width[tokens] if isinstance(self.width, Tensor) else self.width,
        )

    def at_depth(self, depth: int) -> "Batch":
        """The same tokens, all of them at one depth."""
        return replace(self, depths=self.depths.new_full(self.depths.shape, depth))

    @staticmethod
    def of_sequences(lengths: list[int], device: torch.device | str = "cpu") -> "Batch":
        """Whole sequences from their beginning, without slots: training and scoring outside the engine."""
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        zeros = torch.zeros(len(lengths), dtype=torch.int64)
        places = torch.cat([torch.arange(n) for n in lengths]) if lengths else zeros
        return Batch(zeros.to(device), zeros.to(device), offsets.to(device), places.to(device))
