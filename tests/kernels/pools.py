"""State pools as the engine lays them out, with poison around and between the states under test."""

import torch
from torch import Tensor

POISON = float("nan")


def poisoned_pool(
    states: Tensor, slots: Tensor, depths: Tensor, *, total_slots: int = 9, total_depths: int = 3
) -> Tensor:
    """A pool [slots, depths, *shape] that holds `states` [N, *shape] at (slots, depths) and NaN everywhere else, also
    in the gaps between the states. A kernel that reads or leaves anything of its neighbours shows it."""
    inner = states[0].numel()
    depth_stride, gap = inner + 3, 5
    slot_stride = total_depths * depth_stride + gap
    arena = torch.full((total_slots * slot_stride + 7,), POISON)
    shape = states.shape[1:]
    strides = [states[0].contiguous().stride(i) for i in range(len(shape))]
    pool = arena.as_strided((total_slots, total_depths, *shape), (slot_stride, depth_stride, *strides), 4)
    pool[slots, depths] = states
    return pool


def untouched(pool: Tensor, slots: Tensor, depths: Tensor) -> bool:
    """Whether everything but the states at (slots, depths) is still poison."""
    rest = pool.as_strided((pool.untyped_storage().nbytes() // 4,), (1,), 0).clone()
    mine = pool.clone()
    pool[slots, depths] = POISON
    clean = bool(pool.as_strided(rest.shape, (1,), 0).isnan().all())
    pool.copy_(mine)
    return clean
