"""Fitting a graft to a host: its names, shapes and dtypes become the host's, or it is refused."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.errors import (
    BaseMismatchError,
    CastWarning,
    CoverageError,
    NonFiniteError,
    PartialWarning,
)
from hotgraft.format import DTYPES, Bits, DType, Group, Positions, Row, blocks
from hotgraft.graft import Graft
from hotgraft.kernels import Backend
from hotgraft.placement.memory import Offsets, memory_offsets
from hotgraft.placement.names import Names, missing_message, resolve_names
from hotgraft.placement.slots import Slot, check_writable, memory_regions
from hotgraft.weights import sample

Part: TypeAlias = tuple[Row, Positions, Bits, Bits]
"""A row with its positions, new and old bits."""


def refuse_nonfinite(graft: Graft) -> None:
    """Raises `NonFiniteError`, naming the entry, if the graft would write a NaN or infinity."""
    suspects = {
        dtype
        for dtype, group in graft.groups.items()
        if (mark := DTYPES[dtype].nonfinite) and _marked(group.new, mark).any()
    }
    for row in graft.rows:
        if row.dtype in suspects:
            positions, new, _ = graft.arrays(row)
            wrong = np.flatnonzero(_marked(new, DTYPES[row.dtype].nonfinite))
            if len(wrong):
                raise NonFiniteError(
                    f"{row.name!r}, position {row.block + int(positions[wrong[0]])}: the graft "
                    f"writes a NaN or infinity (bits {int(new[wrong[0]]):#x}); "
                    "allow_nonfinite=True lets it"
                )


def _marked(bits: Bits, mark: int) -> npt.NDArray[np.bool_]:
    """Where all the bits of the mark are set."""
    every = bits.dtype.type(mark)
    marked: npt.NDArray[np.bool_] = bits & every == every
    return marked


def fit(
    graft: Graft,
    slots: Mapping[str, Slot],
    model: torch.nn.Module,
    backend: Backend,
    *,
    names: Names | None = None,
    cast: bool = False,
    partial: bool = False,
    allow_nonfinite: bool = False,
) -> Graft:
    """The graft in the host's names and dtypes.

    Raises:
        CoverageError: a tensor has no counterpart, two have the same, or two share memory here
            but not their bits.
        LayoutError, ParameterError: the counterpart cannot be written.
        BaseMismatchError: shapes differ, or dtypes do and `cast` was not given.
        NonFiniteError: a value overflows in the host's dtype.
    """
    found, missing = resolve_names(graft.names, slots, model, names)
    if missing and (not partial or not found):
        raise CoverageError(missing_message(missing, slots))
    if missing:
        lost = sum(row.count for row in graft.rows if row.name in missing)
        warnings.warn(
            f"{lost} of {graft.nnz} entries are left out: the host lacks {sample(missing)}",
            PartialWarning,
            stacklevel=3,
        )
    doubled = {target for target, uses in Counter(found.values()).items() if uses > 1}
    if doubled:
        raise CoverageError(f"several of the graft's tensors map to {sample(doubled)}")
    # Once is enough: what would change a slot's nature, check_in_place() finds.
    unknown = {s for t in found.values() for s in (slots[t], slots[t].home) if not s.writable}
    regions = memory_regions() if unknown else []
    for slot in sorted(unknown, key=lambda slot: slot.name):
        check_writable(slot, regions)
        slot.writable = True
    shapes = graft.shapes
    for name, target in found.items():
        slot, shape = slots[target], shapes[name]
        if shape != slot.shape:
            raise BaseMismatchError(
                f"{name!r} has shape {list(shape)} in the graft and {list(slot.shape)} in the host "
                f"({target!r}): it was made for another model"
            )
    fitted = _rename(graft, {name: slots[target] for name, target in found.items()})
    return _cast(fitted, slots, backend, cast, allow_nonfinite)


def _rename(graft: Graft, found: Mapping[str, Slot]) -> Graft:
    """The graft in the names of the home slots, whatever it says of a cell said once."""
    tellers: dict[str, list[str]] = {}  # a home's name -> the graft's names for it
    for name, slot in found.items():
        tellers.setdefault(slot.home.name, []).append(name)
    # Names and shapes become the host's own objects, so a skill holds no strings of its own.
    shapes = {name: slot.shape for name, slot in found.items()}
    alone = {names[0] for names in tellers.values() if len(names) == 1}
    alone = {name for name in alone if found[name].home is found[name]}
    kept = [row for row in graft.rows if row.name in alone]
    rows = [row._replace(name=found[row.name].name, shape=shapes[row.name]) for row in kept]
    if rows == list(graft.rows):
        return Graft(rows, graft.groups, graft.provenance, known_id=graft.id, checked=True)
    if len(rows) == len(graft.rows) and rows == sorted(rows, key=lambda r: (r.name, r.block)):
        return Graft(rows, graft.groups, graft.provenance, checked=True)
    parts = [(row, *graft.arrays(old)) for row, old in zip(rows, kept, strict=True)]
    for names in tellers.values():
        if alone.isdisjoint(names):
            parts += _united(graft, {name: found[name] for name in names})
    return assemble(graft, parts)


def _united(graft: Graft, found: Mapping[str, Slot]) -> list[Part]:
    """What the graft says of slots with the same home, as rows of that home.

    A position may be said under one name or, in the same bits, under several.
    """
    home = next(iter(found.values())).home
    rows = [row for row in graft.rows if row.name in found]
    columns = [(_in_home(graft, row, found[row.name]), *graft.arrays(row)[1:]) for row in rows]
    where, new, old = (np.concatenate(column) for column in zip(*columns, strict=True))
    if len({row.dtype for row in rows}) > 1:
        _refuse_tied(found)
    return rows_of(home.name, home.shape, rows[0].dtype, *unite(found, where, new, old))


def unite(names: Iterable[str], where: Offsets, new: Bits, old: Bits) -> tuple[Offsets, Bits, Bits]:
    """Entries of one tensor, in any order, as ascending ones; a position may come again, unchanged.

    Args:
        names: the tensors of the graft that they come from, for the message.
        where: int64[n], positions in C order.
        new, old: their bits.

    Raises:
        CoverageError: the bits at a position that comes again differ.
    """
    order = np.argsort(where, kind="stable")
    where, new, old = where[order], new[order], old[order]
    again = np.flatnonzero(where[1:] == where[:-1])
    if (new[again] != new[again + 1]).any() or (old[again] != old[again + 1]).any():
        _refuse_tied(names)
    return np.delete(where, again), np.delete(new, again), np.delete(old, again)


def _refuse_tied(names: Iterable[str]) -> NoReturn:
    first, second, *_ = (*sorted(set(names)), *names)
    raise CoverageError(
        f"{first!r} and {second!r} share memory in this host (tied), but the graft's "
        "entries for them differ; leave one of them out"
    )


def rows_of(
    name: str, shape: tuple[int, ...], dtype: str, where: Offsets, new: Bits, old: Bits
) -> list[Part]:
    """Ascending entries of one tensor as rows, one a block."""
    parts = []
    for block, size in blocks(prod(shape)):
        begin, end = np.searchsorted(where, (block, block + size))
        if begin < end:
            row = Row(name, shape, dtype, block, 0, int(end - begin))
            positions = (where[begin:end] - block).astype(np.int32)
            parts.append((row, positions, new[begin:end], old[begin:end]))
    return parts


def _in_home(graft: Graft, row: Row, slot: Slot) -> Offsets:
    """A row's positions as C-order positions in the slot's home."""
    positions = graft.arrays(row).positions.astype(np.int64) + row.block
    if slot.home is slot:
        return positions
    distance = slot.tensor.data_ptr() - slot.home.tensor.data_ptr()
    offsets: Offsets = memory_offsets(positions, slot.tensor)
    return offsets + distance // slot.tensor.element_size()


def assemble(graft: Graft, parts: Sequence[Part]) -> Graft:
    """A graft from rows and their arrays, in any order."""
    rows: list[Row] = []
    arrays: dict[str, list[Group]] = {}
    filled: dict[str, int] = {}
    for row, positions, new, old in sorted(parts, key=lambda p: (p[0].name, p[0].block)):
        first = filled.get(row.dtype, 0)
        rows.append(row._replace(first=first))
        filled[row.dtype] = first + row.count
        arrays.setdefault(row.dtype, []).append(Group(positions, new, old))
    groups = {
        dtype: Group(*(np.concatenate(column) for column in zip(*group, strict=True)))
        for dtype, group in arrays.items()
    }
    entries = sum(
        row.count for row in rows
    )  # more than the graft's where one lies in several places
    eligible = max(graft.provenance.eligible, entries)
    return Graft(rows, groups, replace(graft.provenance, eligible=eligible), checked=True)


def _cast(
    graft: Graft, slots: Mapping[str, Slot], backend: Backend, cast: bool, allow_nonfinite: bool
) -> Graft:
    wrong = [row for row in graft.rows if slots[row.name].dtype.name != row.dtype]
    if not wrong:
        return graft
    row, dtype = wrong[0], slots[wrong[0].name].dtype
    castable = all(DTYPES[r.dtype].has_arithmetic for r in wrong) and all(
        slots[r.name].dtype.has_arithmetic for r in wrong
    )
    if not cast or not castable:
        hint = (
            "cast=True rounds the graft to the host's precision"
            if castable
            else "only BF16, F16, F32 and F64 can be cast to one another"
        )
        raise BaseMismatchError(
            f"{row.name!r} is {row.dtype} in the graft and {dtype.name} in the host; {hint}"
        )
    parts, vanished, overflows = [], 0, 0
    for row in graft.rows:
        positions, new, old = graft.arrays(row)
        target = slots[row.name].dtype
        if target.name != row.dtype:
            (rounded, over), (old_rounded, _) = (
                _converted(backend, array, DTYPES[row.dtype], target) for array in (new, old)
            )
            overflows += over
            vanished += int(np.count_nonzero((rounded == old_rounded) & (new != old)))
            new, old = rounded, old_rounded
        parts.append((row._replace(dtype=target.name), positions, new, old))
    if overflows and not allow_nonfinite:
        raise NonFiniteError(
            f"{overflows} values overflow in the host's precision; allow_nonfinite=True lets them"
        )
    if vanished:
        warnings.warn(
            f"{vanished} of {graft.nnz} entries equal the base once rounded to the host's "
            "precision: they change nothing",
            CastWarning,
            stacklevel=4,
        )
    return assemble(graft, parts)


def _converted(backend: Backend, bits: Bits, source: DType, target: DType) -> tuple[Bits, int]:
    """Bits in another precision, and how many overflow: as torch's `copy_` has it, for that is how
    models get theirs from a checkpoint. From F64 to 16 bits it goes by way of F32.
    """
    if source.item_size == 8 and target.item_size == 2:
        middle = DTYPES["F32"]
        bits, early = backend.round(bits, source, middle)
        bits, late = backend.round(bits, middle, target)
        return bits, early + late
    return backend.round(bits, source, target)
