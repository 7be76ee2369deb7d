"""The floor: `floor.c`, compiled into a temporary folder and loaded."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hotgraft import Graft

Call = Callable[[], None]
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-pthread")
SPINS = 20_000
"""Turns that a helper waits awake for the next job: some half a millisecond."""
EVICTION_BYTES = 256 << 20
"""What is streamed through to empty the caches: several times the largest L3 slice."""


def compiler() -> str:
    """The C compiler: `$CC`, or the first of gcc, cc and clang.

    Raises:
        FileNotFoundError: there is none.
    """
    wanted = os.environ.get("CC")
    for name in [wanted] if wanted else ["gcc", "cc", "clang"]:
        found = shutil.which(name)
        if found:
            return found
    raise FileNotFoundError("no C compiler (gcc, cc, clang); name one in $CC")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled floor, its helper threads started."""
    source = Path(__file__).with_name("floor.c")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "floor.so"
        subprocess.run([compiler(), *FLAGS, str(source), "-o", str(target)], check=True)
        lib = ctypes.CDLL(str(target))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    for name in ("floor_scatter", "floor_gather"):
        function = getattr(lib, name)
        function.argtypes = [pointer, size, pointer, pointer, size, ctypes.c_int]
        function.restype = None
    lib.floor_copy.argtypes = [pointer, pointer, size, ctypes.c_int]
    lib.floor_copy.restype = None
    lib.floor_evict.argtypes = [pointer, size, ctypes.c_int]
    lib.floor_evict.restype = None
    lib.floor_read.argtypes = [ctypes.c_char_p, pointer, ctypes.c_int]
    lib.floor_read.restype = size
    lib.floor_spin.argtypes = [size]
    lib.floor_spin.restype = None
    if lib.floor_start(threads() - 1) != 0:
        raise OSError("the floor's threads do not start")
    lib.floor_spin(0)
    return lib


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Table:
    """A graft's table for the floor: the graft's own arrays and the addresses of the parameters.

    Args:
        graft: of one dtype of two bytes.
        tensors: the contiguous tensors that it goes into.
    """

    def __init__(self, graft: Graft, tensors: dict[str, torch.Tensor]) -> None:
        (group,) = graft.groups.values()
        assert group.new.itemsize == 2
        self.new, self.old, self.n = group.new, group.old, len(group.new)
        self._positions = group.positions
        self._segments = np.array(
            [(tensors[row.name].data_ptr(), row.first, row.count) for row in graft.rows], np.int64
        )

    def scatter(self, values: npt.NDArray[Any], workers: int) -> Call:
        """What writes `values` into the cells, ready to be called."""
        return self._ready(library().floor_scatter, values, workers)

    def gather(self, values: npt.NDArray[Any], workers: int) -> Call:
        """What reads the cells into `values`, ready to be called."""
        return self._ready(library().floor_gather, values, workers)

    def _ready(self, function: Callable[..., None], values: npt.NDArray[Any], workers: int) -> Call:
        arguments = (
            self._segments.ctypes.data,
            len(self._segments),
            self._positions.ctypes.data,
            values.ctypes.data,
            self.n,
            workers,
        )
        alive = (self, values)  # native code sees addresses only

        def call(_alive: object = alive) -> None:
            function(*arguments)

        return call


def spin(ready: bool) -> None:
    """Whether helper threads wait awake for the next job, as they would in a loop of jobs."""
    library().floor_spin(SPINS if ready else 0)


@functools.cache
def _eviction_buffer() -> npt.NDArray[np.uint8]:
    return np.ones(EVICTION_BYTES, np.uint8)


def evict() -> None:
    """Empty the caches of all cores, as far as streaming through a large buffer does."""
    buffer = _eviction_buffer()
    library().floor_evict(buffer.ctypes.data, buffer.nbytes, threads())


def read_mapped(path: Path, workers: int) -> int:
    """Map a file anew and add up its words; returns its size in bytes."""
    total = ctypes.c_uint64()
    size: int = library().floor_read(os.fsencode(path), ctypes.byref(total), workers)
    if size < 0:
        raise OSError(f"cannot map {path.name}")
    return size


def copy(to: npt.NDArray[Any], source: npt.NDArray[Any], workers: int) -> None:
    """Copy one array into another of the same size."""
    library().floor_copy(to.ctypes.data, source.ctypes.data, source.nbytes, workers)
