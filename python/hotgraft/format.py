"""What a graft is made of, and what every row and array of it must satisfy.

`docs/format.md` is the specification; `files` reads and writes it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.errors import GraftError

FORMAT = "hotgraft"
VERSION = 1
BLOCK = 2**31
"""Elements a row covers at most: positions are int32, relative to the row's block."""

Bits = npt.NDArray[Any]
"""Raw bits of elements: uint8, uint16, uint32 or uint64."""
Positions = npt.NDArray[np.int32]


class DType(NamedTuple):
    """An element type: its safetensors name, torch dtype, size, and code in csrc/core/value.h."""

    name: str
    torch: torch.dtype
    item_size: int
    code: int
    has_arithmetic: bool
    """Whether policies may add differences of it; the others are only moved."""
    nonfinite: int = 0
    """The bits that are all set in a NaN or infinity; 0 where the type has neither."""

    @property
    def bits(self) -> np.dtype[Any]:
        """The numpy dtype that holds one element's bits."""
        return np.dtype(f"u{self.item_size}")


DTYPES: Mapping[str, DType] = {
    d.name: d
    for d in (
        DType("BF16", torch.bfloat16, 2, 0, True, 0x7F80),
        DType("F16", torch.float16, 2, 1, True, 0x7C00),
        DType("F32", torch.float32, 4, 2, True, 0x7F80_0000),
        DType("F64", torch.float64, 8, 3, True, 0x7FF0_0000_0000_0000),
        DType("F8_E4M3", torch.float8_e4m3fn, 1, 4, False, 0x7F),
        DType("F8_E5M2", torch.float8_e5m2, 1, 5, False, 0x7C),
        DType("I8", torch.int8, 1, 6, False),
        DType("I16", torch.int16, 2, 7, False),
        DType("I32", torch.int32, 4, 8, False),
        DType("I64", torch.int64, 8, 9, False),
        DType("U8", torch.uint8, 1, 10, False),
        DType("BOOL", torch.bool, 1, 10, False),
        DType("U16", torch.uint16, 2, 11, False),
        DType("U32", torch.uint32, 4, 12, False),
        DType("U64", torch.uint64, 8, 13, False),
    )
}
_BY_TORCH = {d.torch: d for d in DTYPES.values()}


def dtype_of(tensor_dtype: torch.dtype, name: str) -> DType:
    """The `DType` of a torch dtype; `name` is the tensor's, for the message.

    Raises:
        GraftError: the type is not one that grafts can hold (complex, packed, sub-byte).
    """
    try:
        return _BY_TORCH[tensor_dtype]
    except KeyError:
        raise GraftError(
            f"{name!r} has dtype {tensor_dtype}; a graft holds {', '.join(DTYPES)}"
        ) from None


class Row(NamedTuple):
    """One tensor (or one block of 2^31 elements of it) in a graft."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    block: int
    """Element offset of the row's block: a multiple of 2^31."""
    first: int
    """Index of the row's first entry in its dtype's flat arrays."""
    count: int  # type: ignore[assignment]


class Group(NamedTuple):
    """The flat arrays of one dtype, all of the same length, read-only."""

    positions: Positions
    new: Bits
    old: Bits


def empty_group(dtype: DType, n: int) -> Group:
    """Uninitialised arrays of n entries.

    Example:
        >>> empty_group(DTYPES["BF16"], 3).new.dtype
        dtype('uint16')
    """
    return Group(*(np.empty(n, kind) for kind in (np.int32, dtype.bits, dtype.bits)))


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a graft comes from. It is not part of the graft's id.

    Example:
        >>> Provenance(scope="encoder", eligible=10_646_784, method="magnitude").scope
        'encoder'
    """

    base_id: str | None = None
    """`hotgraft.fingerprint` of the base, where it is known."""
    scope: str = "covered"
    """Which tensors were eligible: `all`, `encoder`, `linear`, a predicate's name, or `covered`."""
    eligible: int = 0
    """Elements in that scope: the denominator of the density."""
    method: str = "given"
    """How the mask was found: `exact`, `magnitude`, `composed`, ..."""
    creator: str = ""
    """Name and version of the program that made it."""

    def __post_init__(self) -> None:
        """Raises `GraftError` for what a file could not hold."""
        if type(self.eligible) is not int or self.eligible < 0:
            raise GraftError(f"eligible is {self.eligible!r}, not a count")
        for part in ("scope", "method", "creator", "base_id"):
            if part != "base_id" or self.base_id is not None:
                _check_text(part, getattr(self, part))


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _check_text(what: str, text: object) -> None:
    """Refuse what is no text, or could not be written or shown: control characters, surrogates."""
    if not isinstance(text, str) or _CONTROL.search(text):
        raise GraftError(f"the {what} {text!a} is not text without control characters")


def creator() -> str:
    """This package's name and version."""
    try:
        return f"hotgraft {version('hotgraft')}"
    except PackageNotFoundError:
        return "hotgraft"


def blocks(count: int) -> Iterator[tuple[int, int]]:
    """The (offset, size) of the blocks of a tensor of `count` elements.

    Example:
        >>> list(blocks(2**31 + 5))
        [(0, 2147483648), (2147483648, 5)]
    """
    for start in range(0, count, BLOCK):
        yield start, min(BLOCK, count - start)


def frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """An array on the same memory that cannot be made writable again, unlike a read-only one.

    Example:
        >>> frozen(np.arange(3)).setflags(write=True)
        Traceback (most recent call last):
        ValueError: cannot set WRITEABLE flag to True of this array
    """
    if not array.size or (isinstance(array.base, memoryview) and array.base.readonly):
        return array
    return np.frombuffer(array.data.toreadonly(), array.dtype)


# ---- what must hold of rows and arrays --------------------------------------------------------


def validate(rows: Sequence[Row], groups: Mapping[str, Group]) -> None:
    """Check everything that the engine later relies on.

    Raises:
        GraftError: naming the tensor and the position that is wrong.
    """
    if not rows:
        raise GraftError("the graft is empty: it needs at least one entry")
    filled = dict.fromkeys(groups, 0)
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        _validate_row(row, before, groups, filled.get(row.dtype, -1))
        filled[row.dtype] += row.count
    for name, group in groups.items():
        if name not in DTYPES:
            raise GraftError(f"unknown dtype {name!r}; known are {', '.join(DTYPES)}")
        for part, array, kind in zip(
            Group._fields, group, (np.dtype(np.int32), *[DTYPES[name].bits] * 2), strict=True
        ):
            if array.dtype != kind or array.ndim != 1 or not array.flags.c_contiguous:
                raise GraftError(
                    f"{name}.{part} is {array.dtype} of shape {list(array.shape)}; wanted a flat, "
                    f"contiguous {kind}"
                )
        sizes = {len(group.positions), len(group.new), len(group.old)}
        if sizes != {filled[name]} or not filled[name]:
            raise GraftError(
                f"{name}: the rows count {filled[name]} entries, but there are "
                f"{len(group.positions)} positions, {len(group.new)} new and {len(group.old)} old"
            )
        _validate_positions([r for r in rows if r.dtype == name], group.positions)


def _validate_row(row: Row, before: Row | None, groups: Mapping[str, Group], filled: int) -> None:
    _check_text("name", row.name)
    if row.dtype not in DTYPES:
        raise GraftError(
            f"{row.name!r}: unknown dtype {row.dtype!r}; known are {', '.join(DTYPES)}"
        )
    if row.dtype not in groups:
        raise GraftError(f"{row.name!r} is of dtype {row.dtype}, but the graft has no such arrays")
    if not _is_possible(row.shape):
        raise GraftError(f"{row.name!r}: shape {list(row.shape)} is not a possible shape")
    if row.block % BLOCK or not 0 <= row.block < prod(row.shape):
        raise GraftError(f"{row.name!r}: block offset {row.block} is not one of its shape's blocks")
    if row.count <= 0 or row.first != filled:
        raise GraftError(
            f"{row.name!r}: entries [{row.first}, {row.first} + {row.count}) do not follow the "
            f"{max(filled, 0)} entries of the rows before it"
        )
    if before is not None and (before.name, before.block) >= (row.name, row.block):
        raise GraftError(f"rows must be sorted and unique: {row.name!r} follows {before.name!r}")
    if before is not None and before.name == row.name and before[:3] != row[:3]:
        raise GraftError(f"{row.name!r}: its blocks disagree on shape or dtype")


def _is_possible(shape: Sequence[int]) -> bool:
    elements = 1
    for size in shape:
        elements *= max(size, 0)
        if not 0 < elements < 2**63:  # at once: a hostile shape's product could fill the memory
            return False
    return True


def _validate_positions(rows: Sequence[Row], positions: Positions) -> None:
    starts = np.fromiter((r.first for r in rows), np.int64, len(rows))
    ends = starts + np.fromiter((r.count for r in rows), np.int64, len(rows))
    limits = np.fromiter((min(BLOCK, prod(r.shape) - r.block) for r in rows), np.int64, len(rows))
    rising = positions[1:] > positions[:-1]
    rising[starts[1:] - 1] = True
    good = rising.all() and (positions[starts] >= 0).all() and (positions[ends - 1] < limits).all()
    if good:
        return
    for row, limit in zip(rows, limits.tolist(), strict=True):
        here = positions[row.first : row.first + row.count]
        outside = np.flatnonzero((here < 0) | (here >= limit))
        if len(outside):
            raise GraftError(
                f"{row.name!r}: position {here[outside[0]]} is outside [0, {limit}) "
                f"(shape {list(row.shape)}, block {row.block})"
            )
        falls = np.flatnonzero(here[1:] <= here[:-1])
        if len(falls):
            raise GraftError(
                f"{row.name!r}: positions must ascend without repeats, but {here[falls[0] + 1]} "
                f"follows {here[falls[0]]}"
            )


def check_eligible(eligible: int, rows: Sequence[Row]) -> None:
    """Raises `GraftError` if `eligible` cannot be the denominator of these rows' density."""
    entries = sum(row.count for row in rows)
    if not entries <= eligible < 2**63:
        raise GraftError(
            f"{eligible} eligible elements cannot be: the graft has {entries} entries, and a model "
            "fewer than 2^63 elements"
        )


def content_id(rows: Sequence[Row], groups: Mapping[str, Group]) -> str:
    """SHA-256 (hex) over names, shapes, dtypes, positions, new and old bits, in canonical order.

    `docs/format.md` gives the bytes that are hashed. No metadata takes part.
    """
    digest = hashlib.sha256(b"hotgraft graft 1\n")
    digest.update(table_text(rows).encode())
    for name in sorted(groups):
        for array in groups[name]:
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def table_text(rows: Sequence[Row]) -> str:
    """The rows as a file's metadata holds them."""
    return json.dumps(
        [[r.name, list(r.shape), r.dtype, r.block, r.first, r.count] for r in rows],
        separators=(",", ":"),
    )
