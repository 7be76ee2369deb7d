"""The backend `cuda` without a GPU: csrc/cuda imitated on the CPU, under its own bindings and face.

What a thread does is the kernels' own code, compiled for the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pybind11
import torch
from hotgraft.kernels.native_cuda import NativeCuda

ROOT = Path(__file__).resolve().parents[1]
NAME = "cuda_on_cpu"


def built(folder: str) -> Any:
    """The imitation, compiled in a folder and loaded from there."""
    # The tools of the test extra are next to this interpreter.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    options = {
        "CMAKE_BUILD_TYPE": "Debug",
        "HOTGRAFT_CUDA": "OFF",
        "HOTGRAFT_WERROR": "ON",
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
    }
    configure = ["cmake", "-S", str(ROOT), "-B", folder, "-G", "Ninja"]
    configure += [f"-D{key}={value}" for key, value in options.items()]
    for command in (configure, ["cmake", "--build", folder, "--target", NAME]):
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PATH": path}, check=False
        )
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    (file,) = Path(folder).glob(f"{NAME}.*")
    spec = importlib.util.spec_from_file_location(NAME, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda


@functools.cache
def imitated() -> NativeCuda:
    backend = NativeCuda(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        backend._kernels = built(folder)
    return backend
