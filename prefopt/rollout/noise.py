"""Random numbers by name: one for each (seed, key of the prompt, number of the sample, step).

A counter goes through the finaliser of splitmix64 (Steele, Lea and Flood 2014, "Fast splittable
pseudorandom number generators"), so that a draw needs no state and no draw before it.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def uniforms(seed: int, key: int, sample: int, steps: int) -> np.ndarray:
    """[steps] float64, uniform on the odd multiples of 2^-53 in (0, 1); any integers name them."""
    state = np.zeros(1, np.uint64)
    for name in (seed, key, sample):
        state = _mix(state + np.uint64((name + 1) * _GOLDEN & _MASK))
    counters = np.arange(1, steps + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _mix(state + counters) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
