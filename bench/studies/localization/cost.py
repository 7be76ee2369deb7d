"""Memory and time of `learned`, beside fine-tuning and the paper's dense way.

Each arm runs in a process of its own, which holds the base before its memory is watched:

- `passes`: forward and backward alone, each tensor's gradient freed at once: what activations take.
- `learned`: `hotgraft.localize`, its fine-tuned weights in a file.
- `finetune`: SGD with momentum, as the study fine-tunes.
- `dense`: the relaxation of Panigrahi et al. as their protocol has it: the base, the fine-tuned and
  a working model in memory, a score for every weight, gradients summed over a pass.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import hotgraft
import torch
from hotgraft import train
from hotgraft.batches import endless
from hotgraft.search import Learned
from safetensors.torch import load_file
from torch import nn

from bench import memory
from bench.studies.localization import grid
from bench.studies.localization.lab import SCOPE, Lab

ARMS = ("passes", "finetune", "learned", "dense")
DENSITY = 1e-3
PER_STEP = 10
"""Batches of a step of the dense way. The paper has 128: a batch costs the same."""


def measure(work: Path, cell: grid.Cell, steps: int) -> list[dict[str, Any]]:
    """A row an arm: seconds a batch, and the growth of anonymous memory at its peak.

    Args:
        work: a folder of `Lab`'s; the cell is fine-tuned there if it is not yet.
        steps: batches that every arm reads.
    """
    lab = Lab(work, grid.Recipe())
    lab.finetuned(cell)
    base = sum(p.nbytes for p in lab.model.parameters())
    rows = []
    for arm in ARMS:
        arguments = (str(work), *map(str, cell), str(steps), arm)
        found = memory.watch_child("bench.studies.localization.cost", *arguments)
        rows.append(
            {
                "method": "cost",
                "arm": arm,
                "batch_seconds": found["seconds"] / steps,
                "growth": found["growth"],
                "base_nbytes": base,
                "steps": steps,
                "texts": lab.recipe.batch,
                "threads": torch.get_num_threads(),
            }
        )
    for row in rows:
        row["beyond_passes"] = row["growth"] - rows[0]["growth"]
    return rows


def _serve(work: Path, cell: grid.Cell, steps: int, arm: str) -> None:
    lab = Lab(work, grid.Recipe())
    path, _ = lab.finetuned(cell)
    readout = lab.readout(cell.task)
    every = lab.batches(cell.task, steps, cell.seed)

    def passes(data: list[Any]) -> None:
        names = {name for name, _ in lab.model.named_parameters() if name.startswith("encoder.")}
        handles = []
        for name, p in lab.model.named_parameters():
            p.requires_grad_(name in names)
            if name in names:
                handles.append(p.register_post_accumulate_grad_hook(_free))
        for batch in data:
            readout.loss(lab.model, batch).backward()
        for handle in handles:
            handle.remove()
        lab.model.requires_grad_(True)

    def finetune(data: list[Any]) -> None:
        optimizer = train.sgd(lab.model, scope=SCOPE)
        train.finetune(lab.model, readout.loss, data, optimizer, steps=len(data))

    def learned(data: list[Any]) -> None:
        method = Learned(steps=len(data))
        hotgraft.localize(
            lab.model, path, readout.loss, data, density=DENSITY, scope=SCOPE, method=method
        )

    def dense(data: list[Any]) -> None:
        relax(lab.model, load_file(path), readout.loss, data)

    arms: dict[str, Callable[[list[Any]], None]] = {
        "passes": passes, "finetune": finetune, "learned": learned, "dense": dense
    }  # fmt: skip

    def work_once() -> dict[str, Any]:
        arms[arm](every)
        return {}

    # What libraries keep from their first use is not the arm's.
    with lab.holding({}):
        arms[arm](every[:PER_STEP])

    memory.serve(work_once)


def _free(parameter: torch.Tensor) -> None:
    parameter.grad = None


def relax(
    base: nn.Module,
    finetuned: dict[str, torch.Tensor],
    loss: Callable[..., torch.Tensor],
    data: list[Any],
    *,
    per_step: int = PER_STEP,
    rate: float = 1e7,
    bias: float = 10.0,
) -> dict[str, torch.Tensor]:
    """The paper's search in plain torch; gives back the gates."""
    tuned = copy.deepcopy(base)
    tuned.load_state_dict(finetuned, strict=False)
    model = copy.deepcopy(base)
    before = {n: p for n, p in base.named_parameters() if n.startswith("encoder.")}
    after = dict(tuned.named_parameters())
    live = {n: p for n, p in model.named_parameters() if n in before}
    for name, p in model.named_parameters():
        p.requires_grad_(name in before)
    changes = torch.cat([(after[n] - before[n]).detach().abs().view(-1) for n in before])
    k = int(DENSITY * len(changes))
    bound = changes.topk(k).values[-1]
    masks = {n: ((after[n] - before[n]).detach().abs() >= bound).float() for n in before}
    scores = {n: torch.rand_like(before[n]) for n in before}

    def gates(name: str) -> torch.Tensor:
        return masks[name] + (1 - 2 * masks[name]) * torch.sigmoid(scores[name] - bias)

    batches = endless(data, len(data))
    for _ in range(len(data) // per_step):
        with torch.no_grad():
            for name, p in live.items():
                p.copy_(torch.lerp(before[name], after[name], gates(name)))
        for batch in islice(batches, per_step):
            loss(model, batch).backward()
        with torch.no_grad():
            for name, p in live.items():
                assert p.grad is not None
                open_ = torch.sigmoid(scores[name] - bias)
                slope = p.grad / per_step * (after[name] - before[name])
                scores[name] -= rate * slope * (1 - 2 * masks[name]) * open_ * (1 - open_)
                p.grad = None
    return {name: gates(name) for name in before}


if __name__ == "__main__":
    _work, _task, _arm, _seed, _steps, _which = sys.argv[1:]
    _serve(Path(_work), grid.Cell(_task, _arm, int(_seed)), int(_steps), _which)
