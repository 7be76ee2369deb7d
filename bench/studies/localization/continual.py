"""One task after another: does freezing the first one's region keep the first one's skill?

What is known of the protocol of Panigrahi et al. (2023) is: learn task 1, find its region g1,
freeze g1, learn task 2 elsewhere. It does not say what the weights outside g1 hold when task 2
begins, so both readings are measured:

- `whole`: the model as task 1 left it, all its weights fine-tuned; this is the literal one.
- `graft`: the base with graft 1, so that g1 carries all that there is of task 1.

Task 2 is then learnt with g1 `protected` (after every step it holds its bits), and, to compare,
`free`. The last row of a density, `grafts`, is the base with graft 1 and with a graft of what task
2 changed under `graft` and `protected`: two skills in two small regions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from hotgraft.graft import Graft
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

from bench.studies.localization import grid
from bench.studies.localization.lab import Lab
from bench.studies.localization.rows import Rows
from bench.studies.localization.run import add, key_of

PAIRS = (("kind", "language"),)
"""Task 1 and task 2: unrelated, so that there is something to forget."""
DENSITIES = (1e-2, 1e-3)
METHOD = "learned"


class Way(NamedTuple):
    """One model of a pair of tasks."""

    start: str
    """`whole` or `graft`: what task 1 left."""
    then: str
    """`before` task 2, `free`, `protected`, or the two `grafts`."""
    density: float | None

    @property
    def name(self) -> str:
        """The row's method."""
        return f"{self.start}, {self.then}"


def ways(densities: tuple[float, ...] = DENSITIES) -> Iterator[Way]:
    """Every model, in the order in which they are made."""
    yield Way("whole", "before", None)
    yield Way("whole", "free", None)
    for density in densities:
        for then in ("before", "protected", "free", "grafts"):
            yield Way("graft", then, density)
        yield Way("whole", "protected", density)


def run(
    lab: Lab,
    rows: Rows,
    progress: Progress,
    *,
    pairs: tuple[tuple[str, str], ...] = PAIRS,
    seeds: tuple[int, ...] = grid.SEEDS,
    densities: tuple[float, ...] = DENSITIES,
) -> None:
    """Measure what the rows lack."""
    every = list(ways(densities))
    bar = progress.add_task("", total=len(pairs) * len(seeds) * len(every))
    for seed in seeds:
        for first, second in pairs:
            for way in every:
                progress.update(bar, description=f"{first}, {second} {seed} {way.name}")
                _measure(lab, rows, first, second, seed, way)
                progress.advance(bar)


def _measure(lab: Lab, rows: Rows, first: str, second: str, seed: int, way: Way) -> None:
    key = key_of(grid.Cell(f"{first}>{second}", "sgd", seed), way.name, way.density)
    lacking = [task for task in (first, second) if rows.find({**key, "on": task}) is None]
    if not lacking:
        return
    weights = _weights(lab, grid.Cell(first, "sgd", seed), grid.Cell(second, "sgd", seed), way)
    for task in lacking:
        # Compared with the model that learnt this task alone, from the base.
        alone = grid.Cell(task, "sgd", seed)
        logits = {"test": lab.answer_of(weights, task, "test")}
        add(lab, rows, {**key, "on": task}, logits, cell=alone)


def _weights(lab: Lab, first: grid.Cell, second: grid.Cell, way: Way) -> Mapping[str, Tensor]:
    """The weights of a model; what was learnt on the way is kept in the lab's folder."""
    whole = load_file(lab.finetuned(first)[0])
    graft = None
    if way.density is not None:
        graft, _ = lab.localize(grid.Mask(first, METHOD, way.density))
    start = whole
    if way.start == "graft":
        assert graft is not None
        start = grafted(lab, graft)
    if way.then == "before":
        return start
    if way.then == "grafts":
        assert way.density is not None
        path = _learnt(lab, first, second, way._replace(then="protected"), start, graft)
        mask = grid.Mask(second, METHOD, way.density)
        added, _ = lab.localize(mask, path=path, start=start)
        return grafted(lab, added, start)
    return load_file(_learnt(lab, first, second, way, start, graft))


def _learnt(
    lab: Lab,
    first: grid.Cell,
    second: grid.Cell,
    way: Way,
    start: Mapping[str, Tensor],
    graft: Graft | None,
) -> Path:
    """The file of the model that went on to task 2."""
    about = f"{way.start}-{way.then}-{way.density}-{lab.recipe.learned_steps}"
    path = lab.path(first, f"then-{second.task}-{about}.safetensors")
    if not path.exists():
        protected = graft if way.then == "protected" else None
        lab.learn(second, path, start=start, protected=protected)
    return path


def grafted(lab: Lab, graft: Graft, onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of the base, or of another model, with a graft in them."""
    given = dict(lab.model.named_parameters()) if onto is None else onto
    weights = {name: tensor.detach().clone() for name, tensor in given.items()}
    for name in graft.names:
        entries = graft[name]
        flat = weights[name].view(-1)
        assert torch.equal(flat[entries.indices], entries.old)
        flat[entries.indices] = entries.new
    return weights
