"""The exact top-k of |difference|, digit by digit: what every backend's `select` shares.

A score is a non-negative double, whose bits order like an integer. The leading 16 bits of all
scores are counted first; usually the bin that holds the k-th score then has few enough entries to
be ranked in memory, and everything from that bin up is collected.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hotgraft.format import Positions

BINS = 1 << 16
SLACK = 1 << 19
"""Entries of the boundary bin that are ranked in memory instead of reading the data again."""
UNLIMITED = 1 << 62

Counts = npt.NDArray[np.int64]


def find_bound(k: int, count: Callable[[int, int, int], Counts]) -> tuple[int, int] | None:
    """A score's bits that the k largest reach, and how many that equal it are wanted.

    Args:
        k: how many are wanted.
        count: given a shift, a prefix and a rank, reads all the data: int64[BINS], the scores whose
            bits above shift + 16 equal the prefix, by their next 16 bits; bins that lie below those
            of the `rank` largest may be left at less.

    None: fewer than k entries differ.
    """
    prefix, rank = 0, k
    for shift in (48, 32, 16, 0):
        bins = count(shift, prefix, rank)
        from_top = np.cumsum(bins[::-1])
        if from_top[-1] < rank:
            return None
        steps = int(np.searchsorted(from_top, rank))
        inside = int(bins[BINS - 1 - steps])
        rank -= int(from_top[steps]) - inside
        prefix = prefix * BINS + BINS - 1 - steps
        if shift == 0:
            return prefix, rank
        if inside - rank <= SLACK:
            break
    return prefix << shift, UNLIMITED


def keep_largest(
    positions: list[Positions], keys: list[npt.NDArray[np.uint64]], k: int
) -> list[Positions]:
    """Of everything collected, the k largest; of equal ones the earlier."""
    every = np.concatenate(keys)
    if len(every) == k:
        return positions
    pivot = np.partition(every, len(every) - k)[len(every) - k]
    ties = k - int(np.count_nonzero(every > pivot))
    kept = []
    for here, scores in zip(positions, keys, strict=True):
        equal = np.flatnonzero(scores == pivot)
        wanted = scores > pivot
        wanted[equal[:ties]] = True
        ties -= min(ties, len(equal))
        kept.append(here[wanted])
    return kept
