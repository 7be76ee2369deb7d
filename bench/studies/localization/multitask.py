"""One model that learnt several tasks: is each one's skill a region of its own?

After Panigrahi et al. (2023): all tasks share one set of weights, a batch of each in turn, and a
mask is learned for each. Rows tell

- how much of each task's gain each mask's graft carries (`of` a task, measured `on` a task);
- how many positions two masks share, beside what chance would do, and their correlation;
- what the union of masks carries of each of its tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_
from typing import Any

import hotgraft
from hotgraft.graft import Graft
from rich.progress import Progress

from bench.studies.localization import grid
from bench.studies.localization.lab import Lab
from bench.studies.localization.rows import Rows
from bench.studies.localization.run import add, key_of

TASKS = ("language", "implemented", "kind", "library")
"""Two pairs of related tasks, `tasks.RELATED`, and so four pairs of unrelated ones."""
DENSITIES = (1e-3, 1e-2)
UNIONS = (
    TASKS,
    ("language", "implemented"),
    ("kind", "library"),
    ("language", "kind"),
    ("implemented", "library"),
)
METHOD = "learned"


def run(
    lab: Lab,
    rows: Rows,
    progress: Progress,
    *,
    tasks: tuple[str, ...] = TASKS,
    seeds: tuple[int, ...] = grid.SEEDS,
    densities: tuple[float, ...] = DENSITIES,
    unions: tuple[tuple[str, ...], ...] = UNIONS,
) -> None:
    """Measure what the rows lack."""
    bar = progress.add_task("", total=len(seeds) * (1 + len(densities)))
    for seed in seeds:
        cell = grid.Cell("+".join(tasks), "sgd", seed)
        progress.update(bar, description=f"multitask {seed}")
        _finetuned(lab, rows, cell)
        progress.advance(bar)
        for density in densities:
            progress.update(bar, description=f"multitask {seed} {density:g}")
            _masks(lab, rows, cell, density, unions)
            progress.advance(bar)


def _finetuned(lab: Lab, rows: Rows, cell: grid.Cell) -> None:
    lacking = list(_lacking(rows, key_of(cell, "finetuned"), cell.tasks))
    if lacking:
        _, seconds = lab.finetuned(cell)
        for task, key in lacking:
            logits = {"test": lab.logits(cell, task, "test")}
            add(lab, rows, key, logits, cell=cell, task=task, seconds=seconds)
    for task in cell.tasks:
        key = {**key_of(grid.Cell(cell.task, "none", 0), "base"), "on": task}
        if rows.find(key) is None:
            logits = {"test": lab.logits(None, task, "test")}
            add(lab, rows, key, logits, cell=cell, task=task)


def _masks(
    lab: Lab,
    rows: Rows,
    cell: grid.Cell,
    density: float,
    unions: tuple[tuple[str, ...], ...],
) -> None:
    key = key_of(cell, METHOD, density)
    overlap = {**key, "method": "overlap"}
    wanted = [((task,), cell.tasks) for task in cell.tasks] + [(union, union) for union in unions]
    todo = [
        (of, list(_lacking(rows, {**key, "of": "+".join(of)}, on)))
        for of, on in wanted
    ]  # fmt: skip
    if rows.find(overlap) is not None and not any(lacking for _, lacking in todo):
        return
    grafts, seconds = {}, {}
    for task in cell.tasks:
        mask = grid.Mask(cell, METHOD, density)
        grafts[task], seconds[task] = lab.localize(mask, task=task)
    if rows.find(overlap) is None:
        rows.add({**overlap, "recipe": vars(lab.recipe), **_overlap(grafts)})
    for of, lacking in todo:
        graft = grafts[of[0]]
        if len(of) > 1 and lacking:
            mask = reduce(or_, (grafts[task].mask for task in of))
            graft = Graft.from_mask(lab.model, lab.finetuned(cell)[0], mask)
        for task, row in lacking:
            more = {"entries": graft.nnz, "seconds": seconds[of[0]] if len(of) == 1 else None}
            logits = {"test": lab.grafted(graft, task, "test")}
            add(lab, rows, row, logits, cell=cell, task=task, **more)


def _lacking(
    rows: Rows, key: dict[str, Any], tasks: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tasks on which this was not measured, with their rows' keys."""
    for task in tasks:
        wanted = {**key, "on": task}
        if rows.find(wanted) is None:
            yield task, wanted


def _overlap(grafts: dict[str, Graft]) -> dict[str, Any]:
    found = hotgraft.overlap(grafts.values())
    assert found.chance is not None
    assert found.similarity is not None
    return {
        "tasks": list(grafts),
        "eligible": found.eligible,
        "counts": found.counts.tolist(),
        "share": found.share.tolist(),
        "chance": found.chance.tolist(),
        "similarity": found.similarity.tolist(),
    }
