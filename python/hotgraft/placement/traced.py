"""Traced placement: checkpoint coordinates as the coordinates of a server's own tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.errors import BaseMismatchError, CoverageError, GraftError, LayoutError
from hotgraft.graft import Graft
from hotgraft.placement.fit import assemble, rows_of, unite
from hotgraft.placement.memory import Offsets
from hotgraft.placement.names import Names, missing_message, resolve_names
from hotgraft.placement.orders import Order
from hotgraft.placement.regions import Region, Regions, View
from hotgraft.placement.slots import Slot
from hotgraft.weights import Checkpoint, Spec, sample

Placed = npt.NDArray[np.bool_]
"""For each entry of a graft, in the order of its rows, whether it has a place in this process."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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
        self._found = {name: Regions.families(found) for name, found in regions.items()}
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
        at, loaded = "", torch.empty(0)  # regions of one slot mostly follow one another
        for name, regions in self.regions.items():
            whole = checkpoint.tensor(name)
            for region in regions:
                if region.slot != at:
                    at, loaded = region.slot, _as_loaded(self.slots[region.slot].tensor)
                held = region.target.within(loaded)
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

        The time grows with its entries, and with the logarithm of the regions of a tensor.

        Args:
            graft: in the checkpoint's coordinates.
            model: it says which names are tied.
            names: the checkpoint's name for each of the graft's, where they differ.

        Returns:
            The graft in the model's coordinates, which may be empty, and which entries it has.

        Raises:
            GraftError: it is none, but a path, say.
            CoverageError: the checkpoint lacks a tensor, or entries that share memory here differ.
            LayoutError: a tensor was not placed by plain copies.
            BaseMismatchError: a tensor has another shape.
        """
        if not isinstance(graft, Graft):
            raise GraftError(f"{graft!r} is no Graft; Graft.load(path) reads one")
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
            for family in self._found.get(found[row.name], ()):
                for name, entries, offsets in family.find(where):
                    inside_slot = _positions(offsets, self.slots[name].tensor)
                    key = name, row.dtype
                    parts.setdefault(key, []).append((inside_slot, new[entries], old[entries]))
                    tellers.setdefault(name, []).append(row.name)
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


def _as_loaded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy with its elements where the loader wrote them."""
    order = Order.of(tensor)
    return tensor.detach() if order is None else order.plain(tensor)


def _positions(offsets: Offsets, tensor: torch.Tensor) -> Offsets:
    """C-order positions in a tensor of elements by the offsets at which they were loaded."""
    order = Order.of(tensor)
    if order is not None:
        return order.positions(offsets)
    if tensor.is_contiguous():
        return offsets
    view = View.of(tensor)._replace(offset=0)
    inside, indices = view.find(offsets)
    if not inside.all():
        raise LayoutError("the loader wrote between the elements of a strided parameter")
    found: Offsets = np.ravel_multi_index(tuple(indices), view.shape)
    return found
