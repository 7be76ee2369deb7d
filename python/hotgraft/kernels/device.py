"""What the device backends (`cuda`, `triton`) share: tables and values in device memory, streams.

A backend belongs to one device. Tables and values are torch tensors there; torch allocates and
copies, the kernels get addresses. Every launch goes to the stream given when the backend was made,
or to the one that is current when it is called. Nothing waits for the device but what must return
numbers (`compare`, `select`, `difference`, `merge`, `read`), and `assemble`.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hotgraft import pinned
from hotgraft.errors import BackendError, DeviceMemoryError
from hotgraft.format import Bits, DType, Group, Positions
from hotgraft.kernels import (
    Loaded,
    Merged,
    NanDifferenceError,
    Pair,
    Part,
    Room,
    Source,
    ranking,
)

TILE = 2048
"""Entries that one block (CUDA) or program (Triton) moves."""
ALIGNMENT = 16
"""Bytes: where positions and values begin, so that they can be loaded 16 at a time."""

Device = torch.Tensor
"""A flat tensor in device memory. Values are `torch.uint8` bytes: moves know no types."""


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceTable:
    """A table in device memory."""

    segments: Device
    """int64[n][3]: address, first entry, count."""
    tiles: Device
    """int32[tiles + 1]: the segment of each tile's first entry; at the end, the last segment."""
    positions: Device
    """int32[n_entries]"""
    item_size: int
    stream: int = 0
    """The stream that it, and the values loaded with it, were allocated on."""

    @property
    def n_entries(self) -> int:
        return len(self.positions)

    @property
    def n_segments(self) -> int:
        return len(self.segments)

    @property
    def nbytes(self) -> int:
        return self.segments.nbytes + self.tiles.nbytes + self.positions.nbytes


class Move(NamedTuple):
    """A table, and what goes into its cells."""

    table: DeviceTable
    values: Device


class DeviceSource(NamedTuple):
    """One graft's arrays of one dtype in device memory, for a merge."""

    positions: Device
    new: Device
    old: Device
    weight: float


class DeviceMerged(NamedTuple):
    """What a merge found; the union's arrays stay on the device. See `Merged`."""

    counts: npt.NDArray[np.int64]
    positions: Device
    new: Device
    old: Device
    conflicts: npt.NDArray[np.int64]
    base_mismatches: int
    first_base_mismatch: tuple[int, int] | None
    overflows: int
    first_overflow: tuple[int, int] | None


def tiles_of(segments: npt.NDArray[np.int64], n_entries: int) -> npt.NDArray[np.int32]:
    """The segment of each tile's first entry, and the last segment.

    Example:
        >>> tiles_of(np.array([[0, 0, 2000], [0, 2000, 3000]]), 5000).tolist()
        [0, 1, 1, 1]
    """
    firsts = np.arange(0, n_entries, TILE)
    found = np.searchsorted(segments[:, 1], firsts, side="right") - 1
    return np.append(found, len(segments) - 1).astype(np.int32)


class DeviceBackend(abc.ABC):
    """The verbs on one device; a subclass brings the kernels.

    Args:
        device: where the weights are.
        stream: what to launch on; by default torch's current stream at each call.
    """

    name: str
    exchanges = True

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device = device
        self.stream = stream

    # ---- the kernels -----------------------------------------------------------------------------
    # Called with the device and the stream current. Arguments were checked.

    @abc.abstractmethod
    def _gather(self, table: DeviceTable, values: Device) -> None:
        """Enqueue: copy the cells into `values`."""

    @abc.abstractmethod
    def _scatter(self, moves: Sequence[Move]) -> None:
        """Enqueue one launch: one move, or two of one item size that share no cell."""

    @abc.abstractmethod
    def _compare(self, table: DeviceTable, values: Device, report: Device) -> None:
        """Enqueue: report[0] += cells that differ; report[1] = max(report[1], n_entries - entry)
        over those entries. `report` is int64[2], zeros at first."""

    @abc.abstractmethod
    def _differing(self, base: Device, finetuned: Device, item_size: int) -> Device:
        """int32: the ascending items at which two byte tensors of equal length differ."""

    @abc.abstractmethod
    def _count_scores(
        self, base: Device, finetuned: Device, dtype: DType, shift: int, prefix: int, bins: Device
    ) -> int:
        """Add to bins (int64[65536]) the scores whose bits above shift + 16 equal `prefix`, by
        their next 16 bits; returns the lowest item whose difference is NaN, or -1."""

    @abc.abstractmethod
    def _collect(
        self, base: Device, finetuned: Device, dtype: DType, lowest: int, ties: int
    ) -> tuple[Device, Device]:
        """int32 positions and int64 score bits, ascending by position, of the differing items that
        score at least `lowest`; of those that score `lowest` only the first `ties`."""

    @abc.abstractmethod
    def _merge(
        self,
        sources: Sequence[DeviceSource],
        ranges: npt.NDArray[np.int64],
        dtype: DType,
        policy: str,
        order: Sequence[int],
    ) -> DeviceMerged:
        """See `Backend.merge`. Entries stay on the device; counts and conflicts come back."""

    # ---- memory ----------------------------------------------------------------------------------

    def prepare(self, parts: Sequence[Part]) -> list[Loaded]:
        """Upload tables and values into one buffer."""
        arrays: list[npt.NDArray[np.generic]] = []
        for part in parts:
            self._check_part(part)
            tiles = tiles_of(part.segments, len(part.positions))
            arrays += [part.segments, tiles, part.positions, part.new, part.old]
        tensors = iter(self._upload(arrays))
        loaded = []
        for part in parts:
            segments, tiles_there, positions, new, old = (next(tensors) for _ in range(5))
            table = DeviceTable(
                segments.view(torch.int64).view(-1, 3),
                tiles_there.view(torch.int32),
                positions.view(torch.int32),
                part.item_size,
                self._stream(),
            )
            loaded.append(Loaded(table, new, old))
        return loaded

    def table(
        self, segments: npt.NDArray[np.int64], positions: Positions, item_size: int
    ) -> DeviceTable:
        nothing = np.empty(0, np.uint8)
        table: DeviceTable = self.prepare([Part(segments, positions, nothing, nothing, item_size)])[
            0
        ].table
        return table

    def assemble(
        self, segments: npt.NDArray[np.int64], positions: Device, item_size: int
    ) -> DeviceTable:
        """A table of positions that are on the device already; it is there when this returns."""
        there, tiles = self._upload([segments, tiles_of(segments, len(positions))])
        if self.device.type == "cuda":  # another stream may be the first to use it
            with self._current():
                torch.cuda.current_stream().synchronize()
        return DeviceTable(
            there.view(torch.int64).view(-1, 3),
            tiles.view(torch.int32),
            positions,
            item_size,
            self._stream(),
        )

    def nothing(self) -> tuple[Device, Device, Device]:
        """The arrays of a graft without entries."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.device)
        return empty.view(torch.int32), empty, empty

    def values(self, bits: Bits) -> Device:
        return self._upload([bits])[0]

    def read(self, values: Device, bits: np.dtype[np.unsignedinteger]) -> Bits:
        with self._current():
            return values.cpu().numpy().view(bits)

    def _upload(self, arrays: Sequence[npt.NDArray[np.generic]]) -> list[Device]:
        """The arrays' bytes, each at a multiple of ALIGNMENT, in one buffer.

        What lies in pinned memory is copied from there; all else in one copy, by way of a pinned
        buffer.
        """
        kept = [pinned.bytes_of(array) for array in arrays]
        firsts, room, staging = [0] * len(arrays), 0, 0
        for i in sorted(range(len(arrays)), key=lambda i: kept[i] is not None):
            firsts[i] = room
            room += -(-arrays[i].nbytes // ALIGNMENT) * ALIGNMENT
            staging = room if kept[i] is None else staging
        on_gpu = self.device.type == "cuda"
        with self._room(f"{room:,} bytes"):
            there = staged = self._aligned(staging if on_gpu else room, pin=on_gpu)
            host = staged.numpy()
            for first, array, source in zip(firsts, arrays, kept, strict=True):
                if source is None:
                    flat = np.ascontiguousarray(array).view(np.uint8).ravel()
                    host[first : first + array.nbytes] = flat
            with self._current():
                if on_gpu:
                    there = torch.empty(room, dtype=torch.uint8, device=self.device)
                    there[:staging].copy_(staged, non_blocking=True)
                for first, source in zip(firsts, kept, strict=True):
                    if source is not None:
                        there[first : first + len(source)].copy_(source, non_blocking=True)
        return [
            there[first : first + array.nbytes] for first, array in zip(firsts, arrays, strict=True)
        ]

    @staticmethod
    def _aligned(nbytes: int, *, pin: bool) -> torch.Tensor:
        """Host memory that begins at a multiple of ALIGNMENT."""
        found = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=pin)
        skew = -found.data_ptr() % ALIGNMENT
        return found[skew : skew + nbytes]

    @contextlib.contextmanager
    def _room(self, what: str) -> Iterator[None]:
        """Say in our words that memory ran out."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                f"{self.device} has no room for {what}: unload a skill, or call "
                "torch.cuda.empty_cache() if others need what torch keeps"
            ) from error

    def _current(self) -> contextlib.AbstractContextManager[object]:
        """This backend's device and stream are torch's current ones."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        if self.stream is not None:
            return torch.cuda.stream(self.stream)
        return torch.cuda.device(self.device)

    def _check_part(self, part: Part) -> None:
        segments = part.segments
        if part.item_size not in {1, 2, 4, 8}:
            raise ValueError("item_size must be 1, 2, 4 or 8")
        if segments.ndim != 2 or segments.shape[1] != 3 or not len(segments):
            raise ValueError("segments must be int64[n > 0][3]: base address, first entry, count")
        ends = np.cumsum(segments[:, 2])
        gapless = np.array_equal(segments[:, 1], ends - segments[:, 2])
        if not gapless or segments[:, 2].min() <= 0 or ends[-1] != len(part.positions):
            raise ValueError("segments must cover the positions exactly, in order, none empty")
        askew = np.flatnonzero(segments[:, 0] % part.item_size)
        if len(askew):
            raise BackendError(
                f"segment {askew[0]} begins at {int(segments[askew[0], 0]):#x}, no multiple of its "
                f"items' {part.item_size} bytes: clone the tensor"
            )

    def _stream(self) -> int:
        """The number of the stream that launches and allocations go to now."""
        if self.device.type != "cuda":
            return 0
        stream = self.stream or torch.cuda.current_stream(self.device)
        number: int = stream.cuda_stream
        return number

    def _keep(self, *moves: Move) -> None:
        """Their memory is not given to others before what is enqueued on this stream is done.

        Needed where it was allocated on another one, as happens when the current stream changes.
        """
        for table, values in moves:
            if table.stream != self._stream():
                current = self.stream or torch.cuda.current_stream(self.device)
                for tensor in (table.segments, table.tiles, table.positions, values):
                    tensor.record_stream(current)

    def _check_values(self, table: DeviceTable, values: Device) -> None:
        if values.device != table.positions.device:
            raise BackendError(f"values are on {values.device}, the table on {self.device}")
        if values.dtype != torch.uint8 or values.nbytes != table.n_entries * table.item_size:
            raise ValueError(
                f"values must be {table.n_entries} items of {table.item_size} bytes, as uint8"
            )

    # ---- the verbs -------------------------------------------------------------------------------

    def prefetch(self, table: DeviceTable, values: Device) -> None:  # noqa: ARG002
        return  # a device hides its latency by itself

    def gather(self, table: DeviceTable, values: Device) -> None:
        self._check_values(table, values)
        with self._current():
            self._gather(table, values)

    def scatter(self, table: DeviceTable, values: Device) -> None:
        self._check_values(table, values)
        with self._current():
            self._scatter([Move(table, values)])
        self._keep(Move(table, values))

    def exchange(self, leaving: Move, entering: Move) -> None:
        """Both scatters in one launch; they share no cell and have items of one size."""
        for table, values in (leaving, entering):
            self._check_values(table, values)
        with self._current():
            self._scatter([Move(*leaving), Move(*entering)])
        self._keep(Move(*leaving), Move(*entering))

    def compare(self, table: DeviceTable, values: Device) -> tuple[int, int]:
        self._check_values(table, values)
        with self._current():
            report = torch.zeros(2, dtype=torch.int64, device=self.device)
            self._compare(table, values, report)
            count, from_end = report.tolist()
        return count, table.n_entries - from_end if count else -1

    def difference(self, pair: Pair, room: Room) -> None:
        base, finetuned = self._bytes(pair)
        size = pair.dtype.item_size
        with self._current():
            at = self._differing(base, finetuned, size)
            group = room(len(at))
            group.positions[:] = at.cpu().numpy()
            for tensor, values in ((finetuned, group.new), (base, group.old)):
                items = tensor.view(-1, size)[at.long()]
                values[:] = items.cpu().numpy().view(values.dtype).ravel()

    def select(self, pairs: Iterable[Pair], k: int | None) -> list[Positions]:
        with self._current():
            if k is None:
                return [self._differing(*self._bytes(p), p.dtype.item_size).cpu().numpy()
                        for p in pairs]  # fmt: skip
            bound = ranking.find_bound(
                k, lambda shift, prefix, _: self._counted(pairs, shift, prefix)
            )
            if bound is None:
                return self.select(pairs, None)
            lowest, ties = bound
            positions, keys = [], []
            for p in pairs:
                here, scores = self._collect(*self._bytes(p), p.dtype, lowest, ties)
                ties -= int((scores == lowest).sum())
                positions.append(here.cpu().numpy())
                keys.append(scores.cpu().numpy().view(np.uint64))
        return ranking.keep_largest(positions, keys, k)

    def _counted(self, pairs: Iterable[Pair], shift: int, prefix: int) -> ranking.Counts:
        bins = torch.zeros(ranking.BINS, dtype=torch.int64, device=self.device)
        for index, p in enumerate(pairs):
            nan = self._count_scores(*self._bytes(p), p.dtype, shift, prefix, bins)
            if nan >= 0:
                raise NanDifferenceError(index, nan)
        return bins.cpu().numpy()

    def _bytes(self, pair: Pair) -> tuple[Device, Device]:
        """The two tensors' bytes, on this device."""
        # Of an empty tensor torch may say that it has no stride, and then give no view of it.
        flat = (t.to(self.device).as_strided((t.numel(),), (1,)) for t in pair[:2])
        left, right = (t.view(torch.uint8) for t in flat)
        return left, right

    def merge(
        self,
        sources: Sequence[Source],
        ranges: npt.NDArray[np.int64],
        dtype: DType,
        policy: str,
        order: Sequence[int],
    ) -> Merged:
        there = [DeviceSource(*self._upload_source(source), source.weight) for source in sources]
        found = self.merge_there(there, ranges, dtype, policy, order)
        with self._current():
            arrays = Group(
                found.positions.cpu().numpy(),
                found.new.cpu().numpy().view(dtype.bits),
                found.old.cpu().numpy().view(dtype.bits),
            )
        return Merged(
            found.counts,
            *arrays,
            found.conflicts,
            found.base_mismatches,
            found.first_base_mismatch,
            found.overflows,
            found.first_overflow,
        )

    def merge_there(
        self,
        sources: Sequence[DeviceSource],
        ranges: npt.NDArray[np.int64],
        dtype: DType,
        policy: str,
        order: Sequence[int],
    ) -> DeviceMerged:
        """The union of arrays that are on the device already; its entries stay there."""
        sizes = [len(source.positions) for source in sources]
        firsts, counts = ranges[..., 0], ranges[..., 1]
        if ranges.size and (min(firsts.min(), counts.min()) < 0 or (firsts + counts > sizes).any()):
            raise ValueError("a range reaches beyond its source")
        with self._current(), self._room("a merge"):
            return self._merge(sources, np.ascontiguousarray(ranges), dtype, policy, order)

    def _upload_source(self, source: Source) -> tuple[Device, Device, Device]:
        positions, new, old = self._upload([source.positions, source.new, source.old])
        return positions.view(torch.int32), new, old

    def round(self, values: Bits, source: DType, target: DType) -> tuple[Bits, int]:
        from hotgraft.kernels.native_cpu import BACKEND  # a graft is rounded before it is uploaded

        return BACKEND.round(values, source, target)
