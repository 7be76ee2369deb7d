"""The verbs and the backends that carry them out.

A backend is a module-level object with the methods of `Backend`. `resolve` picks one by name (which
never falls back) or by device. `reference` is the judge: every other backend gives the same bits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.errors import BackendError
from hotgraft.format import Bits, DType, Group, Positions

POLICIES = ("refuse", "priority", "sum", "mean", "sign")


class Pair(NamedTuple):
    """Two flat, contiguous tensors of one dtype and at most 2^31 elements, to be compared."""

    base: torch.Tensor
    finetuned: torch.Tensor
    dtype: DType


Room = Callable[[int], Group]
"""Gives arrays of so many entries."""


class Source(NamedTuple):
    """One graft's flat arrays of one dtype, for `merge`."""

    positions: Positions
    new: Bits
    old: Bits
    weight: float


class Merged(NamedTuple):
    """What `merge` found: the union's arrays and what stood in its way.

    After an overflow `new` and `conflicts` say nothing; after a base mismatch the overflows
    neither.
    """

    counts: npt.NDArray[np.int64]
    """int64[rows]: entries of each row's union."""
    positions: Positions
    new: Bits
    old: Bits
    conflicts: npt.NDArray[np.int64]
    """int64[k, k], upper triangle: entries on which two sources disagree under `refuse`."""
    base_mismatches: int
    first_base_mismatch: tuple[int, int] | None
    """(row, position)."""
    overflows: int
    first_overflow: tuple[int, int] | None


class NanDifferenceError(ValueError):
    """`select` met a NaN difference; args: the pair's index and the position in it."""


class Table(Protocol):
    """Entries of a whole model, of one item size, ready for one launch."""

    @property
    def n_entries(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


class Backend(Protocol):
    """The verbs. All are exact: two backends differ in no bit."""

    name: str

    def table(self, segments: npt.NDArray[np.int64], positions: Positions, item_size: int) -> Table:
        """Compile a table. `segments` is int64[n][3]: base address, first entry, count."""
        ...

    def prefetch(self, table: Any, values: Bits) -> None:
        """A hint, where the backend has a use for it, that `scatter` with these will come next."""
        ...

    def gather(self, table: Any, values: Bits) -> None:
        """Copy the table's cells into `values`."""
        ...

    def scatter(self, table: Any, values: Bits) -> None:
        """Copy `values` into the table's cells."""
        ...

    def compare(self, table: Any, values: Bits) -> tuple[int, int]:
        """How many cells do not hold `values`, and the lowest such entry (or -1)."""
        ...

    def difference(self, pair: Pair, room: Room) -> None:
        """The entries at which a pair's bits differ, in ascending order.

        Written into what `room` gives for their number: positions, the bits of `finetuned`, and
        those of `base`.
        """
        ...

    def select(self, pairs: Iterable[Pair], k: int | None) -> list[Positions]:
        """The differing entries of each pair, or the k largest |difference| of all pairs.

        Ascending positions, an array a pair. Ties go to the earlier pair, then the lower position;
        when fewer than k entries differ, all of them. `pairs` is iterated several times.
        """
        ...

    def merge(
        self,
        sources: Sequence[Source],
        ranges: npt.NDArray[np.int64],
        dtype: DType,
        policy: str,
        order: Sequence[int],
    ) -> Merged:
        """The union of the sources' entries, row by row, resolved under a policy.

        `ranges` is int64[rows][k][2]: first and count of each row in each source. Sums run in the
        order of the sources; under `priority` the source with the highest `order` wins.
        """
        ...

    def round(self, values: Bits, source: DType, target: DType) -> tuple[Bits, int]:
        """Convert bits between float types, rounded once; and how many overflowed to infinity.

        A NaN becomes the quiet NaN of its sign.
        """
        ...


_MODULES = {"cpu": "native_cpu", "reference": "reference"}
_NOT_BUILT = {
    "cuda": "this build has no CUDA kernels (csrc/cuda)",
    "triton": "this build has no Triton kernels (triton_kernels/)",
}


def available() -> dict[str, str | None]:
    """Every backend's name, with None where it runs here and the reason where it does not.

    Example:
        >>> available()["cpu"] is None
        True
    """
    found: dict[str, str | None] = {}
    for name in (*_MODULES, *_NOT_BUILT):
        try:
            resolve(name)
            found[name] = None
        except BackendError as error:
            found[name] = str(error)
    return found


def resolve(name: str | None = None, device: str = "cpu") -> Backend:
    """The backend of that name, or the one for tensors on `device`.

    Raises:
        BackendError: it is unknown, not built, or cannot run here. Never another one instead.
    """
    if name is None:
        if device != "cpu":
            raise BackendError(
                f"no backend for weights on {device!r}: {_NOT_BUILT['cuda']}; "
                "move the model to the CPU"
            )
        name = "cpu"
    if name in _NOT_BUILT:
        raise BackendError(f"backend {name!r}: {_NOT_BUILT[name]}")
    if name not in _MODULES:
        known = ", ".join((*_MODULES, *_NOT_BUILT))
        raise BackendError(f"unknown backend {name!r}; known are {known}")
    try:
        module = importlib.import_module(f"hotgraft.kernels.{_MODULES[name]}")
    except ImportError as error:
        raise BackendError(f"backend {name!r} does not load: {error}") from error
    backend: Backend = module.BACKEND
    return backend
