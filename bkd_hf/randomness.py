"""Random numbers as a function of counters, such as (seed, epoch, index).

No generator, so no state: the same numbers for any number of workers and processes, and right after a resume.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def hash_uniform(*counters: npt.ArrayLike) -> np.ndarray:
    """Numbers in [0, 1), each a hash of its counters (SplitMix64's finaliser, Steele et al., 2014).

    Args:
        counters: Integers or integer arrays that broadcast against each other; their order matters.

    Returns:
        float64, of the broadcast shape.
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        state = np.zeros((), dtype=np.uint64)
        for counter in counters:
            bits = np.asarray(counter, dtype=np.int64).astype(np.uint64)
            state = _mix(state ^ _mix(bits + _WEYL)) + _WEYL
        state = _mix(state)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))
