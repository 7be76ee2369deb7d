"""Run a grid, row by row; what is in the file already is left as it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.progress import Progress
from torch import Tensor

from bench.studies.localization import grid
from bench.studies.localization.lab import Lab
from bench.studies.localization.rows import Rows

TESTS = ("test", "ood")


def run(lab: Lab, rows: Rows, grids: Iterable[grid.Grid], progress: Progress) -> None:
    """Measure what is missing."""
    for g in grids:
        masks = list(g.masks())
        bar = progress.add_task("", total=len(masks))
        for mask in masks:
            progress.update(bar, description=" ".join(map(str, (*mask.cell, *mask[1:]))))
            _finetuned(lab, rows, mask.cell)
            _mask(lab, rows, mask)
            progress.advance(bar)


def key_of(cell: grid.Cell, method: str, density: float | None = None) -> dict[str, Any]:
    """The fields that name a row."""
    return {**cell._asdict(), "method": method, "density": density}


def _finetuned(lab: Lab, rows: Rows, cell: grid.Cell) -> None:
    base = grid.Cell(cell.task, "none", 0)
    if rows.find(key_of(cell, "finetuned")) is None:
        _, seconds = lab.finetuned(cell)
        logits = {which: lab.logits(cell, cell.task, which) for which in TESTS}
        add(lab, rows, key_of(cell, "finetuned"), logits, cell=cell, seconds=seconds)
    if rows.find(key_of(base, "base")) is None:
        logits = {which: lab.logits(None, cell.task, which) for which in TESTS}
        add(lab, rows, key_of(base, "base"), logits, cell=cell)


def _mask(lab: Lab, rows: Rows, mask: grid.Mask) -> None:
    key = key_of(mask.cell, mask.method, mask.density)
    if rows.find(key) is None:
        graft, seconds = lab.localize(mask)
        logits = {which: lab.grafted(graft, mask.cell.task, which) for which in TESTS}
        more = {"seconds": seconds, "entries": graft.nnz, "graft": graft.id}
        add(lab, rows, key, logits, cell=mask.cell, **more)


def add(
    lab: Lab,
    rows: Rows,
    key: dict[str, Any],
    logits: dict[str, Tensor],
    *,
    cell: grid.Cell,
    task: str | None = None,
    **more: Any,
) -> None:
    """Score logits, test by test, and keep the row.

    Args:
        key: the fields that name it.
        cell: the fine-tuned model that the scores compare with.
        task: the one asked about, if not the cell's.
        more: further fields.
    """
    asked = task or cell.task
    scores = {which: lab.scores(found, cell, asked, which) for which, found in logits.items()}
    about = {"recipe": vars(lab.recipe), "products": lab.products}
    rows.add({**key, **more, **about, **scores})
