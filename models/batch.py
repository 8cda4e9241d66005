"""What one call of a stage works on."""

from dataclasses import dataclass

import torch
from torch import Tensor


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

    @property
    def segments(self) -> int:
        return self.slots.shape[0]

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        """What kernels ask for: slots, depths, offsets."""
        return self.slots, self.depths, self.offsets

    @staticmethod
    def of_sequences(lengths: list[int], device: torch.device | str = "cpu") -> "Batch":
        """Whole sequences from their beginning, without slots: training and scoring outside the engine."""
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        zeros = torch.zeros(len(lengths), dtype=torch.int64)
        places = torch.cat([torch.arange(n) for n in lengths]) if lengths else zeros
        return Batch(zeros.to(device), zeros.to(device), offsets.to(device), places.to(device))
