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


class Part(NamedTuple):
    """What one table writes, on its way to where the backend wants it."""

    segments: npt.NDArray[np.int64]
    """int64[n][3]: base address, first entry, count."""
    positions: Positions
    new: Bits
    old: Bits
    item_size: int


class Loaded(NamedTuple):
    """The same, ready for the verbs: a table, and values as `Backend.values` gives them."""

    table: Any
    new: Any
    old: Any


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
    exchanges: bool
    """Whether `exchange` is faster than two scatters."""

    def prepare(self, parts: Sequence[Part]) -> list[Loaded]:
        """Bring tables and values where the verbs want them; all at once, for that is faster."""
        ...

    def table(self, segments: npt.NDArray[np.int64], positions: Positions, item_size: int) -> Table:
        """Compile a table. `segments` is int64[n][3]: base address, first entry, count."""
        ...

    def values(self, bits: Bits) -> Any:
        """Bits as the verbs want them."""
        ...

    def read(self, values: Any, bits: np.dtype[np.unsignedinteger[Any]]) -> Bits:
        """Values as numpy has them."""
        ...

    def prefetch(self, table: Any, values: Any) -> None:
        """A hint, where the backend has a use for it, that `scatter` with these will come next."""
        ...

    def gather(self, table: Any, values: Any) -> None:
        """Copy the table's cells into `values`."""
        ...

    def scatter(self, table: Any, values: Any) -> None:
        """Copy `values` into the table's cells."""
        ...

    def exchange(self, leaving: tuple[Any, Any], entering: tuple[Any, Any]) -> None:
        """Scatter two tables' values; the tables share no cell and have items of one size."""
        ...

    def compare(self, table: Any, values: Any) -> tuple[int, int]:
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


class HostMemory(Backend, Protocol):
    """What backends share whose tables and values are numpy arrays."""

    exchanges: bool = False

    def prepare(self, parts: Sequence[Part]) -> list[Loaded]:
        return [
            Loaded(self.table(part.segments, part.positions, part.item_size), part.new, part.old)
            for part in parts
        ]

    def values(self, bits: Bits) -> Bits:
        return bits

    def read(self, values: Bits, bits: np.dtype[np.unsignedinteger[Any]]) -> Bits:
        return values.view(bits)

    def exchange(self, leaving: tuple[Any, Bits], entering: tuple[Any, Bits]) -> None:
        self.scatter(*leaving)
        self.scatter(*entering)


_ON_CPU = {"cpu": "native_cpu", "reference": "reference"}
_ON_DEVICE = {"cuda": "native_cuda", "triton": "triton"}
"""Those that are preferred come first."""
_NAMES = (*_ON_CPU, *_ON_DEVICE)


def available() -> dict[str, str | None]:
    """Every backend's name, with None where it runs here and the reason where it does not.

    Example:
        >>> available()["cpu"] is None
        True
    """
    found: dict[str, str | None] = {}
    for name in _NAMES:
        try:
            module = _module(name)
            found[name] = module.why_not() if name in _ON_DEVICE else None
            if name in _ON_DEVICE and found[name] is None and torch.cuda.is_available():
                module.open_backend(torch.device("cuda"), None)  # may lack code for this GPU
        except BackendError as error:
            found[name] = str(error)
    return found


def resolve(
    name: str | None = None,
    device: torch.device | str | None = None,
    stream: torch.cuda.Stream | None = None,
) -> Backend:
    """The backend of that name, or the best one that runs here, for weights on `device`.

    Args:
        name: `cpu`, `reference`, `cuda` or `triton`.
        device: where the weights are; by default what the backend is for.
        stream: what a device's backend launches on; by default the current stream at each call.

    Raises:
        BackendError: it is unknown, not built, or cannot run here. Never another one instead.
    """
    if device is None:
        device = "cuda" if name in _ON_DEVICE and torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if name is not None and name not in _NAMES:
        raise BackendError(f"unknown backend {name!r}; known are {', '.join(_NAMES)}")
    if name is None and device.type == "cuda":
        return _best_on_device(device, stream)
    if name is None and device.type != "cpu":
        raise BackendError(
            f"no backend for weights on {str(device)!r}; move the model to the CPU or a CUDA device"
        )
    name = name or "cpu"
    if name in _ON_DEVICE:
        opened: Backend = _module(name).open_backend(device, stream)
        return opened
    if device.type != "cpu":
        raise BackendError(
            f"backend {name!r} works in the CPU's memory, and the weights are on {str(device)!r}; "
            f"those for devices are {', '.join(_ON_DEVICE)}"
        )
    backend: Backend = _module(name).BACKEND
    return backend


def _best_on_device(device: torch.device, stream: torch.cuda.Stream | None) -> Backend:
    reasons = []
    for name in _ON_DEVICE:
        try:
            opened: Backend = _module(name).open_backend(device, stream)
            return opened
        except BackendError as error:
            reasons.append(str(error))
    raise BackendError(f"no backend for weights on {str(device)!r}: {'; '.join(reasons)}")


def _module(name: str) -> Any:
    file = {**_ON_CPU, **_ON_DEVICE}[name]
    try:
        return importlib.import_module(f"hotgraft.kernels.{file}")
    except ImportError as error:
        raise BackendError(f"backend {name!r} does not load: {error}") from error
