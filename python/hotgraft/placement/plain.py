"""Plain placement: tensors that live whole in one process, contiguous, transposed or strided."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hotgraft import kernels
from hotgraft.errors import BackendError
from hotgraft.format import BLOCK, DTYPES, Group, Row
from hotgraft.graft import Graft
from hotgraft.kernels import Backend, Part
from hotgraft.placement.memory import memory_offsets
from hotgraft.placement.slots import Slot
from hotgraft.placement.watch import Watch, watch

Backends = Mapping[torch.device, Backend]
"""The backend of each device that holds weights."""


def resolve_backends(
    slots: Mapping[str, Slot], name: str | None, stream: torch.cuda.Stream | None
) -> dict[torch.device, Backend]:
    """The backend of each device that holds a tensor, by name or the best one.

    Raises:
        BackendError: naming a tensor that there is none for.
    """
    found: dict[torch.device, Backend] = {}
    for slot in slots.values():
        device = slot.tensor.device
        if device not in found and device.type != "meta":
            mine = stream if stream is not None and stream.device == device else None
            try:
                found[device] = kernels.resolve(name, device, mine)
            except BackendError as error:
                raise BackendError(f"{slot.name!r} is on {str(device)!r}: {error}") from error
    return found or {torch.device("cpu"): kernels.resolve(name)}


class Launch(NamedTuple):
    """One table and what to write through it."""

    device: torch.device
    table: Any
    new: Any
    """As the device's backend holds values, like `old`."""
    old: Any
    origin: npt.NDArray[np.int64] | None
    """The graft entry behind each table entry, where placement reordered them."""
    rows: tuple[Row, ...]
    """The graft's rows of this launch, in table order."""
    segments: npt.NDArray[np.int64]
    """int64[n][3]: what the table was made of."""


class Plan:
    """A graft compiled for one host: a launch an item size and device.

    Args:
        graft: the graft, or what makes it when it is asked for.
        launches: what to write.
        watch: the parameters and buffers it writes.
    """

    def __init__(
        self, graft: Graft | Callable[[], Graft], launches: Sequence[Launch], watch: Watch
    ) -> None:
        self._graft = graft
        self.launches = tuple(launches)
        self.watch = watch

    @functools.cached_property
    def graft(self) -> Graft:
        """What it writes. A set that was composed on a device is fetched from there at first."""
        return self._graft if isinstance(self._graft, Graft) else self._graft()

    @property
    def at_hand(self) -> bool:
        """Whether asking for the graft costs nothing."""
        return isinstance(self._graft, Graft) or "graft" in vars(self)

    @property
    def nnz(self) -> int:
        """Entries that it writes."""
        return sum(row.count for launch in self.launches for row in launch.rows)

    def locate(self, launch: Launch, entry: int) -> tuple[str, int]:
        """The tensor's name and the C-order position behind a table entry."""
        if launch.origin is not None:
            entry = int(launch.origin[entry])
        for here in launch.rows:
            if entry < here.count:
                break
            entry -= here.count
        # A set composed on devices numbers its entries anew when it becomes a graft.
        row = next(r for r in self.graft.rows if (r.name, r.block) == (here.name, here.block))
        return row.name, row.block + int(self.graft.arrays(row).positions[entry])

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays, on devices and, where the graft is at hand, in host memory."""
        groups = self.graft.groups.values() if self.at_hand else ()
        found = sum(array.nbytes for group in groups for array in group)
        for launch in self.launches:
            found += launch.table.nbytes
            if any(launch.new is group.new for group in groups):
                found -= 4 * launch.table.n_entries  # positions that the graft has too
            else:
                found += launch.new.nbytes + launch.old.nbytes
        return int(found)


def compile_plan(graft: Graft, slots: Mapping[str, Slot], backends: Backends) -> Plan:
    """Compile a graft whose names, shapes and dtypes are home slots'.

    Rows of contiguous tensors go into the table as they are, sharing the graft's arrays; rows of
    strided ones get memory offsets, in ascending order.
    """
    shares: dict[tuple[torch.device, int], list[Row]] = {}
    for row in graft.rows:
        key = slots[row.name].tensor.device, DTYPES[row.dtype].item_size
        shares.setdefault(key, []).append(row)
    launches = []
    for device, backend in backends.items():
        sizes = sorted(size for where, size in shares if where == device)
        drafts = [_draft(graft, shares[device, size], slots, size) for size in sizes]
        loaded = backend.prepare([part for part, _, _ in drafts]) if drafts else []
        for (part, origin, rows), there in zip(drafts, loaded, strict=True):
            launches.append(Launch(device, *there, origin, rows, part.segments))
    return Plan(graft, launches, watch(tuple(slots[name] for name in graft.names)))


def _draft(
    graft: Graft, rows: list[Row], slots: Mapping[str, Slot], size: int
) -> tuple[Part, npt.NDArray[np.int64] | None, tuple[Row, ...]]:
    if all(slots[row.name].tensor.is_contiguous() for row in rows):
        addresses = [slots[row.name].tensor.data_ptr() + row.block * size for row in rows]
        counts = np.array([row.count for row in rows], np.int64)
        segments = np.stack([np.array(addresses, np.int64), np.cumsum(counts) - counts, counts], 1)
        if rows == [row for row in graft.rows if row.dtype == rows[0].dtype]:
            group = graft.groups[rows[0].dtype]
        else:
            columns = zip(*(graft.arrays(row) for row in rows), strict=True)
            group = Group(*(np.concatenate(column) for column in columns))
        shared = graft.rows if len(rows) == len(graft.rows) else tuple(rows)
        return Part(segments, *group, size), None, shared

    pieces, parts, origins, done = [], [], [], 0
    for row in rows:
        tensor = slots[row.name].tensor
        offsets = memory_offsets(graft.arrays(row).positions.astype(np.int64) + row.block, tensor)
        order = np.argsort(offsets, kind="stable")
        offsets = offsets[order]
        storage_blocks = offsets // BLOCK
        edges = np.flatnonzero(np.diff(storage_blocks)) + 1
        for begin, end in zip([0, *edges], [*edges, len(offsets)], strict=True):
            base = tensor.data_ptr() + int(storage_blocks[begin]) * BLOCK * size
            pieces.append((base, done + int(begin), int(end - begin)))
        parts.append((offsets % BLOCK).astype(np.int32))
        origins.append(done + order)
        done += len(order)
    origin = np.concatenate(origins)
    new, old = (
        np.concatenate([graft.arrays(row)[part] for row in rows])[origin] for part in (1, 2)
    )
    part = Part(np.array(pieces, np.int64), np.concatenate(parts), new, old, size)
    return part, origin, tuple(rows)
