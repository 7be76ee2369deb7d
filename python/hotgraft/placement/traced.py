"""Traced placement: checkpoint coordinates as the coordinates of a server's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.errors import BaseMismatchError, CoverageError, LayoutError
from hotgraft.graft import Graft
from hotgraft.placement.fit import assemble, rows_of, unite
from hotgraft.placement.memory import Offsets
from hotgraft.placement.names import Names, missing_message, resolve_names
from hotgraft.placement.slots import Slot
from hotgraft.weights import Checkpoint, Spec, sample

Placed = npt.NDArray[np.bool_]
"""For each entry of a graft, in the order of its rows, whether it has a place in this process."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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

    def find(self, offsets: Offsets) -> tuple[npt.NDArray[np.bool_], list[Offsets]]:
        """Which offsets are elements of the view, and the indices of these, a dimension each.

        Example:
            >>> inside, (row, column) = View(4, (2, 2), (1, 4)).find(np.array([3, 5, 8]))
            >>> inside.tolist(), row.tolist(), column.tolist()
            ([False, True, True], [1, 0], [0, 1])
        """
        rest = offsets - self.offset
        inside = rest >= 0
        found: list[Offsets] = [rest] * len(self.shape)
        # No two elements share memory, so the digits from the largest stride down are the only way.
        for i in sorted(range(len(self.shape)), key=self.strides.__getitem__, reverse=True):
            found[i], rest = np.divmod(rest, self.strides[i])
            inside &= found[i] < self.shape[i]
        inside &= rest == 0
        return inside, [index[inside] for index in found]

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


class Trace:
    """Where a checkpoint's coordinates live in a model whose layout is its own.

    Make one with `hotgraft.placement.trace`. One coordinate may have no place here (another rank
    holds it), one, or several.

    Args:
        slots: the model's parameters and buffers.
        specs: the checkpoint's tensors.
        regions: what was copied where.
        refused: tensors with a part that is no plain copy, and why.
        overwritten: for tensors whose place others take when they are loaded, these.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        specs: Mapping[str, Spec],
        regions: Mapping[str, Sequence[Region]],
        refused: Mapping[str, str],
        overwritten: Mapping[str, Collection[str]],
    ) -> None:
        self.slots = slots
        self.specs = dict(specs)
        self.regions = {name: tuple(found) for name, found in regions.items()}
        self.refused = dict(refused)
        self._overwritten = {name: set(others) for name, others in overwritten.items()}
        self._refuse_derived()

    def verify(
        self, checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Compare every traced coordinate with the checkpoint, bit for bit.

        What differs was repacked or computed after it was loaded; it is refused from then on. It
        reads everything, some seconds a GB.

        Args:
            checkpoint: what the model was loaded from.
            progress: called with the elements compared so far and in all.
        """
        total = sum(prod(spec.shape) for spec in self.specs.values())
        done = 0
        for name, regions in self.regions.items():
            whole = checkpoint.tensor(name)
            for region in regions:
                held = region.target.within(self.slots[region.slot].tensor.detach())
                wanted = region.source.within(whole).to(held.device, held.dtype)
                kind = _INTEGERS[held.element_size()]
                if not torch.equal(held.view(kind), wanted.view(kind)):
                    self.refused.setdefault(
                        name,
                        f"{region.slot!r} holds other bits than the checkpoint where it was loaded "
                        "(repacked, scaled or changed after loading)",
                    )
            done += prod(self.specs[name].shape)
            if progress is not None:
                progress(done, total)

    def place(
        self, graft: Graft, model: torch.nn.Module, names: Names | None = None
    ) -> tuple[Graft, Placed]:
        """A graft of the checkpoint as one of the model's own tensors: names, shapes, positions.

        The time is in proportion to its entries.

        Args:
            graft: in the checkpoint's coordinates.
            model: it says which names are tied.
            names: the checkpoint's name for each of the graft's, where they differ.

        Returns:
            The graft in the model's coordinates, which may be empty, and which entries it has.

        Raises:
            CoverageError: the checkpoint lacks a tensor, or entries that share memory here differ.
            LayoutError: a tensor was not placed by plain copies.
            BaseMismatchError: a tensor has another shape.
        """
        found, missing = resolve_names(graft.names, self.specs, model, names)
        if missing:
            raise CoverageError(missing_message(missing, self.specs))
        shapes = graft.shapes  # made anew at each call
        for name in graft.names:
            self._require_plain(name, found[name], shapes[name])
            absent = self._overwritten.get(found[name], set()) - set(found.values())
            if absent:
                raise LayoutError(
                    f"the place of {name!r} is taken by {sample(absent)} when this server loads "
                    "it (tied), and the graft has no entries of that: put the same ones there"
                )
        placed = np.zeros(graft.nnz, np.bool_)
        parts: dict[tuple[str, str], list[tuple[Offsets, ...]]] = {}
        tellers: dict[str, list[str]] = {}
        at = 0
        for row in graft.rows:
            positions, new, old = graft.arrays(row)
            where = positions.astype(np.int64) + row.block
            for region in self.regions.get(found[row.name], ()):
                # Only these can be in the region; positions ascend.
                low, high = np.searchsorted(where, (region.source.offset, region.source.end))
                inside, indices = region.source.find(where[low:high])
                entries = low + np.flatnonzero(inside)
                if len(entries):
                    slot = self.slots[region.slot]
                    offsets = region.target.offsets(indices, len(entries))
                    inside_slot = _positions(offsets, slot.tensor)
                    key = region.slot, row.dtype
                    parts.setdefault(key, []).append((inside_slot, new[entries], old[entries]))
                    tellers.setdefault(region.slot, []).append(row.name)
                    placed[at + entries] = True
            at += row.count
        rows = []
        dtypes: dict[str, str] = {}
        for (name, dtype), columns in parts.items():
            if dtypes.setdefault(name, dtype) != dtype:
                raise BaseMismatchError(
                    f"{name!r} holds {sample(set(tellers[name]))} here, some of which are {dtype} "
                    f"in the graft and some {dtypes[name]}"
                )
            united = unite(tellers[name], *(np.concatenate(c) for c in zip(*columns, strict=True)))
            rows += rows_of(name, self.slots[name].shape, dtype, *united)
        return assemble(graft, rows), placed

    def _require_plain(self, name: str, known: str, shape: tuple[int, ...]) -> None:
        if known in self.refused:
            raise LayoutError(
                f"{name!r} cannot be grafted into this server: {self.refused[known]}. Leave it out "
                "of the mask, or serve with a layout that keeps it as it is in the checkpoint"
            )
        if known not in self.regions:
            raise LayoutError(
                f"{name!r} is not loaded by this server: no parameter was filled from it (a tied "
                "head, or a part that the server does not use); leave it out of the graft"
            )
        if shape != self.specs[known].shape:
            raise BaseMismatchError(
                f"{name!r} has shape {list(shape)} in the graft and "
                f"{list(self.specs[known].shape)} in the checkpoint: it was made for another model"
            )

    def _refuse_derived(self) -> None:
        """Refuse what ends in memory that another slot, or none, can speak for."""
        for name, regions in self.regions.items():
            for region in regions:
                if self.slots[region.slot].rival is not None:
                    self.refused.setdefault(name, f"{region.slot!r} overlaps another parameter")


def _positions(offsets: Offsets, tensor: torch.Tensor) -> Offsets:
    """C-order positions in a tensor of elements by their offsets in memory."""
    if tensor.is_contiguous():
        return offsets
    view = View.of(tensor)._replace(offset=0)
    inside, indices = view.find(offsets)
    if not inside.all():
        raise LayoutError("the loader wrote between the elements of a strided parameter")
    found: Offsets = np.ravel_multi_index(tuple(indices), view.shape)
    return found
