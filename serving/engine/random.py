"""Randomness from (seed, position) alone, so that a continuation does not depend on batch, replica or restart."""

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, position)."""
    with np.errstate(over="ignore"):
        at = _mix(seeds + _GOLDEN) ^ _mix(positions.astype(np.uint64) * _GOLDEN + np.uint64(1))
        return (_mix(at) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def derive(seed: int, index: int) -> int:
    """The seed of continuation `index`; that of continuation 0 is the request's own."""
    if index == 0:
        return seed
    with np.errstate(over="ignore"):
        parts = np.array([seed, index], np.uint64)
        return int(_mix(_mix(parts[:1]) + parts[1:] * _GOLDEN)[0])
