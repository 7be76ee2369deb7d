"""Backends for devices against the reference: Triton interpreted, CUDA imitated, both on a GPU."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from agreement import (
    Arena,
    OnDevice,
    Stretch,
    check_exchange,
    check_merge,
    check_moves,
    check_select,
    selection,
)
from factories import FLOATS, from_bits, random_bits, specials
from hotgraft.errors import BackendError
from hotgraft.format import DTYPES
from hotgraft.kernels import POLICIES, Pair, Part, Source, ranking, resolve
from hotgraft.kernels.device import TILE, DeviceBackend, DeviceSource, tiles_of
from hypothesis import given, settings
from hypothesis import strategies as st
from imitation import imitated
from test_merge import merges, numbers
from test_move import LAST, SIZES, stretches
from test_select import levels, pair, random_pairs, tied_pairs

WHICH = [
    pytest.param(("cuda", "cpu"), id="cuda-imitated"),
    pytest.param(("triton", "cpu"), id="triton-interpreted"),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
]
everywhere = pytest.mark.parametrize("which", WHICH)


@functools.cache
def opened(which: tuple[str, str]) -> OnDevice:
    """The backend of that name for that device, behind numpy arrays."""
    backend = imitated() if which == ("cuda", "cpu") else resolve(*which)
    assert isinstance(backend, DeviceBackend)
    return OnDevice(backend)


# ---- moves ------------------------------------------------------------------------------------


@everywhere
@settings(max_examples=25)
@given(st.sampled_from(SIZES), stretches(), st.integers(0, 99))
def test_moves_agree(which, item_size, layout, seed):
    check_moves(opened(which), Arena(layout, item_size, seed))


TILES = {
    "one entry": [Stretch(1, [0])],
    "one entry a segment": [Stretch(3, [i % 3]) for i in range(2 * TILE + 3)],
    "one segment over tiles": [Stretch(2 * TILE + 9, range(2 * TILE + 9))],
    "as long as a tile": [Stretch(TILE, range(TILE))] * 2,
    "one short of a tile": [Stretch(TILE - 1, range(TILE - 1)), Stretch(2, [1])],
    "one beyond a tile": [Stretch(TILE + 1, range(TILE + 1)), Stretch(2, [0, 1])],
    "segments across tiles": [Stretch(2 * n, range(0, 2 * n, 2)) for n in (400, 1, 1500, 2, 2300)],
    "many, then one over tiles": [*[Stretch(1, [0])] * 900, Stretch(5000, range(5000))],
    "the last positions": [
        Stretch(40, [0, 7, 39], shift=LAST - 39),
        Stretch(9, range(9)),
        Stretch(2500, range(2500), shift=LAST - 2499),
    ],
}


@everywhere
@pytest.mark.parametrize("item_size", SIZES)
@pytest.mark.parametrize("layout", TILES.values(), ids=TILES)
def test_moves_agree_across_tiles(which, layout, item_size):
    arena = Arena(layout, item_size)
    check_moves(opened(which), arena)
    assert arena.positions.min() >= 0


@everywhere
@pytest.mark.parametrize("item_size", SIZES)
@pytest.mark.parametrize("layout", [[Stretch(2, [0, 1])], *list(TILES.values())[1::2]])
def test_two_moves_are_one_launch(which, layout, item_size):
    check_exchange(opened(which), layout, item_size)


@everywhere
@pytest.mark.parametrize("first", [0, 1, TILE - 1, TILE, 2 * TILE - 1, 2 * TILE + 2])
def test_compare_reports_the_lowest_entry_of_any_tile(which, first):
    n = 2 * TILE + 9
    arena, backend = Arena([Stretch(n, range(n))], 2), opened(which)
    table, held = arena.table(backend), np.empty_like(arena.values)
    backend.gather(table, held)
    held[first] ^= 0x8000
    held[n - 1] ^= 1
    assert backend.compare(table, held) == (2, first)


@everywhere
def test_prepare_uploads_several_tables_at_once(which):
    arenas = [Arena([Stretch(9, [1, 4, 8])] * n, size) for n, size in ((1, 1), (5, 2), (900, 8))]
    backend = opened(which)
    places = [arena.table(backend) for arena in arenas]
    parts = [
        Part(place.table.segments.cpu().numpy(), arena.positions, arena.values, ~arena.values, size)
        for place, arena, size in zip(places, arenas, (1, 2, 8), strict=True)
    ]
    for place, loaded in zip(places, backend.backend.prepare(parts), strict=True):
        assert loaded.new.data_ptr() % 16 == loaded.table.positions.data_ptr() % 16 == 0
        backend.backend.scatter(loaded.table, loaded.new)
        assert backend.backend.compare(loaded.table, loaded.new) == (0, -1)
        assert backend.backend.compare(loaded.table, loaded.old)[0] == place.arena.values.size


@everywhere
@pytest.mark.parametrize(
    ("segments", "n", "item_size", "error"),
    [
        ([[0, 0, 1], [0, 2, 1]], 3, 4, "cover the positions exactly"),
        ([[0, 0, 2]], 3, 4, "cover the positions exactly"),
        ([[0, 0, 0]], 0, 4, "cover the positions exactly"),
        ([[0, 0, 1]], 1, 3, "item_size must be"),
        ([[6, 0, 1]], 1, 4, "clone the tensor"),
    ],
)
def test_tables_are_checked(which, segments, n, item_size, error):
    with pytest.raises((ValueError, BackendError), match=error):
        opened(which).backend.table(np.array(segments), np.zeros(n, np.int32), item_size)


def test_tiles_name_the_segment_of_their_first_entry():
    segments = np.array([[0, 0, TILE], [0, TILE, 1], [0, TILE + 1, 2 * TILE]])
    assert tiles_of(segments, 3 * TILE + 1).tolist() == [0, 1, 2, 2, 2]


# ---- select -----------------------------------------------------------------------------------


@everywhere
@settings(max_examples=20)
@given(random_pairs(), st.integers(1, 300) | st.none(), st.sampled_from([0, 3, 1 << 19]))
def test_select_agrees(which, pairs, k, slack):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "SLACK", slack)
        check_select(opened(which), pairs, k)


@everywhere
@settings(max_examples=20)
@given(tied_pairs(), st.integers(1, 300), st.sampled_from([0, 0, 1, 20, 1 << 19]))
def test_ties_go_to_the_earlier_tensor_then_the_lower_position(which, pairs, k, slack):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "SLACK", slack)
        check_select(opened(which), pairs, k)


@everywhere
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_scores_of_every_pair_of_special_values(which, dtype):
    """Each against each, so that every score, NaN included, is met; across tiles."""
    kind = DTYPES[dtype]
    values = np.concatenate([np.array(specials(kind), kind.bits), random_bits(kind, 20, 1)])
    base, fresh = (side.ravel() for side in np.meshgrid(values, values))
    base, fresh = np.resize(base, TILE + 99), np.resize(fresh, TILE + 99)
    check_select(opened(which), [pair(base, fresh, kind)], 7)
    if kind.nonfinite:
        finite = (base & kind.nonfinite != kind.nonfinite) & (
            fresh & kind.nonfinite != kind.nonfinite
        )
        base, fresh = base[finite], fresh[finite]
    for k in (1, 40, len(base) // 2):
        check_select(opened(which), [pair(base, fresh, kind, 1)] * 2, k)


@everywhere
@pytest.mark.parametrize("digit", range(4))
def test_each_digit_of_the_score_can_decide(which, digit, monkeypatch):
    monkeypatch.setattr(ranking, "SLACK", 0)
    fresh = np.array(levels(DTYPES["F64"], digit)[:2] * 10, np.uint64)
    check_select(opened(which), [pair(np.zeros_like(fresh), fresh, DTYPES["F64"])], 10)


@everywhere
def test_the_first_nan_of_any_tile_is_named(which):
    base = torch.zeros(2 * TILE + 5)
    fresh = base.clone()
    fresh[[TILE + 3, 2 * TILE + 1]] = torch.nan
    same = torch.full((5,), torch.nan)  # the same bits on both sides: no difference
    pairs = [Pair(*tensors, DTYPES["F32"]) for tensors in ((same, same), (base, fresh))]
    for k in (1, 9):
        check_select(opened(which), pairs, k)
    assert selection(opened(which), pairs, 1) == ["nan", 1, TILE + 3]


# ---- merge ------------------------------------------------------------------------------------


@everywhere
@settings(max_examples=40)
@given(merges())
def test_merge_agrees(which, case):
    check_merge(opened(which), *case)


@everywhere
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_may_cross_tiles(which, policy):
    dtype = "BF16"
    rows, each, k = 4, 190, 3
    rng = np.random.default_rng(1)
    sources, ranges = [], np.zeros((rows, k, 2), np.int64)
    base = numbers(dtype, rows * 400, 2).reshape(rows, 400)
    for i in range(k):
        where = np.array([np.sort(rng.choice(400, each, replace=False)) for _ in range(rows)])
        ranges[:, i] = [(row * each, each) for row in range(rows)]
        old = np.take_along_axis(base, where, 1).ravel()
        new = numbers(dtype, rows * each, i + 5)
        sources.append(Source(where.ravel().astype(np.int32), new, old, [1.0, 0.5, -0.25][i]))
    check_merge(opened(which), sources, ranges, DTYPES[dtype], policy, [1, 2, 0])


@everywhere
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1 / 3, -1.0), (-0.0, 1e300)])
def test_special_values_are_merged_as_the_reference_does(which, dtype, policy, weights):
    """Each special value with each: as it is, and so small that nothing overflows."""
    kind = DTYPES[dtype]
    values = np.array(specials(kind), kind.bits)
    pairs = [side.ravel() for side in np.meshgrid(values, values[::3])]
    n = len(pairs[0])
    where = np.arange(n, dtype=np.int32)
    ranges = np.array([[[0, n], [0, n]]])
    for shift in (0, 2):
        old = np.resize(values[:8], n) >> shift
        sources = [
            Source(where, new >> shift, old, weight)
            for new, weight in zip(pairs, weights, strict=True)
        ]
        check_merge(opened(which), sources, ranges, kind, policy, [1, 0])


@everywhere
@pytest.mark.parametrize("k", [1, 7])
def test_any_number_of_sources_and_no_entries(which, k):
    nothing = Source(np.empty(0, np.int32), np.empty(0, np.uint16), np.empty(0, np.uint16), 1.0)
    some = Source(
        np.array([3, 9], np.int32), np.array([1, 2], np.uint16), np.zeros(2, np.uint16), 0.5
    )
    kind = DTYPES["BF16"]
    for rows in (0, 1, 3):
        ranges = np.zeros((rows, k, 2), np.int64)
        check_merge(opened(which), [nothing] * k, ranges, kind, "sum", range(k))
        if rows:
            ranges[rows - 1, :, 1] = 2
            check_merge(opened(which), [some] * k, ranges, kind, "mean", range(k))


@everywhere
def test_merged_entries_stay_on_the_device(which):
    backend = opened(which).backend
    kind = DTYPES["F16"]
    values = from_bits(random_bits(kind, 10, 1, finite=True), kind, (10,)).to(backend.device)
    bits = values.view(torch.uint8)
    where = torch.arange(10, dtype=torch.int32, device=backend.device)
    found = backend.merge_there(
        [DeviceSource(where, bits, bits, 1.0)], np.array([[[0, 10]]]), kind, "refuse", [0]
    )
    assert found.new.device == found.positions.device == values.device
    assert torch.equal(found.new, bits)
    assert found.new.data_ptr() % 16 == found.positions.data_ptr() % 16 == 0
