"""gather, scatter and compare against the reference, every byte that should not move included."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from agreement import BACKENDS, Arena, Stretch, check_moves
from hotgraft import _native
from hotgraft.kernels.native_cpu import NativeCpu
from hotgraft.kernels.reference import BACKEND as REFERENCE
from hypothesis import given
from hypothesis import strategies as st

SIZES = (1, 2, 4, 8)
LAST = 2**31 - 1
"""The largest position."""


@st.composite
def stretches(draw: st.DrawFn) -> list[Stretch]:
    found = []
    for _ in range(draw(st.integers(1, 6))):
        cells = draw(st.integers(1, 90))
        positions = draw(st.sets(st.integers(0, cells - 1), min_size=1))
        shift = draw(st.sampled_from([0, 0, 0, 1, 2**30, LAST + 1 - cells]))
        found.append(Stretch(cells, sorted(positions), draw(st.integers(0, 5)), shift))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@given(st.sampled_from(SIZES), stretches(), st.integers(0, 99))
def test_moves_agree(backend, item_size, layout, seed):
    check_moves(backend, Arena(layout, item_size, seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("item_size", SIZES)
def test_every_length_around_the_lookahead(backend, item_size):
    for n in range(1, 135):
        check_moves(backend, Arena([Stretch(2 * n, range(0, 2 * n, 2))], item_size, n))
        # as many segments as entries, and segments that end inside the window that runs ahead
        check_moves(backend, Arena([Stretch(2, [i % 2]) for i in range(n)], item_size, n))
        check_moves(backend, Arena([Stretch(n, range(n)), Stretch(31, range(31))], item_size, n))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("item_size", SIZES)
def test_many_entries_are_shared_among_threads(backend, item_size):
    # Pieces of some thousand entries that begin and end inside segments of every length.
    rng = np.random.default_rng(item_size)
    layout = []
    for count in (1, 4095, 4096, 4097, 3, 1, 9001):
        positions = np.sort(rng.choice(3 * count, count, replace=False))
        layout.append(Stretch(3 * count, positions, int(rng.integers(0, 9))))
    check_moves(backend, Arena(layout, item_size))


@pytest.mark.parametrize("item_size", SIZES)
def test_positions_end_at_the_last_of_a_block(item_size):
    # The base address is computed so that the cells lie in a small buffer.
    arena = Arena([Stretch(40, [0, 7, 39], shift=LAST - 39)], item_size)
    assert arena.positions[-1] == LAST
    for backend in BACKENDS:
        check_moves(backend.values[0], arena)


@pytest.mark.parametrize("first", [0, 1, 4095, 4096, 8191, 9999])
def test_compare_reports_the_lowest_entry_from_any_thread(first):
    arena = Arena([Stretch(10_000, range(10_000))], 2)
    for parameter in BACKENDS:
        backend = parameter.values[0]
        table = arena.table(backend)
        held = np.empty_like(arena.values)
        backend.gather(table, held)
        held[first] ^= 0x8000
        held[9_999] ^= 1
        assert backend.compare(table, held) == (1 + (first != 9_999), first)


def test_floats_are_compared_as_bits():
    cells = np.array([np.nan, -0.0, np.inf], np.float32)
    backend = NativeCpu(workers=1)
    table = backend.table(
        np.array([[cells.ctypes.data, 0, 3]]), np.arange(3, dtype=np.int32), cells.itemsize
    )
    assert backend.compare(table, cells.view(np.uint32).copy()) == (0, -1)
    assert backend.compare(table, np.array([np.nan, 0.0, np.inf], np.float32)) == (1, 1)


def test_moves_run_from_several_threads_at_once():
    arenas = [Arena([Stretch(9_000, range(0, 9_000, 2))] * 3, 4, seed) for seed in range(4)]
    backend = NativeCpu(workers=3)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            list(pool.map(lambda arena: check_moves(backend, arena), arenas))


# ---- what a table refuses ---------------------------------------------------------------------

ONE = np.zeros(1, np.int32)
FOLLOW = "segments must follow each other without a gap, none empty"


@pytest.mark.parametrize(
    ("segments", "positions", "item_size", "message"),
    [
        ([[0, 0, 0]], ONE[:0], 4, FOLLOW),
        ([[0, 0, 1], [0, 1, 0]], ONE, 4, FOLLOW),
        ([[0, 0, -1]], ONE, 4, FOLLOW),
        ([[0, 1, 1]], ONE, 4, FOLLOW),
        ([[0, 0, 1], [0, 2, 1]], np.zeros(3, np.int32), 4, FOLLOW),
        ([[0, 0, 2], [0, 1, 1]], np.zeros(3, np.int32), 4, FOLLOW),
        ([[0, 0, 2]], ONE, 4, FOLLOW),
        ([[0, 0, 2**63 - 1]], ONE, 4, FOLLOW),
        ([[0, 0, 1]], np.zeros(2, np.int32), 4, "segments must cover the positions exactly"),
        (np.empty((0, 3), np.int64), ONE, 4, r"segments must be int64\[n > 0\]\[3\]"),
        ([[0, 1]], ONE, 4, r"segments must be int64\[n > 0\]\[3\]"),
        ([0, 0, 1], ONE, 4, r"segments must be int64\[n > 0\]\[3\]"),
        ([[0, 0, 1]], ONE.reshape(1, 1), 4, r"positions must be int32\[n_entries\]"),
        ([[0, 0, 1]], ONE, 3, "item_size must be 1, 2, 4 or 8"),
        ([[0, 0, 1]], ONE, 0, "item_size must be 1, 2, 4 or 8"),
    ],
)
def test_a_table_refuses(segments, positions, item_size, message):
    with pytest.raises(ValueError, match=message):
        _native.Table(np.asarray(segments, np.int64), positions, item_size)


@pytest.mark.parametrize(
    ("segments", "positions"),
    [
        (np.zeros((1, 3), np.int32), ONE),
        (np.zeros((1, 3)), ONE),
        (np.zeros((1, 3), np.int64), np.zeros(1, np.int64)),
        (np.asfortranarray(np.zeros((2, 3), np.int64)), ONE),
        (np.zeros((1, 3), np.int64), np.zeros(4, np.int32)[::2]),
    ],
)
def test_a_table_converts_nothing(segments, positions):
    with pytest.raises(TypeError):
        _native.Table(segments, positions, 4)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(2, np.uint32),
        np.zeros(4, np.uint32),
        np.zeros(3, np.uint16),
        np.zeros(6, np.uint32)[::2],
        np.zeros((3, 1), np.uint32),
    ],
)
def test_values_must_fit_the_table(values):
    arena = Arena([Stretch(3, range(3))], 4)
    before = arena.memory.copy()
    table = _native.Table(arena.segments, arena.positions, 4)
    for verb in (_native.gather, _native.scatter, _native.compare):
        with pytest.raises(ValueError, match="a contiguous array of 3 items of 4 bytes"):
            verb(table, values)
    assert (arena.memory == before).all()


def test_gather_refuses_read_only_values():
    arena = Arena([Stretch(3, range(3))], 4)
    arena.values.setflags(write=False)
    with pytest.raises(ValueError, match="values must be writable"):
        _native.gather(_native.Table(arena.segments, arena.positions, 4), arena.values)


def test_a_table_keeps_its_arrays_alive_and_states_its_size():
    arena = Arena([Stretch(3, range(3)), Stretch(5, [4])], 4)
    table = _native.Table(arena.segments.copy(), arena.positions.copy(), 4)
    assert (table.n_entries, table.n_segments, table.item_size) == (4, 2, 4)
    assert table.nbytes == 2 * 24 + 4 * 4
    np.full(1000, 7)  # memory that a freed array could have left
    found = np.zeros(4, np.uint32)
    _native.gather(table, found)
    cells = arena.memory.view(np.uint32)
    assert found.tolist() == cells[[1, 2, 3, 9]].tolist()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_prefetching_changes_nothing_and_outlives_no_table(workers):
    backend = NativeCpu(workers=workers)
    arena = Arena([Stretch(70_000, range(0, 70_000, 2))], 4)
    before = arena.memory.tobytes()
    for _ in range(50):
        backend.prefetch(arena.table(backend), arena.values)  # the table goes at once
    assert arena.memory.tobytes() == before
    table = arena.table(backend)
    backend.prefetch(table, arena.values)
    assert backend.compare(table, arena.values) == REFERENCE.compare(
        arena.table(REFERENCE), arena.values
    )
    with pytest.raises(ValueError, match="values must be a contiguous array of 35000 items"):
        backend.prefetch(table, arena.values[1:])
