"""Counter-based random numbers: a value is a pure function of a seed and a few integer words.

The mixer is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), whose
finaliser passes BigCrush on a counter. Chosen over NumPy's generators because their streams may change between
releases (NEP 19), and the order of a data set must not.
"""

import itertools

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def _word(value: int | np.integer | NDArray) -> NDArray[np.uint64]:
    if isinstance(value, int | np.integer):
        return np.array(int(value) & _MASK, dtype=np.uint64)
    return np.asarray(value).astype(np.uint64)


def _mix_number(number: int) -> int:
    """`_mix` of a number to which the golden ratio was added."""
    z = (number + int(_GOLDEN)) & _MASK
    z = (z ^ (z >> 30)) * int(_MIX_1) & _MASK
    z = (z ^ (z >> 27)) * int(_MIX_2) & _MASK
    return z ^ (z >> 31)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def hash64(seed: int, *words: int | NDArray) -> NDArray[np.uint64]:
    """Hash a seed and integer words (scalars or arrays, broadcast together) to uint64 of the broadcast shape.

    Words are absorbed one by one, so hash64(s, a, b) and hash64(s, b, a) differ. Negative integers wrap modulo 2^64.
    """
    scalars = list(itertools.takewhile(lambda word: isinstance(word, int | np.integer), words))
    # In Python's integers as long as there is no array: numpy takes ten times as long for a single number.
    number = _mix_number(int(seed))
    for word in scalars:
        number = _mix_number(number ^ (int(word) & _MASK))
    state = _word(number)
    with np.errstate(over="ignore"):
        for word in words[len(scalars) :]:
            state = _mix((state ^ _word(word)) + _GOLDEN)
    return state


def uniform(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map uint64 hashes to float64 in [0, 1), from the top 53 bits."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, seed: int, *words: int) -> NDArray[np.int64]:
    """A permutation of range(n), int64 (n,), keyed by (seed, *words): the stable order of n hashes."""
    return np.argsort(hash64(seed, *words, np.arange(n, dtype=np.uint64)), kind="stable").astype(np.int64, copy=False)
