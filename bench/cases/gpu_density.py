"""The scatter's time by density on Llama 2's 7 B shape on a GPU, to where a dense copy is faster.

By the backends' verbs, without a host: a patch of every tenth weight is made on the device.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from hotgraft.kernels.device import DeviceBackend

from bench import shapes
from bench.gpu import report, work
from bench.gpu import ways as how
from bench.gpu.lab import Lab
from bench.gpu.ways import Way
from bench.gpu.work import Judge, Patch
from bench.rows import Row
from bench.session import Session, make_rows
from bench.timing import Contender

CASE = "gpu_density"
DENSITIES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
ROUNDS = {True: 20, False: 8}
"""At densities up to a thousandth, and above."""


def run(session: Session) -> None:
    """The case."""
    measure(session, Lab())


def measure(session: Session, lab: Lab) -> None:
    """The case, on a device."""
    findings = report.opened(session, CASE, lab)
    if findings is None:
        return
    shape = shapes.SHAPES[session.pick("7B", "tiny")]
    tensors = work.weights(shape, lab.device)
    judge = Judge(tensors)
    backends = {}
    for name, reason in lab.backends.items():
        if reason is None:
            backends[name] = lab.backend(name)
        else:
            findings.missing(how.ACTIVATE, f"hotgraft, {name}", reason)
    every: list[Row] = []
    for density in session.pick(DENSITIES, (1e-3, 1e-2)):
        patch = Patch.random(tensors, density, seed=1)
        ways = [scatter_way(backend, patch) for backend in backends.values()]
        ways += findings.floor_ways(functools.partial(how.floor_ways, a=patch))
        ways += [how.index_copy_way(patch), how.dense_way(patch, session.pick(2, 1))]
        ways = findings.checked(ways, how.expected(judge, patch))
        for caches in ("warm", "cold"):
            rounds = session.pick(ROUNDS[density <= 1e-3], 2)
            report.sample(lab, ways, rounds, "device", caches, judge)
            parameters = {**report.sizes(shape, patch), "density": density}
            found = make_rows(
                CASE, ways, {**parameters, "caches": caches, "clock": "device"},
                functools.partial(_bytes, 2 * patch.touched_bytes, patch.moved_bytes),
            )  # fmt: skip
            findings.add(found)
            every += found
        del ways, patch
        lab.release()
    for name in backends:
        findings.add([crossover(every, f"hotgraft, {name}")])
    findings.conclude()


def _bytes(dense: int, sparse: int, way: Contender, _step: str) -> int:
    return dense if way.name == how.DENSE else sparse


def scatter_way(backend: DeviceBackend, patch: Patch) -> Way:
    """The backend's scatter through a table that is assembled on the device."""
    counts = np.array([len(part.indices) for part in patch.parts], np.int64)
    bases = np.array([part.flat.data_ptr() for part in patch.parts], np.int64)
    segments = np.stack([bases, np.cumsum(counts) - counts, counts], 1)
    positions = torch.cat([part.indices.to(torch.int32) for part in patch.parts])
    table = backend.assemble(segments, positions, 2)
    new, old = (patch.values(old).view(torch.uint8) for old in (False, True))
    return Way(
        f"hotgraft, {backend.name}",
        f"{backend.name}, scatter alone",
        {
            how.ACTIVATE: lambda: backend.scatter(table, new),
            how.DEACTIVATE: lambda: backend.scatter(table, old),
        },
    )


def crossover(rows: Sequence[Row], variant: str) -> Row:
    """The density at which a dense copy takes as long, between the two measured next to it."""
    times: dict[str, dict[float, float]] = {variant: {}, how.DENSE: {}}
    for row in rows:
        p = row.parameters
        if row.variant in times and row.operation == how.ACTIVATE and p["caches"] == "cold":
            times[row.variant][p["density"]] = row.median
    gaps = [
        (math.log(d), math.log(times[variant][d] / times[how.DENSE][d]))
        for d in sorted(times[variant])
        if d in times[how.DENSE]
    ]
    result = Row(CASE, "crossover", variant, "interpolated", {"caches": "cold"}, [], unit="density")
    for (left, below), (right, above) in itertools.pairwise(gaps):
        if below < 0 <= above:
            at = left - below * (right - left) / (above - below)
            result.samples = [float(f"{math.exp(at):.3g}")]
    if not result.samples:
        result.note = (
            f"none between {min(times[variant]):g} and {max(times[variant]):g}"
            if gaps
            else "not measured"
        )
    return result
