"""Build hotgraft from this checkout into a folder, without network: `python build.py FOLDER`.

By pip and scikit-build-core where those are, or else by CMake alone. Imports nothing of hotgraft.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def definitions() -> list[str]:
    """What CMake is told: with nvcc, a build without the CUDA kernels is no success."""
    cuda = "ON" if shutil.which("nvcc") else "AUTO"
    print(f"nvcc: {shutil.which('nvcc') or 'not found, so no CUDA kernels'}", flush=True)
    return [f"HOTGRAFT_CUDA={cuda}", *os.environ.get("HOTGRAFT_DEFINITIONS", "").split()]


def by_pip(target: Path) -> None:
    """`pip install --target`, nothing downloaded."""
    run(
        sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index",
        "--no-compile", "--disable-pip-version-check", "--target", str(target),
        *(f"-Ccmake.define.{one}" for one in definitions()), str(ROOT),
    )  # fmt: skip


def by_cmake(target: Path) -> None:
    """What scikit-build-core would do: the extension, the packages, and the name and version."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    with tempfile.TemporaryDirectory() as folder:
        run(
            "cmake", "-S", str(ROOT), "-B", folder, "-DCMAKE_BUILD_TYPE=Release",
            *(["-G", "Ninja"] if shutil.which("ninja") else []),
            f"-DCMAKE_INSTALL_PREFIX={target}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_folder()}", *(f"-D{one}" for one in definitions()),
        )  # fmt: skip
        run("cmake", "--build", folder, "--parallel", str(os.cpu_count()))
        run("cmake", "--install", folder)
    for installed, source in settings["tool"]["scikit-build"]["wheel"]["packages"].items():
        shutil.copytree(
            ROOT / source, target / installed, dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )  # fmt: skip
    name, version = (settings["project"][key] for key in ("name", "version"))
    about = target / f"{name}-{version}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def pybind11_folder() -> str:
    """Where pybind11's CMake files are."""
    import pybind11

    found: str = pybind11.get_cmake_dir()
    return found


def run(*command: str) -> None:
    """Run a command; the first that fails ends the build."""
    print("+", *command, flush=True)
    subprocess.run(command, check=True)


def main(target: Path) -> None:
    """Build, and say how."""
    print(f"Python {sys.version.split()[0]}, {sysconfig.get_platform()}", flush=True)
    missing = [
        name
        for name in ("pip", "scikit_build_core", "pybind11")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        print(f"not by pip, for {', '.join(missing)} cannot be imported: by CMake", flush=True)
        by_cmake(target)
    else:
        by_pip(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
