"""Regions: slices of a checkpoint's tensors, and finding those that a coordinate is in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.placement.memory import Offsets, carried, digits


class View(NamedTuple):
    """Some elements of a tensor: an offset from its first one, a shape and strides, in elements."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> View:
        """A tensor as a view of its storage, without dimensions of size 1."""
        kept = [i for i, size in enumerate(tensor.shape) if size != 1]
        return cls(
            int(tensor.storage_offset()),
            tuple(tensor.shape[i] for i in kept),
            tuple(tensor.stride(i) for i in kept),
        )

    @property
    def end(self) -> int:
        """One more than the furthest offset."""
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + sum((size - 1) * stride for size, stride in steps) + 1

    @property
    def descending(self) -> list[int]:
        """The dimensions, that of the largest stride first."""
        return sorted(range(len(self.strides)), key=self.strides.__getitem__, reverse=True)

    def find(self, offsets: Offsets) -> tuple[npt.NDArray[np.bool_], list[Offsets]]:
        """Which offsets are elements of the view, and the indices of these, a dimension each.

        Example:
            >>> inside, (row, column) = View(4, (2, 2), (1, 4)).find(np.array([3, 5, 8]))
            >>> inside.tolist(), row.tolist(), column.tolist()
            ([False, True, True], [1, 0], [0, 1])
        """
        order = self.descending
        *found, rest = digits(offsets - self.offset, [self.strides[i] for i in order])
        inside = rest == 0
        # No two elements share memory, so there is no other way to say an offset.
        for i, digit in zip(order, found, strict=True):
            inside &= (digit >= 0) & (digit < self.shape[i])
        return inside, [found[order.index(i)][inside] for i in range(len(order))]

    def offsets(self, indices: Sequence[Offsets], count: int) -> Offsets:
        """The offsets of `count` elements by their indices."""
        found = np.full(count, self.offset, np.int64)
        for index, stride in zip(indices, self.strides, strict=True):
            found += index * stride
        return found

    def within(self, flat: torch.Tensor) -> torch.Tensor:
        """The view's elements of a tensor's; offsets count from the tensor's first element."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.offset)


class Region(NamedTuple):
    """A slice of a checkpoint's tensor, and where it lies: element by element the same."""

    slot: str
    """The home slot's name."""
    source: View
    """Of the checkpoint's tensor, in C order."""
    target: View
    """From the slot's first element in memory."""

    @property
    def flatter(self) -> Region:
        """The same with dimensions joined that follow one another on both sides.

        Example:
            >>> rows = View(8, (2, 4), (4, 1))
            >>> Region("w", rows, rows).flatter.source
            View(offset=8, shape=(8,), strides=(1,))
        """
        dims: list[tuple[int, int, int]] = []
        for i in self.source.descending:
            size, mine, theirs = (
                self.source.shape[i], self.source.strides[i], self.target.strides[i]
            )  # fmt: skip
            if dims and dims[-1][1:] == (size * mine, size * theirs):
                size *= dims.pop()[0]
            dims.append((size, mine, theirs))
        shape, source, target = zip(*dims, strict=True) if dims else ((), (), ())
        return Region(
            self.slot,
            View(self.source.offset, shape, source),
            View(self.target.offset, shape, target),
        )


class Regions:
    """Regions of one tensor whose sources differ in where they begin alone: a family.

    What is in one of them is found in time that grows with the logarithm of their number. For that,
    what tells the sources apart must be the digits of their first offsets, and two of them must be
    the same or apart in each digit; `families` sees to it.

    Args:
        regions: the family.
        origin: of the digits.
    """

    def __init__(self, regions: Sequence[Region], origin: int = 0) -> None:
        source = regions[0].source
        order = source.descending
        self._origin = origin
        self._strides = [source.strides[i] for i in order]
        self._sizes = [*(source.shape[i] for i in order), 1]
        self._begin = min(region.source.offset for region in regions)
        self._end = max(region.source.end for region in regions)
        firsts = _firsts(regions, self._strides, origin)
        self._starts = [np.unique(first) for first in firsts]
        keys = self._keys_of(
            [np.searchsorted(*pair) for pair in zip(self._starts, firsts, strict=True)]
        )
        ranks = np.argsort(keys, kind="stable")
        self._keys = keys[ranks]
        names = [regions[rank].slot for rank in ranks]
        self._names = sorted(set(names))
        self._slots = np.searchsorted(self._names, names)
        targets = [regions[rank].target for rank in ranks]
        self._offsets = np.array([target.offset for target in targets], np.int64)
        self._steps = [np.array([t.strides[i] for t in targets], np.int64) for i in order]

    @classmethod
    def families(cls, regions: Iterable[Region]) -> list[Regions]:
        """Regions of one tensor, as few families as that takes or nearly so."""
        alike: dict[tuple[tuple[int, ...], ...], list[Region]] = {}
        for region in (region.flatter for region in regions):
            alike.setdefault((region.source.shape, region.source.strides), []).append(region)
        return [family for group in alike.values() for family in cls._split(group)]

    @classmethod
    def _split(cls, group: list[Region]) -> list[Regions]:
        """What is alike, as families."""
        source = group[0].source
        strides = [source.strides[i] for i in source.descending]
        sizes = [source.shape[i] for i in source.descending]
        firsts = _firsts(group, strides, 0)
        odd = carried(firsts, [*sizes, 1], strides)
        families = [cls([group[i]], group[i].source.offset) for i in np.flatnonzero(odd)]
        # Where they overlap in part, only those whole sizes apart are a family.
        pairs = list(zip(firsts, sizes, strict=False))
        apart = [(np.diff(np.unique(first[~odd])) >= size).all() for first, size in pairs]
        shifts = [
            first % (1 if ok else size) for (first, size), ok in zip(pairs, apart, strict=True)
        ]
        classes: dict[tuple[int, ...], list[Region]] = {}
        for i in np.flatnonzero(~odd):
            classes.setdefault(tuple(int(shift[i]) for shift in shifts), []).append(group[i])
        return families + [cls(members) for members in classes.values()]

    def find(self, where: Offsets) -> Iterator[tuple[str, npt.NDArray[np.intp], Offsets]]:
        """Where elements of the tensor lie.

        Args:
            where: their offsets, ascending.

        Yields:
            a slot's name, which of them it has, and at what offsets from its first element. One
            that lies in several places comes as often.
        """
        low, high = np.searchsorted(where, (self._begin, self._end))
        if low == high:
            return
        inside = np.ones(high - low, np.bool_)
        keys = np.zeros(high - low if len(self._keys) > 1 else 0, np.intp)
        indices = []
        found = digits(where[low:high] - self._origin, self._strides)
        for digit, starts, size in zip(found, self._starts, self._sizes, strict=True):
            if len(starts) > 1:
                cell = np.searchsorted(starts[1:], digit, side="right")
                keys = keys * len(starts) + cell
                index = digit - starts[cell]
            else:
                index = digit - starts[0]
            inside &= (index >= 0) & (index < size)
            indices.append(index)
        hits = np.flatnonzero(inside)
        region: npt.NDArray[np.intp] | int = 0
        if len(self._keys) > 1:
            first, past = (np.searchsorted(self._keys, keys[hits], s) for s in ("left", "right"))
            often = past - first
            nth = np.arange(often.sum()) - np.repeat(np.cumsum(often) - often, often)
            hits, region = np.repeat(hits, often), np.repeat(first, often) + nth
        offsets = np.full(len(hits), self._offsets[region])
        for index, steps in zip(indices, self._steps, strict=False):
            offsets += index[hits] * steps[region]
        if len(self._names) == 1:
            yield self._names[0], low + hits, offsets
            return
        slots = self._slots[region]
        for slot in np.unique(slots):
            mine = slots == slot
            yield self._names[slot], low + hits[mine], offsets[mine]

    def _keys_of(self, cells: Sequence[npt.NDArray[np.intp]]) -> npt.NDArray[np.intp]:
        """A number for each tuple of cells, one a digit."""
        keys = np.zeros(len(cells[0]), np.intp)
        for cell, starts in zip(cells, self._starts, strict=True):
            keys = keys * len(starts) + cell
        return keys


def _firsts(regions: Sequence[Region], strides: Sequence[int], origin: int) -> list[Offsets]:
    """The digits of their sources' first elements."""
    return digits(np.array([r.source.offset for r in regions], np.int64) - origin, strides)
