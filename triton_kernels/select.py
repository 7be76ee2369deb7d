"""The entries that differ, how many there are of each score, and those that score enough.

Kernels judge items; torch turns their flags into positions, a stretch of a tensor at a time so that
the flags of a large one need little room.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from hotgraft.format import DType
from hotgraft.triton_kernels.table import LAUNCH, TILE, items
from hotgraft.triton_kernels.value import INFINITY, score

STRETCH = 1 << 26
"""Items flagged at a time."""


@triton.jit(do_not_specialize=["lowest"])
def flag_kernel(
    base,
    finetuned,
    flags,
    n,
    lowest,
    TYPE: tl.constexpr,
    RANKED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Which items differ; where RANKED, and score at least `lowest`."""
    item = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = item < n
    a = tl.load(base + item, mask=live, other=0)
    b = tl.load(finetuned + item, mask=live, other=0)
    wanted = a != b
    if RANKED:
        wanted = wanted & (score(a, b, TYPE) >= lowest)
    tl.store(flags + item, wanted.to(tl.int8), mask=live)


@triton.jit(do_not_specialize=["shift", "prefix"])
def count_kernel(
    base, finetuned, bins, first_nan, n, shift, prefix, TYPE: tl.constexpr, TILE: tl.constexpr
):
    """Count differing items' scores whose bits above shift + 16 are `prefix` by the next 16 bits.

    `first_nan` is lowered to the first item whose difference is NaN.
    """
    item = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = item < n
    a = tl.load(base + item, mask=live, other=0)
    b = tl.load(finetuned + item, mask=live, other=0)
    found = score(a, b, TYPE)
    differs = a != b
    nan = differs & (found > INFINITY)
    least = tl.min(tl.where(nan, item, 0x7FFF_FFFF_FFFF_FFFF))
    if least < n:
        tl.atomic_min(first_nan, least, sem="relaxed")
    digits = found >> shift.to(tl.int64)  # shifted twice: at once it would be by 64
    counted = differs & ((digits >> 16) == prefix.to(tl.int64))
    ones = tl.full([TILE], 1, tl.int64)
    tl.atomic_add(bins + (digits & 0xFFFF), ones, mask=counted, sem="relaxed")


@triton.jit
def score_kernel(base, finetuned, positions, scores, n, TYPE: tl.constexpr, TILE: tl.constexpr):
    """The scores of the items at `positions`."""
    entry = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = entry < n
    position = tl.load(positions + entry, mask=live, other=0).to(tl.int64)
    a = tl.load(base + position, mask=live, other=0)
    b = tl.load(finetuned + position, mask=live, other=0)
    tl.store(scores + entry, score(a, b, TYPE), mask=live)


# ---- launches ---------------------------------------------------------------------------------


def _grid(n: int) -> tuple[int]:
    return (-(-n // TILE),)


def _positions(
    base: torch.Tensor, finetuned: torch.Tensor, lowest: int, code: int, ranked: bool
) -> torch.Tensor:
    """int32: the items that `flag_kernel` wants, ascending."""

    def stretches() -> Iterator[torch.Tensor]:
        for start in range(0, len(base), STRETCH):
            a, b = base[start : start + STRETCH], finetuned[start : start + STRETCH]
            flags = torch.empty(len(a), dtype=torch.int8, device=base.device)
            flag_kernel[_grid(len(a))](
                a, b, flags, len(a), lowest, TYPE=code, RANKED=ranked, **LAUNCH
            )
            yield (flags.nonzero().view(-1) + start).int()

    found = list(stretches())
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int32, device=base.device)


def differing(base: torch.Tensor, finetuned: torch.Tensor, item_size: int) -> torch.Tensor:
    """int32: the items at which two byte tensors differ, ascending."""
    return _positions(items(base, item_size), items(finetuned, item_size), 0, 0, ranked=False)


def count_scores(
    base: torch.Tensor,
    finetuned: torch.Tensor,
    dtype: DType,
    shift: int,
    prefix: int,
    bins: torch.Tensor,
) -> int:
    """Add to `bins` as `count_kernel` says; the first item whose difference is NaN, or -1."""
    a, b = (items(t, dtype.item_size) for t in (base, finetuned))
    n = len(a)
    first_nan = torch.full((1,), n, dtype=torch.int64, device=base.device)
    if n:
        count_kernel[_grid(n)](a, b, bins, first_nan, n, shift, prefix, TYPE=dtype.code, **LAUNCH)
    first = int(first_nan.item())
    return first if first < n else -1


def collect(
    base: torch.Tensor, finetuned: torch.Tensor, dtype: DType, lowest: int, ties: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and scores of the differing items that score at least `lowest`.

    Of those that score `lowest` only the first `ties`.
    """
    a, b = (items(t, dtype.item_size) for t in (base, finetuned))
    positions = _positions(a, b, lowest, dtype.code, ranked=True)
    n = len(positions)
    scores = torch.empty(n, dtype=torch.int64, device=base.device)
    if n:
        score_kernel[_grid(n)](a, b, positions, scores, n, TYPE=dtype.code, **LAUNCH)
    tied = scores == lowest
    kept = ~tied | (tied.cumsum(0) <= ties)
    return positions[kept], scores[kept]
