"""Compiles every Triton kernel for GPUs that are not here, and tells what became of it as JSON.

    python tests/triton_targets.py

Triton brings the assembler, so no GPU, driver or CUDA is needed. Run as a program of its own: under
TRITON_INTERPRET=1, as most tests run, there is nothing that could be compiled.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from hotgraft.format import DTYPES
from hotgraft.kernels import POLICIES
from hotgraft.triton_kernels import merge, move, select
from hotgraft.triton_kernels.table import LAUNCH
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
A100, H100 = GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32)
B200 = GPUTarget("cuda", 100, 32)
MI300 = GPUTarget("hip", "gfx942", 64)
RANKED = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "I8", "U32", "U64")
"""Each way to decode an element."""
NUMBERS = {
    "n": "i32",
    "other_n": "i32",
    "k": "i32",
    "steps": "i32",
    "shift": "i32",
    "lowest": "i64",
    "prefix": "i64",
}
POINTERS = {
    "tiles": "*i32",
    "other_tiles": "*i32",
    "positions": "*i32",
    "other_positions": "*i32",
    "weights": "*fp64",
    "flags": "*i8",
    "owns": "*i8",
}
ITEMS = {"values", "other_values", "base", "finetuned", "new", "old"}
"""Pointers to items; those that are named nowhere here point at int64."""


class Build(NamedTuple):
    """A kernel, and what is fixed when it is compiled."""

    kernel: Any
    item_size: int
    launch: dict[str, Any]
    label: str
    target: GPUTarget

    def source(self) -> ASTSource:
        options = ("num_warps", "enable_fp_fusion")
        constants = {name: v for name, v in self.launch.items() if name not in options}
        signature, attributes = {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif name in NUMBERS:
                signature[name] = NUMBERS[name]
            else:
                item = f"*i{8 * self.item_size}"
                signature[name] = item if name in ITEMS else POINTERS.get(name, "*i64")
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes)


def builds() -> Iterator[Build]:
    """Moves of every item size, scores of every kind, merges under every policy."""
    moves = (move.gather_kernel, move.scatter_kernel, move.compare_kernel)
    for target, sizes in ((H100, (1, 2, 4, 8)), (A100, (2, 4)), (B200, (2,)), (MI300, (2,))):
        for size in sizes:
            for kernel in moves:
                yield Build(kernel, size, LAUNCH, f"{8 * size}-bit", target)
    for name in RANKED:
        dtype = DTYPES[name]
        ranked = LAUNCH | {"TYPE": dtype.code}
        for target in (H100, MI300)[: 1 + (name == "BF16")]:
            flagged = ranked | {"RANKED": True}
            yield Build(select.flag_kernel, dtype.item_size, flagged, name, target)
            yield Build(select.count_kernel, dtype.item_size, ranked, name, target)
            yield Build(select.score_kernel, dtype.item_size, ranked, name, target)
    cases = [("BF16", policy, H100) for policy in POLICIES]
    cases += [(name, "sign", H100) for name in ("F16", "F32", "F64")]
    cases += [("I8", "refuse", H100), ("BF16", "refuse", MI300)]
    for name, policy, target in cases:
        dtype = DTYPES[name]
        merged = merge.LAUNCH | {
            "TYPE": dtype.code,
            "ARITHMETIC": dtype.has_arithmetic,
            "POLICY": POLICIES.index(policy),
        }
        label = f"{name} {policy}"
        if policy in ("refuse", "sum"):
            yield Build(merge.own_kernel, dtype.item_size, merged, label, target)
        yield Build(merge.resolve_kernel, dtype.item_size, merged, label, target)


def report(build: Build) -> dict[str, Any]:
    """What was compiled; for NVIDIA also its instructions, each kind once, and what it takes."""
    compiled = triton.compile(
        build.source(),
        target=build.target,
        options={name: build.launch[name] for name in ("num_warps", "enable_fp_fusion")},
    )
    said: dict[str, Any] = {
        "kernel": build.kernel.__name__,
        "label": build.label,
        "arch": str(build.target.arch),
        "binary": len(compiled.asm["hsaco" if build.target == MI300 else "cubin"]),
    }
    if build.target != MI300:
        ptx: str = compiled.asm["ptx"]
        said["memory"] = sorted(set(re.findall(r"\b(?:ld|st|atom|red)\.\w+[.\w]*", ptx)))
        said["arithmetic"] = sorted(
            set(re.findall(r"\b(?:fma|mad|div|add|sub|mul|cvt)[.\w]*\.f(?:32|64)\b", ptx))
        )
        said |= resources(compiled.asm["cubin"])
    return said


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-res-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
    used = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", shown.stdout + shown.stderr)
    return {name: int(count) for name, count in used}


BUILDS = list(builds())


def report_number(i: int) -> dict[str, Any]:
    """A build by its number, for kernels cannot be sent to another process."""
    return report(BUILDS[i])


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(2) as pool:
        json.dump(pool.map(report_number, range(len(BUILDS)), chunksize=1), sys.stdout)
