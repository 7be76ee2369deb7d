"""The backend `reference`: every verb as plainly as it can be said. It judges the others.

One entry at a time, in Python, numpy and torch; no step is shared with the C++ code.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.format import Bits, DType, Positions
from hotgraft.kernels import HostMemory, Merged, NanDifferenceError, Pair, Room, Source

_CELLS = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}


class ReferenceTable(NamedTuple):
    """The address of every entry's cell."""

    addresses: list[int]
    item_size: int

    @property
    def n_entries(self) -> int:
        return len(self.addresses)

    @property
    def nbytes(self) -> int:
        return 8 * len(self.addresses)


class Reference(HostMemory):
    """The verbs, slow and obvious.

    Example:
        >>> Reference().name
        'reference'
    """

    name = "reference"

    def table(
        self, segments: npt.NDArray[np.int64], positions: Positions, item_size: int
    ) -> ReferenceTable:
        addresses = []
        for base, first, count in segments.tolist():
            for position in positions[first : first + count].tolist():
                addresses.append(base + position * item_size)
        return ReferenceTable(addresses, item_size)

    def prefetch(self, table: ReferenceTable, values: Bits) -> None:
        pass  # it has no threads

    def gather(self, table: ReferenceTable, values: Bits) -> None:
        for entry, address in enumerate(table.addresses):
            values[entry] = _CELLS[table.item_size].from_address(address).value

    def scatter(self, table: ReferenceTable, values: Bits) -> None:
        for address, value in zip(table.addresses, values.tolist(), strict=True):
            _CELLS[table.item_size].from_address(address).value = value

    def compare(self, table: ReferenceTable, values: Bits) -> tuple[int, int]:
        held = np.empty_like(values)
        self.gather(table, held)
        different = np.flatnonzero(held != values)
        return len(different), int(different[0]) if len(different) else -1

    def difference(self, pair: Pair, room: Room) -> None:
        base, finetuned = tensor_bits(pair.base), tensor_bits(pair.finetuned)
        positions = np.flatnonzero(base != finetuned)
        to = room(len(positions))
        to.positions[:], to.new[:], to.old[:] = positions, finetuned[positions], base[positions]

    def select(self, pairs: Iterable[Pair], k: int | None) -> list[Positions]:
        pairs = list(pairs)
        differing = [np.flatnonzero(tensor_bits(p.base) != tensor_bits(p.finetuned)) for p in pairs]
        if k is None:
            return [positions.astype(np.int32) for positions in differing]
        ranked = []  # (minus score, pair, position) sorts as the contract says
        for index, (pair, positions) in enumerate(zip(pairs, differing, strict=True)):
            for position in positions.tolist():
                score = _score(pair, position)
                if math.isnan(score):
                    raise NanDifferenceError(index, position)
                ranked.append((-score, index, position))
        chosen = sorted(ranked)[:k]
        return [
            np.array(sorted(p for _, i, p in chosen if i == index), np.int32)
            for index in range(len(pairs))
        ]

    def merge(
        self,
        sources: Sequence[Source],
        ranges: npt.NDArray[np.int64],
        dtype: DType,
        policy: str,
        order: Sequence[int],
    ) -> Merged:
        k = len(sources)
        counts, out = [], []
        conflicts = np.zeros((k, k), np.int64)
        wrong_base, overflowed = [], []
        for row, spans in enumerate(ranges.tolist()):
            union: dict[int, list[tuple[int, int]]] = {}  # position -> (source, entry)
            for source, (first, count) in enumerate(spans):
                for entry in range(first, first + count):
                    position = int(sources[source].positions[entry])
                    union.setdefault(position, []).append((source, entry))
            counts.append(len(union))
            for position in sorted(union):
                cover = union[position]
                bases = [int(sources[s].old[e]) for s, e in cover]
                if len(set(bases)) > 1:
                    wrong_base.append((row, position))
                fresh = [int(sources[s].new[e]) for s, e in cover]
                weights = [sources[s].weight for s, _ in cover]
                ranks = [order[s] for s, _ in cover]
                if policy == "refuse" or len(cover) == 1:
                    results = [
                        resolve_one(f, b, w, dtype)
                        for f, b, w in zip(fresh, bases, weights, strict=True)
                    ]
                    for i in range(len(cover)):
                        for j in range(i + 1, len(cover)):
                            conflicts[cover[i][0], cover[j][0]] += results[i] != results[j]
                else:
                    results = [resolve(fresh, bases[0], weights, ranks, policy, dtype)]
                if any(r is None for r in results):
                    overflowed.append((row, position))
                out.append((position, results[0] or 0, bases[0]))
        positions, new, old = zip(*out, strict=True) if out else ((), (), ())
        return Merged(
            np.array(counts, np.int64),
            np.array(positions, np.int32),
            np.array(new, dtype.bits),
            np.array(old, dtype.bits),
            conflicts,
            len(wrong_base),
            wrong_base[0] if wrong_base else None,
            len(overflowed),
            overflowed[0] if overflowed else None,
        )

    def round(self, values: Bits, source: DType, target: DType) -> tuple[Bits, int]:
        overflows = 0
        rounded = []
        for value in values.tolist():
            number = number_of(value, source)
            bits = round_to_nearest(number, target)
            overflows += math.isfinite(number) and not math.isfinite(number_of(bits, target))
            rounded.append(bits)
        return np.array(rounded, target.bits), overflows


def resolve_one(new: int, old: int, weight: float, dtype: DType) -> int | None:
    """The bits one graft gives a position alone, or None on overflow (`docs/design.md`)."""
    if weight == 1.0:
        return new
    base = number_of(old, dtype)
    return _finite(base + weight * (number_of(new, dtype) - base), dtype)


def resolve(
    new: Sequence[int],
    old: int,
    weights: Sequence[float],
    order: Sequence[int],
    policy: str,
    dtype: DType,
) -> int | None:
    """The bits that several grafts give a shared position, or None on overflow.

    `new`, `weights` and `order` are given a covering graft each, in the order of graft ids.

    Example:
        >>> from hotgraft.format import DTYPES
        >>> hex(resolve([0x4000, 0x4040], 0x3F80, [1.0, 1.0], [0, 1], "sum", DTYPES["BF16"]))
        '0x4080'
    """
    if policy == "priority":
        winner = max(range(len(new)), key=lambda i: order[i])
        return resolve_one(new[winner], old, weights[winner], dtype)
    base = number_of(old, dtype)
    d = [w * (number_of(n, dtype) - base) for n, w in zip(new, weights, strict=True)]
    total = 0.0
    for one in d:
        total += one
    if policy == "sum":
        return _finite(base + total, dtype)
    if policy == "mean":
        return _finite(base + total / len(d), dtype)
    if total == 0:  # sign
        return old
    agreeing = [one for one in d if (one > 0) == (total > 0) and one != 0]
    part = 0.0
    for one in agreeing:
        part += one
    return _finite(base + part / len(agreeing), dtype)


def number_of(bits: int, dtype: DType) -> float:
    """The number that an element's bits stand for, exactly."""
    array = np.array([bits], dtype.bits)
    value: float = torch.from_numpy(array).view(dtype.torch).double().item()
    return value


def round_to_nearest(number: float, dtype: DType) -> int:
    """The bits of the dtype's value nearest to `number`; of two equally near, the even ones.

    Compared as exact fractions among a guess of torch's and that guess's neighbours. A NaN becomes
    the quiet NaN of its sign.
    """
    width = 8 * dtype.item_size
    if math.isnan(number):
        quiet = dtype.nonfinite | (dtype.nonfinite & -dtype.nonfinite) >> 1
        return quiet | (math.copysign(1, number) < 0) << (width - 1)
    guess = torch.tensor([number], dtype=torch.float64).to(dtype.torch)
    bits = int(tensor_bits(guess)[0])
    if not math.isfinite(number) or number == 0:
        return bits
    sign = bits & (1 << (width - 1))
    magnitude = bits ^ sign
    # The infinity, seen as one step above the largest finite value, is where overflow rounds to.
    infinity = int(tensor_bits(torch.tensor([math.inf], dtype=dtype.torch))[0])
    exact = abs(Fraction(number))

    def value(candidate: int) -> Fraction:
        if candidate == infinity:
            return 2 * value(infinity - 1) - value(infinity - 2)
        return Fraction(number_of(candidate, dtype))

    candidates = [c for c in (magnitude - 1, magnitude, magnitude + 1) if 0 <= c <= infinity]
    return sign | min(candidates, key=lambda c: (abs(value(c) - exact), c & 1))


def tensor_bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A flat tensor's bits as numpy unsigned integers."""
    integers = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
    bits: npt.NDArray[Any] = tensor.contiguous().view(integers[tensor.element_size()]).numpy()
    return bits


def _score(pair: Pair, position: int) -> float:
    a, b = pair.base[position], pair.finetuned[position]
    if not pair.dtype.torch.is_floating_point:
        return float(abs(int(a.numpy()) - int(b.numpy())))
    if pair.dtype.item_size <= 2:
        return abs((a.float() - b.float()).item())
    return abs((a.double() - b.double()).item())


def _finite(number: float, dtype: DType) -> int | None:
    bits = round_to_nearest(number, dtype)
    return bits if math.isfinite(number_of(bits, dtype)) else None


BACKEND = Reference()
