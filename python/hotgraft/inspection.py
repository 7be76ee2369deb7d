"""Look into a graft file without holding it: it is mapped, and read a tensor at a time."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from hotgraft import files
from hotgraft.errors import FormatError, GraftError
from hotgraft.format import DTYPES, Group, Row, check_eligible, validate
from hotgraft.graft import bit_view

_SLICE = 1 << 20


class TensorSummary(NamedTuple):
    """One tensor's part of a graft."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    entries: int
    share: float
    """Entries over the tensor's elements."""
    largest_change: float
    """The largest |new - old|, in double; NaN where some change is not a number."""


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a graft file says of itself, and what its entries do."""

    path: Path
    nbytes: int
    """The file's size."""
    metadata: Mapping[str, str]
    """As stored, without the table: id, version, scope, eligible, density, method, creator, ..."""
    tensors: tuple[TensorSummary, ...]

    @property
    def entries(self) -> int:
        """How many entries it holds."""
        return sum(tensor.entries for tensor in self.tensors)

    @property
    def eligible(self) -> int:
        """Elements in its scope: the denominator of its density."""
        return int(self.metadata["eligible"])

    @property
    def density(self) -> float:
        """Entries over eligible elements."""
        return self.entries / self.eligible


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Summarise a graft file. Rows and positions are checked; the id is not (`Graft.load` does).

    Raises:
        FormatError: not a valid graft file.
        OSError: it cannot be read.

    Example:
        >>> import hotgraft, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "one.graft.safetensors"
        >>> tuned = {"w": torch.tensor([0.0, 2.0])}
        >>> hotgraft.diff({"w": torch.zeros(2)}, tuned).save(path)
        >>> inspect(path).tensors[0].largest_change
        2.0
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            files.check_metadata(metadata)
            rows, provenance = files.parse_metadata(metadata)
            pieces = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            groups = files.parse_groups(
                {name: (piece.get_dtype(), piece.get_shape()) for name, piece in pieces.items()},
                lambda name: bit_view(file.get_tensor(name)).data,
            )
            validate(rows, groups)
            check_eligible(provenance.eligible, rows)
            if "id" not in metadata:
                raise GraftError("the metadata lacks 'id'")
            del metadata["table"]
            tensors = tuple(
                _summarise([row for row in rows if row.name == name], groups)
                for name in dict.fromkeys(row.name for row in rows)
            )
    except SafetensorError as error:
        raise FormatError(f"{path}: not a safetensors file: {error}") from error
    except GraftError as error:
        raise FormatError(f"{path}: {error}") from error
    return Inspection(Path(path), Path(path).stat().st_size, metadata, tensors)


def _summarise(rows: list[Row], groups: Mapping[str, Group]) -> TensorSummary:
    name, shape, dtype = rows[0][:3]
    entries = sum(row.count for row in rows)
    changes = [_largest_change(row, groups[dtype]) for row in rows]
    largest = math.nan if any(map(math.isnan, changes)) else max(changes)
    return TensorSummary(name, shape, dtype, entries, entries / prod(shape), largest)


def _largest_change(row: Row, group: Group) -> float:
    largest = 0.0
    for begin in range(row.first, row.first + row.count, _SLICE):
        end = min(begin + _SLICE, row.first + row.count)
        new, old = (
            torch.from_numpy(np.array(bits[begin:end])).view(DTYPES[row.dtype].torch).double()
            for bits in (group.new, group.old)
        )
        change = float((new - old).abs().max())  # max() of anything with a NaN is NaN
        if math.isnan(change):
            return change
        largest = max(largest, change)
    return largest
