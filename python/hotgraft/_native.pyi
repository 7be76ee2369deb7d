from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

COUNTS_WIDTH: int
COMPILER: str
CUDA: str | None

class Table:
    def __init__(
        self, segments: npt.NDArray[np.int64], positions: npt.NDArray[np.int32], item_size: int
    ) -> None: ...
    @property
    def n_entries(self) -> int: ...
    @property
    def n_segments(self) -> int: ...
    @property
    def item_size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class Difference:
    def __init__(
        self, a: int, b: int, n: int, item_size: int, workers: int = 0, isa: int = 0
    ) -> None: ...
    @property
    def count(self) -> int: ...
    def write(
        self,
        positions: npt.NDArray[np.int32],
        new: npt.NDArray[Any],
        old: npt.NDArray[Any],
        workers: int = 0,
    ) -> None: ...

def gather(table: Table, values: npt.NDArray[Any], workers: int = 0) -> None: ...
def scatter(table: Table, values: npt.NDArray[Any], workers: int = 0) -> None: ...
def compare(table: Table, values: npt.NDArray[Any], workers: int = 0) -> tuple[int, int]: ...
def prefetch(table: Table, values: npt.NDArray[Any], workers: int = 0) -> None: ...
def count_scores(
    type: int,
    a: int,
    b: int,
    n: int,
    shift: int,
    prefix: int,
    k: int,
    counts: npt.NDArray[np.int64],
    isa: int = 0,
) -> int: ...
def collect(
    type: int, a: int, b: int, n: int, lowest: int, ties: int, workers: int = 0, isa: int = 0
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]: ...
def merge(
    sources: Sequence[tuple[Any, ...]],
    ranges: npt.NDArray[np.int64],
    type: int,
    policy: int,
    order: npt.NDArray[np.int64],
    workers: int = 0,
) -> tuple[Any, ...]: ...
def round(
    from_type: int, values: npt.NDArray[Any], to_type: int
) -> tuple[npt.NDArray[Any], int]: ...
def first_replaced(
    owners: tuple[dict[str, Any], ...], keys: tuple[str, ...], objects: tuple[Any, ...]
) -> int: ...
def first_moved(tensors: tuple[Any, ...], addresses: npt.NDArray[np.int64]) -> int: ...
def first_written(
    tensors: tuple[Any, ...], expected: npt.NDArray[np.int64], cells: npt.NDArray[np.int64]
) -> int: ...
def count_writes(expected: npt.NDArray[np.int64], cells: npt.NDArray[np.int64]) -> None: ...
def versions(tensors: tuple[Any, ...]) -> npt.NDArray[np.int64]: ...
def prefetch_objects(
    owners: tuple[dict[str, Any], ...], tensors: tuple[Any, ...], bodies: npt.NDArray[np.int64]
) -> None: ...
def max_workers() -> int: ...
def isa_runs_here(isa: int) -> bool: ...

class _Cuda(Protocol):
    """The submodule `_native.cuda`. Whole numbers named after memory are addresses there."""

    ARCHITECTURES: str | None

    def gather(
        self, table: tuple[int, int, int, int], item_size: int, values: int, stream: int
    ) -> None: ...
    def scatter(
        self,
        moves: Sequence[tuple[tuple[int, int, int, int], int]],
        item_size: int,
        stream: int,
    ) -> None: ...
    def compare(
        self,
        table: tuple[int, int, int, int],
        item_size: int,
        values: int,
        report: int,
        stream: int,
    ) -> None: ...
    def load_moves(self) -> None: ...
    def scratch_size(self, n: int) -> int: ...
    def mark_differing(
        self, a: int, b: int, n: int, item_size: int, scratch: int, stream: int
    ) -> None: ...
    def write_positions(self, scratch: int, n: int, positions: int, stream: int) -> None: ...
    def count_scores(
        self,
        type: int,
        a: int,
        b: int,
        n: int,
        shift: int,
        prefix: int,
        bins: int,
        lowest_nan: int,
        stream: int,
    ) -> None: ...
    def mark_reaching(
        self,
        type: int,
        a: int,
        b: int,
        n: int,
        lowest: int,
        ties: int,
        scratch: int,
        more_scratch: int,
        stream: int,
    ) -> None: ...
    def write_scores(
        self,
        type: int,
        a: int,
        b: int,
        n: int,
        scratch: int,
        positions: int,
        keys: int,
        stream: int,
    ) -> None: ...
    def merge(
        self,
        spans: int,
        inputs: int,
        rows: int,
        k: int,
        n: int,
        type: int,
        policy: int,
        scratch: int,
        row_counts: int,
        counts: int,
        positions: int,
        new: int,
        old: int,
        stream: int,
    ) -> None: ...
    def status(self) -> tuple[int, str, str, int, int, int]: ...

cuda: _Cuda
