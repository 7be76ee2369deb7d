"""Checkpoint files to be compared, and one comparison as a child process that is watched.

`python -m bench.checkpoints BASE FINETUNED DENSITY` is the child; density 0: the exact
difference.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hotgraft
import numpy as np
import torch
from hotgraft import Graft, _native
from hotgraft.graft import Entries
from safetensors import safe_open
from safetensors.torch import save_file

from bench import memory, shapes

READERS = ("Difference", "count_scores", "collect")
"""The native calls that read both models through."""


def write_base(path: Path, shape: shapes.Shape) -> dict[str, torch.Tensor]:
    """Random weights, written to a file."""
    state = shapes.weights(shape)
    save_file(state, path)
    return state


def write_changed(path: Path, state: dict[str, torch.Tensor], density: float) -> Graft:
    """The same weights with the lowest bit flipped at random positions; the graft that does it."""
    rng = np.random.default_rng(3)
    entries = {}
    for name, tensor in state.items():
        flat = tensor.view(-1)
        count = int(density * len(flat)) + 1
        indices = torch.from_numpy(shapes.positions(rng, len(flat), count))
        old = flat[indices]
        entries[name] = Entries(
            indices, (old.view(torch.int16) ^ 1).view(flat.dtype), old, tuple(tensor.shape)
        )
        flat[indices] = entries[name].new
    save_file(state, path)
    for name, part in entries.items():
        state[name].view(-1)[part.indices] = part.old
    return Graft.from_entries(entries)


def noisy(state: dict[str, torch.Tensor], scale: float = 1e-3) -> dict[str, torch.Tensor]:
    """The weights plus noise everywhere, as training leaves them."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1_048_573, generator=generator) * scale
    found = {}
    for name, tensor in state.items():
        flat = tensor.view(-1)
        moved = torch.empty_like(flat)
        for begin in range(0, len(flat), len(noise)):
            part = flat[begin : begin + len(noise)]
            moved[begin : begin + len(part)] = part.float() + noise[: len(part)]
        found[name] = moved.view(tensor.shape)
    return found


def mapped_pairs(base: Path, finetuned: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of two files, mapped, by name."""
    with safe_open(base, "pt") as left, safe_open(finetuned, "pt") as right:
        for name in sorted(left.keys()):
            yield left.get_tensor(name), right.get_tensor(name)


def watch_diff(base: Path, finetuned: Path, density: float = 0) -> dict[str, Any]:
    """Compare two files in a child: growth of anonymous memory, size of the result, reads."""
    return memory.watch_child("bench.checkpoints", str(base), str(finetuned), str(density))


def _count_reads() -> list[int]:
    """Make the native readers note how many elements they were given."""
    seen: list[int] = []

    def counting(reader: Callable[..., Any]) -> Callable[..., Any]:
        # (a, b, n, ...) for `difference`, (type, a, b, n, ...) for the others.
        at = 2 if reader.__name__ == "difference" else 3

        @functools.wraps(reader)
        def call(*arguments: Any) -> Any:
            seen.append(arguments[at])
            return reader(*arguments)

        return call

    for name in READERS:
        setattr(_native, name, counting(getattr(_native, name)))
    return seen


def _child(base: str, finetuned: str, density: float, seen: list[int]) -> dict[str, Any]:
    graft = hotgraft.diff(base, finetuned, density=density or None)
    return {
        "result_bytes": graft.nbytes,
        "entries": graft.nnz,
        "reads": sum(seen) / graft.provenance.eligible,
    }


if __name__ == "__main__":
    files, wanted = sys.argv[1:3], float(sys.argv[3])
    counted = _count_reads()
    memory.serve(lambda: _child(files[0], files[1], wanted, counted))
