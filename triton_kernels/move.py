"""gather, scatter and compare: the moves between a table's cells and a flat array of values.

Items are integers of their size, so NaN payloads, infinities and the sign of zero survive. A full
tile is moved without masks, which lets positions and values be loaded 16 bytes at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from hotgraft.kernels.device import DeviceTable, Move
from hotgraft.triton_kernels.table import LAUNCH, TILE, base_of, items

# Counts change with every table: a kernel compiled anew for each kind of count would be compiled in
# the middle of a commit.
_COUNTS = ["n", "other_n"]


@triton.jit
def _entries(tile, n, FULL: tl.constexpr, TILE: tl.constexpr):
    """A tile's entries, and which of them there are."""
    entry = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
    if FULL:
        live = tl.full([TILE], 1, tl.int1)
    else:
        live = entry < n
    return entry, live


@triton.jit
def _cells(segments, tiles, positions, values, tile, entry, live):
    """Pointers to the entries' cells; what they point at is what `values` points at."""
    position = tl.load(positions + entry, mask=live, other=0).to(tl.int64)
    size: tl.constexpr = values.dtype.element_ty.primitive_bitwidth // 8
    return (base_of(segments, tiles, tile, entry) + position * size).to(values.dtype)


@triton.jit
def _gather(segments, tiles, positions, values, n, tile, FULL: tl.constexpr, TILE: tl.constexpr):
    entry, live = _entries(tile, n, FULL, TILE)
    cell = _cells(segments, tiles, positions, values, tile, entry, live)
    tl.store(values + entry, tl.load(cell, mask=live), mask=live)


@triton.jit
def _scatter(segments, tiles, positions, values, n, tile, FULL: tl.constexpr, TILE: tl.constexpr):
    entry, live = _entries(tile, n, FULL, TILE)
    value = tl.load(values + entry, mask=live)
    cell = _cells(segments, tiles, positions, values, tile, entry, live)
    tl.store(cell, value, mask=live)


@triton.jit
def _compare(
    segments, tiles, positions, values, report, n, tile, FULL: tl.constexpr, TILE: tl.constexpr
):
    entry, live = _entries(tile, n, FULL, TILE)
    wanted = tl.load(values + entry, mask=live)
    cell = _cells(segments, tiles, positions, values, tile, entry, live)
    differs = live & (tl.load(cell, mask=live) != wanted)
    count = tl.sum(differs.to(tl.int64))
    if count > 0:
        tl.atomic_add(report, count, sem="relaxed")
        from_end = tl.max(tl.where(differs, n.to(tl.int64) - entry, 0))
        tl.atomic_max(report + 1, from_end, sem="relaxed")


@triton.jit
def _is_full(tile, n, TILE: tl.constexpr):
    return (tile.to(tl.int64) + 1) * TILE <= n


@triton.jit(do_not_specialize=_COUNTS)
def gather_kernel(segments, tiles, positions, values, n, TILE: tl.constexpr):
    tile = tl.program_id(0)
    if _is_full(tile, n, TILE):
        _gather(segments, tiles, positions, values, n, tile, True, TILE)
    else:
        _gather(segments, tiles, positions, values, n, tile, False, TILE)


@triton.jit(do_not_specialize=_COUNTS)
def scatter_kernel(
    segments,
    tiles,
    positions,
    values,
    n,
    other_segments,
    other_tiles,
    other_positions,
    other_values,
    other_n,
    TILE: tl.constexpr,
):
    """Two moves: the programs of the first, then those of the other, which may be none."""
    tile = tl.program_id(0)
    n_first = ((n.to(tl.int64) + TILE - 1) // TILE).to(tl.int32)
    other = tile >= n_first
    tile = tl.where(other, tile - n_first, tile)
    n = tl.where(other, other_n.to(tl.int64), n.to(tl.int64))
    segments = tl.where(other, other_segments, segments)
    tiles = tl.where(other, other_tiles, tiles)
    positions = tl.where(other, other_positions, positions)
    values = tl.where(other, other_values, values)
    if _is_full(tile, n, TILE):
        _scatter(segments, tiles, positions, values, n, tile, True, TILE)
    else:
        _scatter(segments, tiles, positions, values, n, tile, False, TILE)


@triton.jit(do_not_specialize=_COUNTS)
def compare_kernel(segments, tiles, positions, values, report, n, TILE: tl.constexpr):
    tile = tl.program_id(0)
    if _is_full(tile, n, TILE):
        _compare(segments, tiles, positions, values, report, n, tile, True, TILE)
    else:
        _compare(segments, tiles, positions, values, report, n, tile, False, TILE)


# ---- launches ---------------------------------------------------------------------------------


def _programs(n: int) -> int:
    return -(-n // TILE)


def _pointers(table: DeviceTable, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return table.segments, table.tiles, table.positions, items(values, table.item_size)


def gather(table: DeviceTable, values: torch.Tensor) -> None:
    """Copy the cells into `values`."""
    n = table.n_entries
    gather_kernel[(_programs(n),)](*_pointers(table, values), n, **LAUNCH)


def scatter(moves: Sequence[Move]) -> None:
    """Copy one or two moves' values into their cells, in one launch."""
    first, other = moves[0], moves[-1]
    n, other_n = first.table.n_entries, other.table.n_entries if len(moves) > 1 else 0
    scatter_kernel[(_programs(n) + _programs(other_n),)](
        *_pointers(*first), n, *_pointers(*other), other_n, **LAUNCH
    )


def compare(table: DeviceTable, values: torch.Tensor, report: torch.Tensor) -> None:
    """Add the cells that differ to report[0]; raise report[1] to n_entries - the first of them."""
    n = table.n_entries
    compare_kernel[(_programs(n),)](*_pointers(table, values), report, n, **LAUNCH)


def compile_for(table: DeviceTable, values: torch.Tensor) -> None:
    """Launch each of them once with nothing to do: compiling is no part of a commit."""
    pointers = _pointers(table, values)
    report = torch.zeros(2, dtype=torch.int64, device=values.device)
    gather_kernel[(1,)](*pointers, 0, **LAUNCH)
    scatter_kernel[(1,)](*pointers, 0, *pointers, 0, **LAUNCH)
    compare_kernel[(1,)](*pointers, report, 0, **LAUNCH)
