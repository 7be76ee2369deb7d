"""The cases, a file each with a function `run`. They are imported only when they are run."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from bench.session import Session

CASES = {
    "switch": "activate, switch and deactivate, beside torch and the floor",
    "verbs": "gather, scatter and compare by themselves",
    "scale": "one patch size on models of three sizes",
    "peft": "merging adapters instead",
    "overhead": "Python's share of an activation",
    "memory": "what a loaded skill takes",
    "diff": "the exact difference of two checkpoint files",
    "topk": "the largest differences",
    "load": "reading and preparing a graft; importing hotgraft",
    "merge": "composing grafts; verifying a host",
}

ON_GPU = {
    "gpu_switch": "activate, switch and deactivate on a 7 B model, beside torch and the floor",
    "gpu_load": "from a file to live; merging resident skills",
    "gpu_density": "the scatter by density, to where a dense copy is faster",
    "gpu_scale": "one patch size on models of three sizes",
}
"""Those that need a CUDA device: without one they leave a row that says so."""


def named(name: str) -> Callable[[Session], None]:
    """The function that runs a case."""
    run: Callable[[Session], None] = importlib.import_module(f"bench.cases.{name}").run
    return run
