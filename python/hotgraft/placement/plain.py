"""Plain placement: tensors that live whole in one process, contiguous, transposed or strided."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hotgraft.format import BLOCK, DTYPES, Bits, Row
from hotgraft.graft import Graft
from hotgraft.kernels import Backend, Table
from hotgraft.placement.memory import memory_offsets
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
    """Compile a graft whose names, shapes and dtypes are home slots'.

    Rows of contiguous tensors go into the table as they are, sharing the graft's arrays; rows of
    strided ones get memory offsets, in ascending order.
    """
    launches = []
    for size in (1, 2, 4, 8):
        mine = [row for row in graft.rows if DTYPES[row.dtype].item_size == size]
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
        offsets = memory_offsets(graft.arrays(row).positions.astype(np.int64) + row.block, tensor)
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
