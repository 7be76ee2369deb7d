"""One way to judge a backend: run a verb on it and on the reference, and compare every bit.

`test_house.py` breaks backends on purpose and checks that these functions notice.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hotgraft import _native
from hotgraft.format import DTYPES, DType, Group, empty_group
from hotgraft.kernels import Backend, NanDifferenceError, Pair, Source
from hotgraft.kernels.device import DeviceBackend, DeviceTable, Move
from hotgraft.kernels.native_cpu import INSTRUCTION_SETS, NativeCpu
from hotgraft.kernels.reference import BACKEND as REFERENCE

# An instruction set that this processor lacks is left out, by name, rather than skipped.
BACKENDS = [
    pytest.param(NativeCpu(isa, workers), id=f"cpu-{isa}-{workers}")
    for code, isa in enumerate(INSTRUCTION_SETS)
    if isa != "best" and _native.isa_runs_here(code)
    for workers in (1, 2, 3)
]

# ---- moves ------------------------------------------------------------------------------------


class Stretch(NamedTuple):
    """One segment to be: `positions` in a run of `cells` items, `gap` items of guard before it."""

    cells: int
    positions: Sequence[int]
    gap: int = 1
    shift: int = 0
    """Added to every position and taken off the base address: the cells stay where they are."""


class Arena:
    """Segments in one piece of memory with guard items around each, and the table of them."""

    def __init__(self, stretches: Sequence[Stretch], item_size: int, seed: int = 0) -> None:
        size = sum(s.gap + s.cells for s in stretches) + 8
        rng = np.random.default_rng(seed)
        self.memory = rng.integers(0, 256, size * item_size, dtype=np.uint8)
        self.item_size = item_size
        segments, first, start = [], 0, 0
        for s in stretches:
            start += s.gap
            base = self.memory.ctypes.data + (start - s.shift) * item_size
            segments.append([base, first, len(s.positions)])
            first += len(s.positions)
            start += s.cells
        self.segments = np.array(segments, np.int64)
        self.positions = np.concatenate(
            [np.asarray(s.positions, np.int64) + s.shift for s in stretches]
        ).astype(np.int32)
        self.values = rng.integers(0, 1 << 8 * item_size, first, dtype=f"u{item_size}")

    def table(self, backend: Any) -> Any:
        if isinstance(backend, OnDevice):
            return backend.table_of(self)
        return backend.table(self.segments, self.positions, self.item_size)


def guarded(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A copy of an array inside a larger one, and the larger one."""
    room = np.full(len(values) + 8, 0xA5, values.dtype)
    room[4 : 4 + len(values)] = values
    return room[4 : 4 + len(values)], room


def check_moves(backend: Any, arena: Arena) -> None:
    """gather, scatter and compare do what the reference's do, and touch nothing else."""
    mine, judge = arena.table(backend), arena.table(REFERENCE)
    before = arena.memory.copy()

    wanted, room_wanted = guarded(np.zeros_like(arena.values))
    found, room = guarded(np.zeros_like(arena.values))
    REFERENCE.gather(judge, wanted)
    backend.gather(mine, found)
    assert room.tobytes() == room_wanted.tobytes()
    assert backend.compare(mine, found) == (0, -1)
    assert backend.compare(mine, arena.values) == REFERENCE.compare(judge, arena.values)
    assert arena.memory.tobytes() == before.tobytes(), "gather and compare only read"

    given, room = guarded(arena.values)
    room_before = room.copy()
    REFERENCE.scatter(judge, given)
    after = arena.memory.copy()
    arena.memory[:] = before
    backend.scatter(mine, given)
    assert arena.memory.tobytes() == after.tobytes()
    assert room.tobytes() == room_before.tobytes()
    assert backend.compare(mine, given) == (0, -1)

    wrong = given.copy()
    wrong[:: max(1, len(wrong) // 3)] ^= 1
    assert backend.compare(mine, wrong) == REFERENCE.compare(judge, wrong)
    backend.scatter(mine, found)
    assert arena.memory.tobytes() == before.tobytes(), "the way back"


# ---- devices ----------------------------------------------------------------------------------


class There(NamedTuple):
    """An arena whose memory was copied to a device, and its table there."""

    arena: Arena
    memory: torch.Tensor
    table: DeviceTable


class OnDevice:
    """A device backend behind the verbs as the checks use them: on numpy arrays and an arena here.

    What a move may not touch is there too, and comes back with the rest: guards around the values,
    and the whole of the arena.
    """

    GUARD = 16

    def __init__(self, backend: DeviceBackend) -> None:
        self.backend = backend
        self.name = backend.name
        self.select, self.merge = backend.select, backend.merge
        self.difference, self.round = backend.difference, backend.round

    def table_of(self, arena: Arena) -> There:
        memory = torch.from_numpy(arena.memory).to(self.backend.device, copy=True)
        segments = arena.segments.copy()
        segments[:, 0] += memory.data_ptr() - arena.memory.ctypes.data
        return There(arena, memory, self.backend.table(segments, arena.positions, arena.item_size))

    def gather(self, there: There, values: npt.NDArray[Any]) -> None:
        with self._away([there], [values]) as (held,):
            self.backend.gather(there.table, held)

    def scatter(self, there: There, values: npt.NDArray[Any]) -> None:
        with self._away([there], [values]) as (held,):
            self.backend.scatter(there.table, held)

    def exchange(
        self,
        leaving: tuple[There, npt.NDArray[Any]],
        entering: tuple[There, npt.NDArray[Any]],
    ) -> None:
        """Both tables are of one arena, whose memory is that of the first."""
        with self._away([leaving[0]], [leaving[1], entering[1]]) as (old, new):
            self.backend.exchange(Move(leaving[0].table, old), Move(entering[0].table, new))

    def compare(self, there: There, values: npt.NDArray[Any]) -> tuple[int, int]:
        with self._away([there], [values]) as (held,):
            return self.backend.compare(there.table, held)

    @contextlib.contextmanager
    def _away(
        self, places: Sequence[There], arrays: Sequence[npt.NDArray[Any]]
    ) -> Iterator[list[torch.Tensor]]:
        """The arrays on the device, guarded; the arenas' memory and they are brought back."""
        for there in places:
            there.memory.copy_(torch.from_numpy(there.arena.memory))
        guard = np.full(self.GUARD, 0xA5, np.uint8)
        rooms = [
            self.backend.values(np.concatenate([guard, array.view(np.uint8), guard]))
            for array in arrays
        ]
        yield [room[self.GUARD : len(room) - self.GUARD] for room in rooms]
        for array, room in zip(arrays, rooms, strict=True):
            back = self.backend.read(room, np.dtype(np.uint8))
            assert (back[: self.GUARD] == guard).all(), "the guard before the values"
            assert (back[-self.GUARD :] == guard).all(), "the guard after the values"
            array.view(np.uint8)[:] = back[self.GUARD : -self.GUARD]
        for there in places:
            there.arena.memory[:] = self.backend.read(there.memory, np.dtype(np.uint8))


def check_exchange(backend: OnDevice, layout: Sequence[Stretch], item_size: int) -> None:
    """Two moves of disjoint cells in one launch do what one after the other does."""
    arena = Arena(layout, item_size)
    halves = [part_of(arena, 0), part_of(arena, 1)]
    before = arena.memory.copy()
    for half in halves:
        REFERENCE.scatter(half.table(REFERENCE), half.values)
    wanted = arena.memory.copy()
    arena.memory[:] = before
    first, other = ((half.table(backend), half.values) for half in halves)
    # Both tables have to mean the same memory: the second is made over the first one's copy.
    segments = halves[1].segments.copy()
    segments[:, 0] += first[0].memory.data_ptr() - arena.memory.ctypes.data
    table = backend.backend.table(segments, halves[1].positions, item_size)
    backend.exchange(first, (There(arena, first[0].memory, table), other[1]))
    assert arena.memory.tobytes() == wanted.tobytes()


def part_of(arena: Arena, parity: int) -> Arena:
    """Every other entry of an arena, over the same memory."""
    part = copy.copy(arena)
    chosen = np.arange(len(arena.positions)) % 2 == parity
    counts = np.array([chosen[f : f + n].sum() for _, f, n in arena.segments.tolist()])
    ends = np.cumsum(counts)
    part.segments = np.stack([arena.segments[:, 0], ends - counts, counts], axis=1)[counts > 0]
    part.positions, part.values = arena.positions[chosen], arena.values[chosen]
    return part


# ---- select -----------------------------------------------------------------------------------


def selection(backend: Any, pairs: Sequence[Pair], k: int | None) -> list[Any]:
    """What `select` returns, as bytes a pair, or what it raises."""
    try:
        found = backend.select(pairs, k)
    except NanDifferenceError as error:
        return ["nan", *error.args]
    assert all(positions.dtype == np.int32 for positions in found)
    return [positions.tobytes() for positions in found]


def check_select(backend: Any, pairs: Sequence[Pair], k: int | None) -> None:
    """The same positions of each pair, or the same NaN refused."""
    assert selection(backend, pairs, k) == selection(REFERENCE, pairs, k)
    for pair in pairs:
        check_difference(backend, pair)


def check_difference(backend: Any, pair: Pair) -> None:
    """The same positions and bits, in arrays of the right length."""
    found: list[Group] = []

    def room(n: int) -> Group:
        found.append(empty_group(pair.dtype, n))
        return found[-1]

    backend.difference(pair, room)
    REFERENCE.difference(pair, room)
    mine, judge = found
    assert [a.tobytes() for a in mine] == [a.tobytes() for a in judge]


# ---- merge and round --------------------------------------------------------------------------


def check_merge(
    backend: Any,
    sources: Sequence[Source],
    ranges: npt.NDArray[np.int64],
    dtype: DType,
    policy: str,
    order: Sequence[int],
) -> None:
    """The same union, bits, counts and places, as far as `Merged` says something."""
    before = copy.deepcopy(list(sources))
    found = backend.merge(sources, ranges, dtype, policy, order)
    wanted = REFERENCE.merge(sources, ranges, dtype, policy, order)
    unsaid: set[str] = set()
    if wanted.overflows or wanted.base_mismatches:
        unsaid |= {"new", "conflicts"}
    if wanted.base_mismatches:
        unsaid |= {"overflows", "first_overflow"}
    for name in set(wanted._fields) - unsaid:
        mine, judge = getattr(found, name), getattr(wanted, name)
        if isinstance(judge, np.ndarray):
            assert (mine.dtype, mine.shape) == (judge.dtype, judge.shape), name
            assert mine.tobytes() == judge.tobytes(), name
        else:
            assert mine == judge, name
    for source, copied in zip(sources, before, strict=True):
        for mine, theirs in zip(source[:3], copied[:3], strict=True):
            assert mine.tobytes() == theirs.tobytes(), "merge only reads its sources"


def check_round(backend: Backend, values: npt.NDArray[Any], source: str, target: str) -> None:
    """The same bits and the same count of overflows."""
    found, overflows = backend.round(values, DTYPES[source], DTYPES[target])
    wanted, wanted_overflows = REFERENCE.round(values, DTYPES[source], DTYPES[target])
    assert found.dtype == wanted.dtype
    different = np.flatnonzero(found != wanted)
    shown = [(hex(values[i]), hex(found[i]), hex(wanted[i])) for i in different[:3]]
    assert not len(different), f"{source} to {target}: (value, found, wanted) {shown}"
    assert overflows == wanted_overflows
