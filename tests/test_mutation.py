"""The tests can fail: backends broken on purpose are caught by the very comparisons they use."""

import numpy as np
import pytest
import torch
from agreement import (
    BACKENDS,
    Arena,
    Stretch,
    check_merge,
    check_moves,
    check_round,
    check_select,
)
from hotgraft.format import DTYPES
from hotgraft.kernels import Pair, Source
from hotgraft.kernels.native_cpu import NativeCpu

F32, F64, BF16 = (DTYPES[name] for name in ("F32", "F64", "BF16"))


class GatherSwaps(NativeCpu):
    def gather(self, table, values):
        super().gather(table, values)
        values[:2] = values[1::-1].copy()


class ScatterDropsTheLastEntry(NativeCpu):
    def scatter(self, table, values):
        values = values.copy()
        held = np.empty_like(values)
        self.gather(table, held)
        values[-1] = held[-1]
        super().scatter(table, values)


class ScatterSpoilsItsValues(NativeCpu):
    def scatter(self, table, values):
        super().scatter(table, values)
        values[0] ^= 1


class ScatterTouchesANeighbour(NativeCpu):
    def table(self, segments, positions, item_size):
        self._beside = segments[:1].copy()
        self._beside[0] = segments[0, 0] + item_size * (int(positions[0]) + 1), 0, 1
        return super().table(segments, positions, item_size)

    def scatter(self, table, values):
        super().scatter(table, values)
        beside = super().table(self._beside, np.zeros(1, np.int32), table.item_size)
        super().scatter(beside, values[:1])


class CompareIsOffByOne(NativeCpu):
    def compare(self, table, values):
        count, first = super().compare(table, values)
        return count, first + (count > 0)


class CompareStopsAtOne(NativeCpu):
    def compare(self, table, values):
        count, first = super().compare(table, values)
        return min(count, 1), first


ARENA = [Stretch(9, [0, 3, 8]), Stretch(40, range(0, 40, 2))]


@pytest.mark.parametrize(
    "broken",
    [
        GatherSwaps,
        ScatterDropsTheLastEntry,
        ScatterSpoilsItsValues,
        ScatterTouchesANeighbour,
        CompareIsOffByOne,
        CompareStopsAtOne,
    ],
)
def test_broken_moves_are_caught(broken):
    check_moves(NativeCpu(), Arena(ARENA, 4))
    with pytest.raises(AssertionError):
        check_moves(broken(), Arena(ARENA, 4))


class SelectTakesTheLaterOfTies(NativeCpu):
    def select(self, pairs, k):
        if k is None:
            return super().select(pairs, k)
        found = super().select(pairs, k + 1)
        first = next(i for i, positions in enumerate(found) if len(positions))
        return [p[1:] if i == first else p for i, p in enumerate(found)]


class SelectTakesOneMore(NativeCpu):
    def select(self, pairs, k):
        return super().select(pairs, k if k is None else k + 1)


class SelectMissesSignsOfZero(NativeCpu):
    def select(self, pairs, k):
        plain = [Pair(p.base + 0.0, p.finetuned + 0.0, p.dtype) for p in pairs]
        return super().select(plain, k)


class SelectOverlooksNan(NativeCpu):
    def select(self, pairs, k):
        clean = [Pair(*(t.nan_to_num(0.0) for t in p[:2]), p.dtype) for p in pairs]
        return super().select(clean, k)


TIED = torch.tensor([0.0, 1.0, 1.0, 1.0, -0.0])
NAN = torch.tensor([0.0, float("nan"), 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("broken", "fresh", "k"),
    [
        (SelectTakesTheLaterOfTies, TIED, 2),
        (SelectTakesOneMore, TIED, 2),
        (SelectMissesSignsOfZero, TIED, None),
        (SelectOverlooksNan, NAN, 2),
    ],
)
def test_broken_selection_is_caught(broken, fresh, k):
    pairs = [Pair(torch.zeros(5), fresh, F32)] * 2
    check_select(NativeCpu(), pairs, k)
    with pytest.raises(AssertionError):
        check_select(broken(), pairs, k)


class MergeSumsTheOtherWayRound(NativeCpu):
    def merge(self, sources, ranges, dtype, policy, order):
        ranges = np.ascontiguousarray(ranges[:, ::-1])
        return super().merge(sources[::-1], ranges, dtype, policy, order[::-1])


class MergePrefersTheFirst(NativeCpu):
    def merge(self, sources, ranges, dtype, policy, order):
        return super().merge(sources, ranges, dtype, policy, [-rank for rank in order])


class MergeForgetsWeights(NativeCpu):
    def merge(self, sources, ranges, dtype, policy, order):
        sources = [source._replace(weight=1.0) for source in sources]
        return super().merge(sources, ranges, dtype, policy, order)


@pytest.mark.parametrize(
    ("broken", "policy"),
    [
        (MergeSumsTheOtherWayRound, "sum"),
        (MergePrefersTheFirst, "priority"),
        (MergeForgetsWeights, "mean"),
        (MergeForgetsWeights, "refuse"),
    ],
)
def test_broken_merging_is_caught(broken, policy):
    # 1e16 + 1 + 1 is 1e16 from the left and 1e16 + 2 from the right.
    values = np.array([1e16, 1.0, 1.0])
    sources = [
        Source(np.zeros(1, np.int32), np.array([v]).view(np.uint64), np.zeros(1, np.uint64), w)
        for v, w in zip(values, [1.0 if policy == "sum" else 0.5] * 3, strict=True)
    ]
    case = (sources, np.array([[[0, 1]] * 3], np.int64), F64, policy, [0, 1, 2])
    check_merge(NativeCpu(), *case)
    with pytest.raises(AssertionError):
        check_merge(broken(), *case)


class RoundTwice(NativeCpu):
    def round(self, values, source, target):
        narrow, first = super().round(values, source, F32)
        rounded, second = super().round(narrow, F32, target)
        return rounded, first + second


class RoundTowardsZero(NativeCpu):
    def round(self, values, source, target):
        _, overflows = super().round(values, source, target)
        single, _ = super().round(values, source, F32)
        return (single >> 16).astype(np.uint16), overflows


@pytest.mark.parametrize("broken", [RoundTwice, RoundTowardsZero])
def test_broken_rounding_is_caught(broken):
    values = np.array([1.0, 1 + 2.0**-8 + 2.0**-40, -3.0]).view(np.uint64)
    check_round(NativeCpu(), values, "F64", "BF16")
    with pytest.raises(AssertionError):
        check_round(broken(), values, "F64", "BF16")


def test_backends_are_run_by_name():
    """One that this processor lacks is not in the list; the others are all there."""
    names = [parameter.id for parameter in BACKENDS]
    assert names[:3] == ["cpu-scalar-1", "cpu-scalar-2", "cpu-scalar-3"]
    assert len(names) == len(set(names)) >= 3
