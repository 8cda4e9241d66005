"""How CPU kernels see a state pool.

A pool tensor is [slots, depths, *state], float32. Its last dimensions are contiguous; the strides of the first two
are free, because the states of all layers of one slot lie side by side in one arena, and because the depths of a
layer may share one state (stride 0). Numba vectorises only over arrays known to be contiguous, so a kernel gets the
whole storage as one flat array, with an offset and the two strides in elements.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float32]

PADDING_SLOT = 0
"""Slot that no sequence owns: padded rows read and write it, and nobody looks."""


class FlatPool(NamedTuple):
    data: npt.NDArray[np.float32]  # the whole storage, one dimension
    offset: int  # of slot 0, depth 0
    slot_stride: int
    depth_stride: int


def flat(pool: torch.Tensor) -> FlatPool:
    """The flat view of a pool tensor [slots, depths, *state]; kept on the tensor, whose storage never moves."""
    known: FlatPool | None = getattr(pool, "_fathom_flat", None)
    if known is not None:
        return known
    if not inner_contiguous(pool):
        raise ValueError(f"pool: the state dimensions must be contiguous, got strides {pool.stride()}")
    length = pool.untyped_storage().nbytes() // pool.element_size()
    whole = torch.as_strided(pool, (length,), (1,), 0)
    made = FlatPool(whole.numpy(), int(pool.storage_offset()), pool.stride(0), pool.stride(1))
    pool._fathom_flat = made  # type: ignore[attr-defined]
    return made


def inner_contiguous(pool: torch.Tensor) -> bool:
    """Whether the state of one slot and depth is one contiguous run."""
    expected = 1
    for size, stride in zip(reversed(pool.shape[2:]), reversed(pool.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def tensor_of(array: npt.NDArray[Any]) -> torch.Tensor:
    """A tensor of an array's memory, which does not forget the array: a kernel is called more often than a batch is
    put together, and `x.numpy()` takes 2 microseconds."""
    made = torch.from_numpy(array)
    made._fathom_array = array  # type: ignore[attr-defined]
    return made


def array_of(x: torch.Tensor) -> npt.NDArray[Any]:
    """The array of a CPU tensor's memory."""
    known: npt.NDArray[Any] | None = getattr(x, "_fathom_array", None)
    return x.numpy() if known is None else known


def as_float32(x: torch.Tensor) -> npt.NDArray[np.float32]:
    """A contiguous float32 array of a CPU tensor, without a copy where it already is one."""
    if x.dtype is not torch.float32:
        x = x.float()
    return array_of(x) if x.is_contiguous() else x.contiguous().numpy()


def inference(x: torch.Tensor) -> bool:
    """Whether x is what CPU kernels take in place of torch's operators: float32, and nobody asks for gradients."""
    return (
        x.dtype is torch.float32
        and not x.is_cuda
        and not x.is_meta
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
