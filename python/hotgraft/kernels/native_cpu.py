"""The backend `cpu`: csrc/cpu through the extension `hotgraft._native`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from hotgraft import _native
from hotgraft.format import Bits, DType, Group, Positions, empty_group
from hotgraft.kernels import (
    POLICIES,
    HostMemory,
    Merged,
    NanDifferenceError,
    Pair,
    Room,
    Source,
    ranking,
)

INSTRUCTION_SETS = ("best", "scalar", "avx2", "avx512")


class NativeCpu(HostMemory):
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
        return ranking.keep_largest(positions, keys, k)

    def _positions(self, pair: Pair) -> Positions:
        found: list[Group] = []

        def room(n: int) -> Group:
            found.append(empty_group(pair.dtype, n))
            return found[0]

        self.difference(pair, room)
        return found[0].positions

    def _bound(self, pairs: Iterable[Pair], k: int) -> tuple[int, int] | None:
        def count(shift: int, prefix: int, rank: int) -> ranking.Counts:
            counts = np.zeros((self._workers, _native.COUNTS_WIDTH), np.int64)
            for index, p in enumerate(pairs):
                nan = _native.count_scores(
                    p.dtype.code, *_addresses(p), shift, prefix, rank, counts, self._isa
                )
                if nan >= 0:
                    raise NanDifferenceError(index, nan)
            bins: ranking.Counts = counts[:, : ranking.BINS].sum(axis=0)
            return bins

        return ranking.find_bound(k, count)

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


BACKEND = NativeCpu()
