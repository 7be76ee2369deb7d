"""The union of several sources' entries, row by row, resolved under a policy.

A slot is an entry of a source in a row; slots are numbered row by row, source by source. Of the
slots that share a position the first source's owns it. The place of an owner in the union is the
number of owners before it: all those of earlier rows, and in its own row each source's owners at
lower positions, which a search in each source and a running count of owners give. So nothing is
sorted, and two launches with one running count between them make the union.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from hotgraft.format import DType
from hotgraft.kernels import POLICIES
from hotgraft.kernels.device import DeviceMerged, DeviceSource, tiles_of
from hotgraft.triton_kernels.table import TILE, items, segment_of
from hotgraft.triton_kernels.value import decode, encode

REFUSE = tl.constexpr(POLICIES.index("refuse"))
PRIORITY = tl.constexpr(POLICIES.index("priority"))  # the policies after it do arithmetic
MEAN = tl.constexpr(POLICIES.index("mean"))
SIGN = tl.constexpr(POLICIES.index("sign"))
NOWHERE = tl.constexpr(2**63 - 1)
"""Above every place: (row << 31) + position."""

# A program handles a part of a tile: what is known of a slot fills many registers, so 2 a thread.
PART = 512
LAUNCH = {"TILE": TILE, "PART": PART, "num_warps": 8, "enable_fp_fusion": False}
_NUMBERS = ["n", "k", "steps"]


@triton.jit
def _load(addresses, source, WHICH: tl.constexpr, entry, like, wanted):
    """Items of a source's positions (WHICH 0), new (1) or old (2), of the type `like` points at."""
    size: tl.constexpr = like.dtype.element_ty.primitive_bitwidth // 8
    address = tl.load(addresses + 3 * source + WHICH) + entry * size
    return tl.load(address.to(like.dtype), mask=wanted, other=0)


@triton.jit
def _look_up(spans, addresses, positions, span, source, position, steps, wanted):
    """Where a position would be in a span of a source, counted from its first entry; its entry
    there; whether it is there."""
    first = tl.load(spans + 3 * span, mask=wanted, other=0)
    count = tl.load(spans + 3 * span + 2, mask=wanted, other=0)
    low = tl.zeros_like(count)
    left = count
    for _ in range(steps):  # halves the largest span to nothing
        half = left // 2
        probed = _load(addresses, source, 0, first + low + half, positions, left > 0)
        below = (left > 0) & (probed < position)
        low = tl.where(below, low + half + 1, low)
        left = tl.where(below, left - half - 1, half)
    inside = wanted & (low < count)
    held = _load(addresses, source, 0, first + low, positions, inside)
    return low, first + low, inside & (held == position)


@triton.jit
def _difference(new, base, weight, TYPE: tl.constexpr):
    return weight * (decode(new, TYPE).to(tl.float64) - base)


@triton.jit
def _alone(new, base, weight, TYPE: tl.constexpr, ARITHMETIC: tl.constexpr):
    """The bits that a source gives a position alone; whether they are no overflow."""
    if ARITHMETIC:
        bits = encode(base + _difference(new, base, weight, TYPE), TYPE)
        copied = weight == 1.0
        finite = copied | _finite(bits, TYPE)
        bits = tl.where(copied, new, bits)
    else:
        bits = new
        finite = tl.full(new.shape, 1, tl.int1)
    return bits, finite


@triton.jit
def _finite(bits, TYPE: tl.constexpr):
    """The exponent is not the one of infinity and NaN. TYPE is one of the four with arithmetic."""
    if TYPE == 0:
        finite = (bits & 0x7F80) != 0x7F80
    elif TYPE == 1:
        finite = (bits & 0x7C00) != 0x7C00
    elif TYPE == 2:
        finite = (bits & 0x7F80_0000) != 0x7F80_0000
    else:
        finite = (bits & 0x7FF0_0000_0000_0000) != 0x7FF0_0000_0000_0000
    return finite


@triton.jit
def _note(report, bad, row, position):
    """report[0] += how many are bad; report[1] is lowered to the first one's place."""
    count = tl.sum(bad.to(tl.int64))
    if count > 0:
        tl.atomic_add(report, count, sem="relaxed")
        place = tl.where(bad, (row << 31) + position, NOWHERE)
        tl.atomic_min(report + 1, tl.min(place), sem="relaxed")


@triton.jit
def _slot(spans, tiles, addresses, positions, n, k, TILE: tl.constexpr, PART: tl.constexpr):
    """This program's slots: which there are, row, source, entry and position of each."""
    part = tl.program_id(0)
    slot = part.to(tl.int64) * PART + tl.arange(0, PART)
    live = slot < n
    span = segment_of(spans, tiles, part // (TILE // PART), slot)
    row = span.to(tl.int32) // k  # tiles hold spans in 32 bits, in which division is cheaper
    source = span - (row * k).to(tl.int64)
    entry = tl.load(spans + 3 * span) + slot - tl.load(spans + 3 * span + 1)
    position = _load(addresses, source, 0, entry, positions, live)
    return slot, live, row.to(tl.int64), source, entry, position


@triton.jit(do_not_specialize=_NUMBERS)
def own_kernel(
    spans,
    tiles,
    addresses,
    weights,
    positions,
    new,
    owns,
    conflicts,
    n,
    k,
    steps,
    TYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    POLICY: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    """Which slots own their position. Under `refuse`, the conflicts of each slot with earlier ones.

    `positions` and `new` are looked at only for what they point at.
    """
    slot, live, row, source, entry, position = _slot(
        spans, tiles, addresses, positions, n, k, TILE, PART
    )
    owned = live
    if POLICY == REFUSE:
        base_bits = _load(addresses, source, 2, entry, new, live)
        base = base_bits
        if ARITHMETIC:
            base = decode(base_bits, TYPE).to(tl.float64)
        mine = _load(addresses, source, 1, entry, new, live)
        mine, _ = _alone(mine, base, tl.load(weights + source), TYPE, ARITHMETIC)
    for other in range(k):
        earlier = live & (other < source)
        _, there, shared = _look_up(
            spans, addresses, positions, row * k + other, other, position, steps, earlier
        )
        owned = owned & (shared == 0)
        if POLICY == REFUSE:
            theirs = _load(addresses, other, 1, there, new, shared)
            weight = tl.broadcast_to(tl.load(weights + other), [PART])
            theirs, _ = _alone(theirs, base, weight, TYPE, ARITHMETIC)
            ones = tl.full([PART], 1, tl.int64)
            pair = conflicts + other * k.to(tl.int64) + source
            tl.atomic_add(pair, ones, mask=shared & (mine != theirs), sem="relaxed")
    tl.store(owns + slot, owned.to(tl.int8), mask=live)


@triton.jit(do_not_specialize=_NUMBERS)
def resolve_kernel(
    spans,
    tiles,
    addresses,
    weights,
    ranks,
    owners_before,
    positions,
    new,
    old,
    report,
    n,
    k,
    steps,
    TYPE: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    POLICY: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    """Write each owner's position, resolved bits and base bits where they belong in the union.

    `owners_before` is int64[n + 1]; the report counts base mismatches and overflows, each with the
    first place.
    """
    slot, live, row, source, entry, position = _slot(
        spans, tiles, addresses, positions, n, k, TILE, PART
    )
    before = tl.load(owners_before + slot, mask=live, other=0)
    owner = live & (tl.load(owners_before + slot + 1, mask=live, other=0) > before)
    base_bits = _load(addresses, source, 2, entry, old, owner)
    chosen = _load(addresses, source, 1, entry, new, owner)  # the bits that count where one counts
    weight = tl.load(weights + source)
    rank = tl.load(ranks + source)
    base = base_bits
    if ARITHMETIC:
        base = decode(base_bits, TYPE).to(tl.float64)
    row_start = tl.load(spans + 3 * (row * k) + 1, mask=owner, other=0)
    place = tl.load(owners_before + row_start, mask=owner, other=0)

    same_base = owner
    finite = owner
    covering = tl.zeros_like(slot)
    total = tl.zeros([PART], tl.float64)
    above = tl.zeros([PART], tl.float64)
    below = tl.zeros([PART], tl.float64)
    n_above = tl.zeros_like(slot)
    n_below = tl.zeros_like(slot)
    for other in range(k):
        span = row * k + other
        low, there, covers = _look_up(
            spans, addresses, positions, span, other, position, steps, owner
        )
        start = tl.load(spans + 3 * span + 1, mask=owner, other=0)
        place += tl.load(owners_before + start + low, mask=owner, other=0)
        place -= tl.load(owners_before + start, mask=owner, other=0)
        theirs = _load(addresses, other, 1, there, new, covers)
        same_base = same_base & (
            (covers == 0) | (_load(addresses, other, 2, there, old, covers) == base_bits)
        )
        covering += covers.to(tl.int64)
        their_weight = tl.broadcast_to(tl.load(weights + other), [PART])
        if POLICY == REFUSE:
            _, one_finite = _alone(theirs, base, their_weight, TYPE, ARITHMETIC)
            finite = finite & ((covers == 0) | one_finite)
        elif POLICY == PRIORITY:
            better = covers & (tl.load(ranks + other) > rank)
            chosen = tl.where(better, theirs, chosen)
            weight = tl.where(better, their_weight, weight)
            rank = tl.where(better, tl.load(ranks + other), rank)
        elif ARITHMETIC:
            d = _difference(theirs, base, their_weight, TYPE)
            total = tl.where(covers, total + d, total)
            if POLICY == SIGN:  # of either sign, until the sum's is known
                above = tl.where(covers & (d > 0), above + d, above)
                below = tl.where(covers & (d < 0), below + d, below)
                n_above += (covers & (d > 0)).to(tl.int64)
                n_below += (covers & (d < 0)).to(tl.int64)

    result, one_finite = _alone(chosen, base, weight, TYPE, ARITHMETIC)
    if ARITHMETIC and POLICY > PRIORITY:
        change = total
        if POLICY == MEAN:
            change = total / covering.to(tl.float64)
        elif POLICY == SIGN:
            # With a NaN none agrees: a division by 0, so an overflow.
            count = tl.where(total > 0, n_above, tl.where(total < 0, n_below, 0))
            change = tl.where(total > 0, above, below) / count.to(tl.float64)
        together = encode(base + change, TYPE)
        together_finite = _finite(together, TYPE)
        if POLICY == SIGN:
            together = tl.where(total == 0, base_bits, together)
            together_finite = together_finite | (total == 0)
        shared = covering > 1
        result = tl.where(shared, together, result)
        one_finite = tl.where(shared, together_finite, one_finite)
    finite = finite & one_finite

    tl.store(positions + place, position, mask=owner)
    tl.store(new + place, result, mask=owner)
    tl.store(old + place, base_bits, mask=owner)
    _note(report, owner & (same_base == 0), row, position)
    _note(report + 2, owner & (finite == 0), row, position)


# ---- the launches -----------------------------------------------------------------------------

Upload = Callable[[Sequence[npt.NDArray[np.generic]]], list[torch.Tensor]]
"""Brings host arrays to the device, as bytes."""


def merge(
    upload: Upload,
    sources: Sequence[DeviceSource],
    ranges: npt.NDArray[np.int64],
    dtype: DType,
    policy: str,
    order: Sequence[int],
) -> DeviceMerged:
    """The union; the only thing that waits for the device is reading the counts."""
    rows, k, _ = ranges.shape
    counts = ranges[:, :, 1].ravel()
    ends = np.cumsum(counts)
    n = int(ends[-1]) if len(ends) else 0
    if n == 0:
        return _nothing(upload, rows, k)
    spans = np.stack([ranges[:, :, 0].ravel(), ends - counts, counts], axis=1)
    addresses = [[s.positions.data_ptr(), s.new.data_ptr(), s.old.data_ptr()] for s in sources]
    # Mismatches, the first one's place; overflows, likewise; conflicts.
    report = np.zeros(4 + k * k, np.int64)
    report[[1, 3]] = NOWHERE.value
    there = upload(
        [
            spans,
            tiles_of(spans, n),
            np.array(addresses, np.int64),
            np.array([s.weight for s in sources], np.float64),
            np.asarray(order, np.int64),
            report,
            np.append(spans[::k, 1], n),
        ]
    )
    of = (torch.int64, torch.int32, torch.int64, torch.float64) + (torch.int64,) * 3
    spans_there, tiles, where, weights, ranks, report_there, starts = (
        t.view(kind) for t, kind in zip(there, of, strict=True)
    )

    device = report_there.device
    positions = torch.empty(n, dtype=torch.int32, device=device)
    new, old = (torch.empty(n * dtype.item_size, dtype=torch.uint8, device=device) for _ in "no")
    new_items, old_items = items(new, dtype.item_size), items(old, dtype.item_size)
    owns = torch.empty(n, dtype=torch.int8, device=device)
    grid = (-(-n // PART),)
    numbers = (n, k, int(counts.max()).bit_length())
    kinds = {
        "TYPE": dtype.code,
        "ARITHMETIC": dtype.has_arithmetic,
        "POLICY": POLICIES.index(policy),
    }
    own_kernel[grid](
        spans_there,
        tiles,
        where,
        weights,
        positions,
        new_items,
        owns,
        report_there[4:],
        *numbers,
        **kinds,
        **LAUNCH,
    )
    owners_before = torch.zeros(n + 1, dtype=torch.int64, device=device)
    torch.cumsum(owns, 0, dtype=torch.int64, out=owners_before[1:])
    resolve_kernel[grid](
        spans_there,
        tiles,
        where,
        weights,
        ranks,
        owners_before,
        positions,
        new_items,
        old_items,
        report_there,
        *numbers,
        **kinds,
        **LAUNCH,
    )
    told = torch.cat([report_there, owners_before[starts]]).cpu().numpy()
    mismatches, mismatch, overflows, overflow = told[:4].tolist()
    before = told[4 + k * k :]
    total = int(before[-1])
    return DeviceMerged(
        np.diff(before),
        positions[:total],
        new[: total * dtype.item_size],
        old[: total * dtype.item_size],
        told[4 : 4 + k * k].reshape(k, k),
        mismatches,
        _place(mismatch) if mismatches else None,
        overflows,
        _place(overflow) if overflows else None,
    )


def _place(key: int) -> tuple[int, int]:
    return key >> 31, key & (1 << 31) - 1


def _nothing(upload: Upload, rows: int, k: int) -> DeviceMerged:
    (empty,) = upload([np.empty(0, np.uint8)])
    conflicts = np.zeros((k, k), np.int64)
    counts = np.zeros(rows, np.int64)
    return DeviceMerged(counts, empty.view(torch.int32), empty, empty, conflicts, 0, None, 0, None)
