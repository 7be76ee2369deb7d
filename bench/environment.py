"""Where the measurements were made. No host names and no paths."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from hotgraft import _native

from bench import floor

PACKAGES = ("hotgraft", "torch", "numpy", "safetensors", "peft")
_ROOT = Path(__file__).resolve().parents[1]


def describe(quick: bool) -> dict[str, Any]:
    """The machine, its load, and what was built and installed."""
    return {
        "date": today(),
        "quick": quick,
        "cpu": cpu_model(),
        "cores": floor.threads(),
        "caches": _caches(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "kernel": platform.release(),
        "transparent_hugepages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "compiler": {"hotgraft": _native.COMPILER, "floor": _first_line(floor.compiler())},
        "floor_flags": list(floor.FLAGS),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "threads": {"hotgraft": _native.max_workers(), "torch": torch.get_num_threads()},
        "load_average": round(os.getloadavg()[0], 2),
    }


def today() -> str:
    """The date, in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def cpu_model() -> str:
    """What the processor calls itself."""
    found = re.search(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.M)
    return " ".join(found[1].split()) if found else platform.machine()


def file_name() -> str:
    """The name of the file for today's rows of this machine."""
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    return f"{today()}-{slug}-{floor.threads()}c.jsonl"


def isa() -> str:
    """The instruction set that hotgraft's streaming loops choose here."""
    from hotgraft.kernels.native_cpu import INSTRUCTION_SETS

    runs = [name for i, name in enumerate(INSTRUCTION_SETS) if i and _native.isa_runs_here(i)]
    return runs[-1]


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(str(index / part)).strip() for part in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _chosen(path: str) -> str:
    found = re.search(r"\[(\w+)\]", _text(path))
    return found[1] if found else "unknown"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _first_line(compiler: str) -> str:
    output = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return output.stdout.splitlines()[0]


def _commit() -> str | None:
    """The commit, marked where the engine's sources differ from it; None outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*"],
            cwd=_ROOT, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "csrc", "python", "bench/*.[pc]*"],
            cwd=_ROOT, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HOTGRAFT_COMMIT")  # what was copied here without its repository
    return found + (" and changes" if changed else "")
