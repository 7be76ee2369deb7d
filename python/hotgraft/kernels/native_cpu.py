"""The backend `cpu`: csrc/cpu through the extension `hotgraft._native`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from hotgraft import _native
from hotgraft.format import Bits, DType, Group, Positions, empty_group
from hotgraft.kernels import POLICIES, Merged, NanDifferenceError, Pair, Room, Source

INSTRUCTION_SETS = ("best", "scalar", "avx2", "avx512")
SLACK = 1 << 19
"""Entries of the boundary bin that `select` ranks in memory instead of reading the data again."""
_BINS = 1 << 16
_UNLIMITED = 1 << 62


class NativeCpu:
    """The verbs in C++: prefetched, shared among threads, the GIL released.

    Args:
        isa: instruction set of the streaming loops: `best`, `scalar`, `avx2` or `avx512`.
        workers: threads at most; 0 means one a core that this process may use.

    Example:
        >>> NativeCpu(isa="scalar", workers=1).name
        'cpu'
    """

    name = "cpu"

    def __init__(self, isa: str = "best", workers: int = 0) -> None:
        self._isa = INSTRUCTION_SETS.index(isa)
        self._workers = workers or _native.max_workers()

    def table(
        self, segments: npt.NDArray[np.int64], positions: Positions, item_size: int
    ) -> _native.Table:
        return _native.Table(segments, positions, item_size)

    def prefetch(self, table: _native.Table, values: Bits) -> None:
        _native.prefetch(table, values, self._workers)

    def gather(self, table: _native.Table, values: Bits) -> None:
        _native.gather(table, values, self._workers)

    def scatter(self, table: _native.Table, values: Bits) -> None:
        _native.scatter(table, values, self._workers)

    def compare(self, table: _native.Table, values: Bits) -> tuple[int, int]:
        return _native.compare(table, values, self._workers)

    def difference(self, pair: Pair, room: Room) -> None:
        found = _native.Difference(
            *_addresses(pair), pair.dtype.item_size, self._workers, self._isa
        )
        found.write(*room(found.count), self._workers)

    def select(self, pairs: Iterable[Pair], k: int | None) -> list[Positions]:
        if k is None:
            return [self._positions(pair) for pair in pairs]
        bound = self._bound(pairs, k)
        if bound is None:
            return self.select(pairs, None)
        lowest, ties = bound
        positions, keys = [], []
        for p in pairs:
            here, scores = _native.collect(
                p.dtype.code, *_addresses(p), lowest, ties, self._workers, self._isa
            )
            ties -= int(np.count_nonzero(scores == lowest))
            positions.append(here)
            keys.append(scores)
        return _keep_largest(positions, keys, k)

    def _positions(self, pair: Pair) -> Positions:
        found: list[Group] = []

        def room(n: int) -> Group:
            found.append(empty_group(pair.dtype, n))
            return found[0]

        self.difference(pair, room)
        return found[0].positions

    def _bound(self, pairs: Iterable[Pair], k: int) -> tuple[int, int] | None:
        """A score's bits that the k largest reach, and how many that equal it are wanted.

        Found digit by digit, the leading ones first, one read of the data a digit. Usually the
        first digit's bin holds few enough entries to be ranked in memory; then the bound is the
        bin's lower end and everything from there up is wanted. None: fewer than k entries differ.
        """
        prefix, rank = 0, k
        for shift in (48, 32, 16, 0):
            counts = np.zeros((self._workers, _native.COUNTS_WIDTH), np.int64)
            for index, p in enumerate(pairs):
                nan = _native.count_scores(
                    p.dtype.code, *_addresses(p), shift, prefix, rank, counts, self._isa
                )
                if nan >= 0:
                    raise NanDifferenceError(index, nan)
            bins = counts[:, :_BINS].sum(axis=0)
            from_top = np.cumsum(bins[::-1])
            if from_top[-1] < rank:
                return None
            steps = int(np.searchsorted(from_top, rank))
            inside = int(bins[_BINS - 1 - steps])
            rank -= int(from_top[steps]) - inside
            prefix = prefix * _BINS + _BINS - 1 - steps
            if shift == 0:
                return prefix, rank
            if inside - rank <= SLACK:
                break
        return prefix << shift, _UNLIMITED

    def merge(
        self,
        sources: Sequence[Source],
        ranges: npt.NDArray[np.int64],
        dtype: DType,
        policy: str,
        order: Sequence[int],
    ) -> Merged:
        return Merged(
            *_native.merge(
                [tuple(source) for source in sources],
                np.ascontiguousarray(ranges),
                dtype.code,
                POLICIES.index(policy),
                np.asarray(order, np.int64),
                self._workers,
            )
        )

    def round(self, values: Bits, source: DType, target: DType) -> tuple[Bits, int]:
        return _native.round(source.code, values, target.code)


def _addresses(pair: Pair) -> tuple[int, int, int]:
    return pair.base.data_ptr(), pair.finetuned.data_ptr(), pair.base.numel()


def _keep_largest(
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


BACKEND = NativeCpu()
