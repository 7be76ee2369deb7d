"""Where an entry's cell is: the segment table of csrc/core/table.h, tile by tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 2048
"""Entries a program handles; the `tiles` of a table are made for it."""
LAUNCH = {"TILE": TILE, "num_warps": 8, "enable_fp_fusion": False}
"""What every launch is given: 8 entries a thread, and no multiplication fused with an addition."""

_ITEMS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def items(values: torch.Tensor, item_size: int) -> torch.Tensor:
    """Bytes seen as integers of the items' size, which is all that the kernels know of a type.

    Example:
        >>> items(torch.zeros(8, dtype=torch.uint8), 4).dtype
        torch.int32
    """
    return values.view(_ITEMS[item_size])


@triton.jit
def segment_of(segments, tiles, tile, entry):
    """The segment of each entry of a tile, as int64.

    It lies between those where this tile and the next begin, so that mostly there is no step to
    take. Every lane takes as many steps as the widest range needs: it stays in
    [at, at + span] and span is one number for all.
    """
    low = tl.load(tiles + tile).to(tl.int64)
    span = tl.load(tiles + tile + 1).to(tl.int64) - low
    at = tl.zeros_like(entry) + low
    while span > 0:
        half = (span + 1) // 2
        first = tl.load(segments + 3 * (at + half) + 1)
        at = tl.where(first <= entry, at + half, at)
        span = span - half
    return at


@triton.jit
def base_of(segments, tiles, tile, entry):
    """The address of position 0 for each entry of a tile; one load where one segment fills it."""
    low = tl.load(tiles + tile).to(tl.int64)
    if low == tl.load(tiles + tile + 1):
        base = tl.zeros_like(entry) + tl.load(segments + 3 * low)
    else:
        base = tl.load(segments + 3 * segment_of(segments, tiles, tile, entry))
    return base
