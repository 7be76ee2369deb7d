"""Plain placement: tensors that live whole in one process, contiguous, transposed or strided."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.errors import CoverageError
from hotgraft.format import BLOCK, DTYPES, Bits, Positions, Row
from hotgraft.graft import Graft
from hotgraft.kernels import Backend, Table
from hotgraft.placement.slots import Slot
from hotgraft.placement.watch import Watch, watch


class Launch(NamedTuple):
    """One table and what to write through it."""

    table: Table
    new: Bits
    old: Bits
    origin: npt.NDArray[np.int64] | None
    """The graft entry behind each table entry, where placement reordered them."""
    rows: tuple[Row, ...]
    """The graft's rows of this launch, in table order."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A graft compiled for one host: a launch an item size."""

    graft: Graft
    launches: tuple[Launch, ...]
    watch: Watch
    """The parameters and buffers it writes."""

    def locate(self, launch: Launch, entry: int) -> tuple[str, int]:
        """The tensor's name and the C-order position behind a table entry."""
        if launch.origin is not None:
            entry = int(launch.origin[entry])
        for row in launch.rows:
            if entry < row.count:
                break
            entry -= row.count
        return row.name, row.block + int(self.graft.arrays(row).positions[entry])

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays, those shared with the graft included, each counted once."""
        arrays: dict[int, int] = {}
        for group in self.graft.groups.values():
            arrays.update({id(a): a.nbytes for a in group})
        tables = 0
        for launch in self.launches:
            arrays.update({id(launch.new): launch.new.nbytes, id(launch.old): launch.old.nbytes})
            tables += launch.table.nbytes
        shared = sum(g.positions.nbytes for g in self.graft.groups.values())
        return sum(arrays.values()) + tables - shared


def compile_plan(graft: Graft, slots: Mapping[str, Slot], backend: Backend) -> Plan:
    """Compile a graft whose names, shapes and dtypes are the slots'.

    Rows of contiguous tensors go into the table as they are, sharing the graft's arrays; rows of
    strided ones get memory offsets, in ascending order.

    Raises:
        CoverageError: two of its tensors share memory here but not their entries.
    """
    rows = _without_aliases(graft, slots)
    launches = []
    for size in (1, 2, 4, 8):
        mine = [row for row in rows if DTYPES[row.dtype].item_size == size]
        if mine:
            launches.append(_launch(graft, mine, slots, backend, size))
    return Plan(graft, tuple(launches), watch(tuple(slots[name] for name in graft.names)))


def _launch(
    graft: Graft, rows: list[Row], slots: Mapping[str, Slot], backend: Backend, size: int
) -> Launch:
    flat = all(slots[row.name].tensor.is_contiguous() for row in rows)
    if flat and rows == [row for row in graft.rows if row.dtype == rows[0].dtype]:
        positions, new, old = graft.groups[rows[0].dtype]
        segments = [
            (slots[row.name].tensor.data_ptr() + row.block * size, row.first, row.count)
            for row in rows
        ]
        table = backend.table(np.array(segments, np.int64), positions, size)
        shared = graft.rows if len(rows) == len(graft.rows) else tuple(rows)
        return Launch(table, new, old, None, shared)

    segments, parts, origins, done = [], [], [], 0
    for row in rows:
        tensor = slots[row.name].tensor
        offsets = memory_offsets(graft.arrays(row).positions, row, tensor)
        order = np.argsort(offsets, kind="stable")
        offsets = offsets[order]
        storage_blocks = offsets // BLOCK
        edges = np.flatnonzero(np.diff(storage_blocks)) + 1
        for begin, end in zip([0, *edges], [*edges, len(offsets)], strict=True):
            base = tensor.data_ptr() + int(storage_blocks[begin]) * BLOCK * size
            segments.append((base, done + int(begin), int(end - begin)))
        parts.append((offsets % BLOCK).astype(np.int32))
        origins.append(done + order)
        done += len(order)
    origin = np.concatenate(origins)
    new, old = (
        np.concatenate([graft.arrays(row)[part] for row in rows])[origin] for part in (1, 2)
    )
    table = backend.table(np.array(segments, np.int64), np.concatenate(parts), size)
    return Launch(table, new, old, origin, tuple(rows))


def memory_offsets(positions: Positions, row: Row, tensor: torch.Tensor) -> npt.NDArray[np.int64]:
    """Where a row's C-order positions lie in a strided tensor: element offsets from its address."""
    flat = positions.astype(np.int64) + row.block
    if tensor.is_contiguous():
        return flat
    offsets = np.zeros(len(flat), np.int64)
    for index, stride in zip(np.unravel_index(flat, row.shape), tensor.stride(), strict=True):
        offsets += index * stride
    return offsets


def _without_aliases(graft: Graft, slots: Mapping[str, Slot]) -> list[Row]:
    """The graft's rows, without those that would write what another row writes already.

    A checkpoint may hold two tensors that this host ties. That is well if the graft agrees with
    itself there, and an error otherwise.
    """
    extents = sorted((*_extent(slots[name].tensor), name) for name in graft.names)
    dropped: set[str] = set()
    for i, (_, end, name) in enumerate(extents):
        for begin, _, other in extents[i + 1 :]:
            if begin >= end:
                break
            mine, theirs = (_writes(graft, n, slots[n].tensor) for n in (name, other))
            if not np.intersect1d(mine[0], theirs[0], assume_unique=True).size:
                continue
            if not all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)):
                raise CoverageError(
                    f"{name!r} and {other!r} share memory in this host (tied?), but the graft's "
                    "entries for them differ; leave one of them out"
                )
            dropped.add(other)
    return [row for row in graft.rows if row.name not in dropped]


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes a tensor reaches: (begin, end) addresses."""
    begin = tensor.data_ptr()
    reach = sum(st * (sz - 1) for st, sz in zip(tensor.stride(), tensor.shape, strict=True))
    return begin, begin + (reach + 1) * tensor.element_size()


def _writes(graft: Graft, name: str, tensor: torch.Tensor) -> tuple[Bits, Bits, Bits]:
    """The addresses a graft writes in a tensor, ascending, with the new and old bits."""
    addresses, new, old = [], [], []
    for row in graft.rows:
        if row.name == name:
            part = graft.arrays(row)
            offsets = memory_offsets(part.positions, row, tensor)
            addresses.append(tensor.data_ptr() + offsets * tensor.element_size())
            new.append(part.new)
            old.append(part.old)
    where = np.concatenate(addresses)
    order = np.argsort(where, kind="stable")
    return where[order], np.concatenate(new)[order], np.concatenate(old)[order]
