"""The floor on a GPU: `floor.cu`, compiled by nvcc into a temporary folder and loaded."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

Call = Callable[[], None]
EACH = (1, 4, 8)
"""Entries of a thread: the kernel's variants."""
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static")


def compiler() -> str:
    """nvcc: `$NVCC`, the one on the PATH, or the toolkit's.

    Raises:
        FileNotFoundError: there is none.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for name in (os.environ.get("NVCC"), "nvcc", f"{home}/bin/nvcc"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise FileNotFoundError("no nvcc to compile the floor's kernels; name one in $NVCC")


def build(target: Path, capability: tuple[int, int]) -> None:
    """Compile the kernels for a device into a shared library.

    Raises:
        OSError: nvcc is missing or fails.
    """
    source = Path(__file__).with_name("floor.cu")
    architecture = f"-arch=sm_{capability[0]}{capability[1]}"
    command = [compiler(), *FLAGS, architecture, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"nvcc does not compile the floor: {(done.stderr or done.stdout).strip()}")


class Floor:
    """The raw kernels, for one kind of device.

    Args:
        capability: the device's compute capability.

    Raises:
        OSError: nvcc is missing or fails, or what it makes does not load.
    """

    def __init__(self, capability: tuple[int, int]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "floor.so"
            build(target, capability)
            library = ctypes.CDLL(str(target))
        self._scatter = library.floor_scatter
        pointer = ctypes.c_void_p
        self._scatter.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_int, pointer]
        self._scatter.restype = ctypes.c_int

    def scatter(self, addresses: torch.Tensor, values: torch.Tensor, each: int) -> Call:
        """What enqueues a scatter on the current stream, ready to be called.

        Args:
            addresses: int64[n] on the device.
            values: n two-byte items on the device.
            each: entries of a thread.
        """
        assert len(addresses) == len(values)
        assert values.element_size() == 2

        def call() -> None:
            stream = torch.cuda.current_stream(addresses.device).cuda_stream
            code = self._scatter(
                addresses.data_ptr(), values.data_ptr(), len(addresses), each, stream
            )
            if code:
                raise RuntimeError(f"the floor's kernel did not launch: CUDA error {code}")

        return call
