"""The file `*.graft.safetensors`, version 1: reading and writing it.

`docs/format.md` is the specification. A file is read whole into private memory, then parsed and
checked there, so a file that is rewritten or cut short meanwhile can fail a check but cannot
change what was checked. safetensors reads the header; nothing here unpickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors

from hotgraft import pinned
from hotgraft.errors import FormatError, GraftError
from hotgraft.format import (
    DTYPES,
    FORMAT,
    VERSION,
    Group,
    Provenance,
    Row,
    check_eligible,
    content_id,
    creator,
    frozen,
    table_text,
    validate,
)

_ID = re.compile("[0-9a-f]{64}")
_LONGEST_HEADER = 100_000_000
"""As safetensors has it."""


def write(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    groups: Mapping[str, Group],
    provenance: Provenance,
    graft_id: str,
) -> None:
    """Write a graft file: to a temporary file in the same folder, flushed, then renamed.

    A reader sees the old file or the new one, whole.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    target = Path(path)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "id": graft_id,
        "scope": provenance.scope,
        "eligible": str(provenance.eligible),
        "density": repr(sum(r.count for r in rows) / provenance.eligible),
        "method": provenance.method,
        "creator": provenance.creator,
        "table": table_text(rows),
    }
    if provenance.base_id is not None:
        metadata["base_id"] = provenance.base_id
    arrays = {
        f"{name}.{part}": (array, kind)
        for name, group in groups.items()
        for part, array, kind in zip(Group._fields, group, ("I32", name, name), strict=True)
    }
    # The largest items first, so that all are aligned; in one order, so that a graft has one file.
    order = sorted(arrays, key=lambda name: (-arrays[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        array, kind = arrays[name]
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": kind, "shape": [len(array)], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(target) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(arrays[name][0].data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to be written whole or not at all: beside its place first, flushed, then renamed.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(
    path: str | os.PathLike[str], *, verify_id: bool = True, pin: bool = False
) -> tuple[tuple[Row, ...], dict[str, Group], Provenance, str]:
    """Read and check a graft file: its rows, arrays, provenance and id.

    The arrays are private memory.

    Args:
        path: the file.
        verify_id: hash the contents and compare with the id that the file states; False takes the
            stated one on trust. Everything else is checked either way.
        pin: whether that memory is pinned, as far as the system gives any.

    Raises:
        FormatError: naming the file and what is wrong with it.
        OSError: the file cannot be read.
        MemoryError: there is no room for its contents.
    """
    if not isinstance(path, str | os.PathLike):  # a number is a file that somebody has open
        raise FormatError(f"{path!r} is no path; wanted that of a graft file")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER))
        try:
            if file.seek(0, os.SEEK_END) == size:
                _parse_header(header)  # first and alone: what is no graft can be large
            file.seek(0)
            data = file.read()
            if len(data) != size:
                raise GraftError(
                    f"its size went from {size} to {len(data)} bytes while it was read"
                )
            metadata = _parse_header(data[8 : 8 + int.from_bytes(data[:8], "little")])
            tensors = _deserialize(data)
            del data
            rows, provenance = parse_metadata(metadata)
            kinds = {name: (tensor["dtype"], tensor["shape"]) for name, tensor in tensors.items()}
            groups = _in_one_buffer(parse_groups(kinds, lambda name: tensors[name]["data"]), pin)
            validate(rows, groups)
            check_eligible(provenance.eligible, rows)
            stated = metadata.get("id")
            if stated is None or not _ID.fullmatch(stated):
                raise GraftError(f"it states {stated!r} where its id should be: get it anew")
            found = content_id(rows, groups) if verify_id else stated
            if found != stated:
                raise GraftError(
                    f"its contents have id {found}, but it states {stated}: the file "
                    "is damaged or was changed; get it anew"
                )
        except safetensors.SafetensorError as error:
            raise FormatError(f"{path}: not a safetensors file: {error}") from error
        except ValueError as error:  # GraftError is one
            raise FormatError(f"{path}: {error}") from error
    return rows, groups, provenance, found


def _deserialize(data: bytes) -> dict[str, Any]:
    """The tensors of a safetensors file, copied."""
    try:
        return dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except BaseException as error:
        # Where there is no room for a copy safetensors panics, and a panic is no `Exception`: in a
        # server's worker nobody would catch it.
        if type(error).__name__ != "PanicException":
            raise
        raise MemoryError(f"no room for the {len(data):,} bytes of a file: {error}") from error


def stated_id(path: str | os.PathLike[str]) -> str:
    """The id that a graft file states, from its header; nothing else is read or checked.

    Raises:
        FormatError: it is no graft file that this version reads.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        size = min(int.from_bytes(file.read(8), "little"), _LONGEST_HEADER)
        try:
            found = _parse_header(file.read(size)).get("id", "")
            if not _ID.fullmatch(found):
                raise GraftError(f"it states {found!r} where its id should be: get it anew")
        except GraftError as error:
            raise FormatError(f"{path}: {error}") from error
    return found


def _parse_header(text: bytes) -> dict[str, str]:
    """A safetensors header's metadata, that of a graft file."""
    try:
        metadata: dict[str, str] = json.loads(text).get("__metadata__") or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata must be strings")
    except (ValueError, AttributeError, RecursionError) as error:
        raise GraftError(f"not a safetensors file: {error}") from error
    check_metadata(metadata)
    return metadata


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Raises `GraftError` if it is not of a graft file that this version reads."""
    if metadata.get("format") != FORMAT:
        raise GraftError(
            f"a safetensors file, but not a graft (format {metadata.get('format')!r}, wanted "
            f"{FORMAT!r}); hotgraft.diff makes grafts from two checkpoints"
        )
    if metadata.get("version") != str(VERSION):
        raise GraftError(
            f"graft format version {metadata.get('version')!r}; this is {creator()}, which reads "
            f"version {VERSION}"
        )


def parse_metadata(metadata: Mapping[str, str]) -> tuple[tuple[Row, ...], Provenance]:
    """What a graft file's metadata says. `validate` checks the rows.

    Raises:
        GraftError: a key is missing or malformed.
    """
    try:
        rows = _parse_table(metadata["table"])
        eligible = metadata["eligible"]
        if not (eligible.isascii() and eligible.isdigit()):
            raise GraftError(f"eligible is {eligible!r}, not a count")
        provenance = Provenance(
            metadata.get("base_id"),
            metadata["scope"],
            int(eligible),
            metadata["method"],
            metadata["creator"],
        )
    except KeyError as error:
        raise GraftError(f"the metadata lacks {error}") from error
    return rows, provenance


def _parse_table(text: str) -> tuple[Row, ...]:
    try:
        table = json.loads(text)
        rows = []
        for name, shape, dtype, block, first, count in table:
            numbers = (*shape, block, first, count)
            kinds = (type(name), type(shape), type(dtype))
            if kinds != (str, list, str) or any(type(number) is not int for number in numbers):
                raise TypeError(f"row {name!r} is not [name, shape, dtype, block, first, count]")
            rows.append(Row(name, tuple(shape), dtype, block, first, count))
    except (TypeError, ValueError, RecursionError) as error:
        raise GraftError(f"the table is malformed: {error}") from error
    return tuple(rows)


def parse_groups(
    tensors: Mapping[str, tuple[str, Sequence[int]]], data: Callable[[str], Any]
) -> dict[str, Group]:
    """The arrays of a graft file, given its tensors' dtypes and shapes, and the bytes of each.

    Raises:
        GraftError: a tensor is missing, unexpected, or of another dtype or shape.
    """
    groups = {}
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        if name not in DTYPES:
            raise GraftError(f"unknown dtype {name!r}; known are {', '.join(DTYPES)}")
        arrays = []
        bits = DTYPES[name].bits
        for part, dtype, kind in zip(
            Group._fields, (np.dtype(np.int32), bits, bits), ("I32", name, name), strict=True
        ):
            if (full := f"{name}.{part}") not in tensors:
                raise GraftError(f"the tensor {full} is missing")
            stored, shape = tensors[full]
            if stored != kind or len(shape) != 1:
                raise GraftError(f"{full} is {stored} of shape {shape}; wanted a flat {kind}")
            arrays.append(np.frombuffer(data(full), dtype))
        groups[name] = Group(*arrays)
    if len(tensors) != 3 * len(groups):
        raise GraftError(f"unexpected tensors beside positions, new and old: {sorted(tensors)}")
    return groups


def _in_one_buffer(groups: Mapping[str, Group], pin: bool) -> dict[str, Group]:
    """The same arrays in one read-only buffer, each at a multiple of 16 bytes.

    One allocation a graft wastes less than one an array.
    """
    room = sum(-(-array.nbytes // 16) * 16 for group in groups.values() for array in group)
    buffer = pinned.empty(room + 16) if pin else np.empty(room + 16, np.uint8)
    at = -buffer.ctypes.data % 16
    packed = {}
    for name, group in groups.items():
        arrays = []
        for array in group:
            view = buffer[at : at + array.nbytes].view(array.dtype)
            view[:] = array
            arrays.append(frozen(view))
            at += -(-array.nbytes // 16) * 16
        packed[name] = Group(*arrays)
    return packed
