"""The GPU, its driver, and what was built for it."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import torch
from hotgraft import _native

from bench import environment
from bench.rows import GPU_MARK


def describe(quick: bool) -> dict[str, Any]:
    """The machine, as for other cases, and its first GPU."""
    found = environment.describe(quick)
    found["packages"]["triton"] = environment._version("triton")
    found["gpu"] = gpu() if torch.cuda.is_available() else None
    found["kernels"] = {
        "cuda": getattr(_native, "CUDA", None),
        "architectures": getattr(getattr(_native, "cuda", None), "ARCHITECTURES", None),
    }
    return found


def gpu() -> dict[str, Any]:
    """What the device says of itself."""
    about = torch.cuda.get_device_properties(0)
    return {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory_gib": round(about.total_memory / 2**30, 1),
        "l2_mib": round(about.L2_cache_size / 2**20, 1),
        "multiprocessors": about.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def file_name() -> str:
    """The name of the file for today's rows of this GPU."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{environment.today()}{GPU_MARK}{slug}.jsonl"


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    done = subprocess.run(
        [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
