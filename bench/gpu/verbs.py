"""Every verb of a device's backends once, on small inputs, against the reference.

`python -m bench.gpu.verbs BACKEND` is what `compute-sanitizer` watches: sizes are such that every
branch of the kernels is taken, and each array should be an allocation of its own
(`PYTORCH_NO_CUDA_MEMORY_CACHING=1`).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from hotgraft import kernels
from hotgraft.format import DTYPES, Bits, Group
from hotgraft.kernels import POLICIES, Pair, Source
from hotgraft.kernels.device import TILE, DeviceBackend
from hotgraft.kernels.reference import BACKEND as REFERENCE

COUNTS = (1, 3, TILE, 5, 2 * TILE + 7)
"""Entries of each segment: tiles that hold several segments, and segments of several tiles."""
GAP = 3
SOURCES = 5


def check(backend: DeviceBackend) -> list[str]:
    """Run all verbs; returns what differs from the reference."""
    wrong = []
    for size in (1, 2, 4, 8):
        wrong += [f"{verb}, {size} bytes" for verb in _moves(backend, size)]
    for name in ("BF16", "F16", "F32", "F64"):
        wrong += [f"{verb}, {name}" for verb in _selects(backend, name)]
        wrong += [f"merge {policy}, {name}" for policy in _merges(backend, name)]
    return wrong


def _moves(backend: DeviceBackend, size: int) -> list[str]:
    rng = np.random.default_rng(size)
    n = sum(COUNTS)
    positions = np.concatenate([GAP * np.arange(count) for count in COUNTS]).astype(np.int32)
    before = rng.integers(0, 256, GAP * n * size, dtype=np.uint8)
    memory = torch.from_numpy(before).to(backend.device, copy=True)
    firsts = np.cumsum([0, *COUNTS[:-1]])
    bases = memory.data_ptr() + GAP * size * firsts
    segments = np.stack([bases, firsts, np.array(COUNTS)], 1).astype(np.int64)
    table = backend.table(segments, positions, size)
    cells = before.view(f"u{size}")[::GAP]
    wanted = rng.integers(0, 1 << 8 * size, n, dtype=f"u{size}")
    after = before.copy()
    after.view(f"u{size}")[::GAP] = wanted
    wrong = []

    held = backend.values(np.zeros_like(wanted))
    backend.gather(table, held)
    if not np.array_equal(backend.read(held, wanted.dtype), cells):
        wrong.append("gather")
    values = backend.values(wanted)
    differing = np.flatnonzero(cells != wanted)
    if backend.compare(table, values) != (len(differing), int(differing[0])):
        wrong.append("compare")
    backend.scatter(table, values)
    if memory.cpu().numpy().tobytes() != after.tobytes():
        wrong.append("scatter")
    half = COUNTS[0] + COUNTS[1]
    parts = [
        (np.array([[*s[:1], s[1] - first, s[2]] for s in rows.tolist()], np.int64), share)
        for rows, share, first in (
            (segments[:2], slice(0, half), 0),
            (segments[2:], slice(half, n), half),
        )
    ]
    moves = [
        (backend.table(rows, positions[share], size), backend.values(cells[share]))
        for rows, share in parts
    ]
    backend.exchange(*moves)  # type: ignore[arg-type]
    if memory.cpu().numpy().tobytes() != before.tobytes():
        wrong.append("exchange")
    return wrong


def _pairs(name: str, device: torch.device) -> list[Pair]:
    dtype = DTYPES[name]
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for n in (1, 5, 20_011):  # the last one is several tiles of ranks
        base = torch.randn(n, generator=generator).to(dtype.torch)
        tuned = base.clone()
        tuned[::3] += torch.randn(len(tuned[::3]), generator=generator).to(dtype.torch)
        pairs.append(Pair(base.to(device), tuned.to(device), dtype))
    return pairs


def _selects(backend: DeviceBackend, name: str) -> list[str]:
    there, here = _pairs(name, backend.device), _pairs(name, torch.device("cpu"))
    wrong = []
    for k in (None, 7, 400):
        mine, judged = backend.select(there, k), REFERENCE.select(here, k)
        if not all(map(np.array_equal, mine, judged)):
            wrong.append(f"select {k}")
    for one, other in zip(there, here, strict=True):
        found, wanted = _difference(backend, one), _difference(REFERENCE, other)
        if not all(map(np.array_equal, found, wanted)):
            wrong.append("difference")
    return wrong


def _difference(backend: Any, pair: Pair) -> Group:
    made: list[Group] = []

    def room(n: int) -> Group:
        made.append(Group(np.empty(n, np.int32), *(np.empty(n, pair.dtype.bits) for _ in range(2))))
        return made[-1]

    backend.difference(pair, room)
    return made[-1]


def _merges(backend: DeviceBackend, name: str) -> list[str]:
    dtype = DTYPES[name]
    rng = np.random.default_rng(3)
    rows, cells = 4, 2500
    base = _bits(rng.standard_normal(rows * cells), name)
    sources, ranges = [], np.zeros((rows, SOURCES, 2), np.int64)
    for k in range(SOURCES):
        columns: list[list[Bits]] = [[], [], []]
        for row in range(rows):
            at = np.flatnonzero(rng.random(cells) < (0.0 if row == k else 0.4)).astype(np.int32)
            ranges[row, k] = sum(map(len, columns[0])), len(at)
            new = _bits(rng.standard_normal(len(at)), name)
            for column, part in zip(columns, (at, new, base[row * cells + at]), strict=True):
                column.append(part)
        positions, new, old = (np.concatenate(column) for column in columns)
        sources.append(Source(positions.astype(np.int32), new, old, 1.0 if k else 0.5))
    wrong = []
    for policy in POLICIES:
        mine, judged = (
            b.merge(sources, ranges, dtype, policy, range(SOURCES)[::-1])
            for b in (backend, REFERENCE)
        )
        refused = policy == "refuse" and bool(judged.conflicts.any())
        fields = ("conflicts",) if refused else judged._fields
        if not all(np.array_equal(getattr(mine, f), getattr(judged, f)) for f in fields):
            wrong.append(policy)
    return wrong


def _bits(values: Any, name: str) -> Bits:
    tensor = torch.from_numpy(np.asarray(values)).to(DTYPES[name].torch)
    return tensor.view(
        {2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[tensor.element_size()]
    ).numpy()


def main(name: str) -> int:
    """Check one backend; the exit status."""
    backend = kernels.resolve(name)
    assert isinstance(backend, DeviceBackend)
    wrong = check(backend)
    print(f"{name}: {'; '.join(wrong) or 'every verb agrees with the reference'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
