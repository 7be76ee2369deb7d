"""What rows say together: seeds summed up, fields chosen. What was not measured stays out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from hotgraft.search import METHODS

from bench.studies.localization import grid
from bench.studies.localization.tasks import TASKS

Row = dict[str, Any]
SHARE_KEPT = 0.95
"""Of the gain: from here on a graft carries the skill."""
LADDER = ("learned", "magnitude", "random")
"""Methods, each at least as good as the next one."""


class Spread(NamedTuple):
    """A number, over seeds."""

    mean: float
    low: float
    high: float
    count: int
    """Of the seeds."""


def spread(values: Iterable[float]) -> Spread | None:
    """Sum seeds up; values that are not finite (a Rel where nothing was gained) are left out.

    Example:
        >>> spread([1.0, 2.0, float("nan")])
        Spread(mean=1.5, low=1.0, high=2.0, count=2)
    """
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    return Spread(math.fsum(known) / len(known), min(known), max(known), len(known))


def select(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The rows with these fields.

    Example:
        >>> select([{"seed": 0}, {"seed": 1}], seed=1)
        [{'seed': 1}]
    """
    return [row for row in rows if all(row.get(name) == value for name, value in fields.items())]


def score(row: Row, measure: str, which: str = "test") -> float:
    """A row's score, NaN where it has none."""
    found = row.get(which, {}).get(measure)
    return math.nan if found is None else float(found[0])


def over_seeds(
    rows: Iterable[Row], measure: str, which: str = "test", **fields: Any
) -> Spread | None:
    """A score over the seeds of the rows with these fields."""
    return spread(score(row, measure, which) for row in select(rows, **fields))


def singles(rows: Iterable[Row]) -> list[Row]:
    """The rows of the grid: one task a model, asked about that task."""
    wanted = {"finetuned", "base", "shuffled", *METHODS}
    return [
        row
        for row in rows
        if row.get("task") in TASKS and row.get("method") in wanted and "on" not in row
    ]


def values(rows: Iterable[Row], field: str, order: Collection[Any] = ()) -> list[Any]:
    """What a field holds, each once: first what `order` names, in its order, then the rest.

    Example:
        >>> values([{"arm": "b"}, {"arm": "a"}, {"arm": "c"}], "arm", ["c"])
        ['c', 'a', 'b']
    """
    found = {row[field] for row in rows if row.get(field) is not None}
    return [v for v in order if v in found] + sorted(found - set(order))


def check_recipe(rows: Iterable[Row]) -> Row:
    """The recipe that all rows were measured with.

    Raises:
        ValueError: there are two. Their means would mean nothing.
    """
    recipe: Row = {}
    for row in rows:
        for name, value in row.get("recipe", {}).items():
            if recipe.setdefault(name, value) != value:
                raise ValueError(
                    f"the rows are of two recipes: {name} is {recipe[name]} in some and {value} "
                    f"in others ({row['task']} {row['method']}); keep them in files of their own"
                )
    return recipe


class Rung(NamedTuple):
    """Whether the ladder held in one fine-tuned model, at one density."""

    arm: str
    task: str
    density: float
    seed: int
    steps: tuple[bool, ...]
    """Whether each method was at least as good as the next one."""


def rungs(rows: Iterable[Row]) -> list[Rung]:
    """The ladder wherever all of its methods were measured, paired: on the same model."""
    found: dict[tuple[str, str, float, int], dict[str, float]] = {}
    for row in singles(rows):
        if row["method"] in LADDER and math.isfinite(score(row, "accuracy")):
            key = (row["arm"], row["task"], row["density"], row["seed"])
            found.setdefault(key, {})[row["method"]] = score(row, "accuracy")
    return [
        Rung(*key, tuple(of[a] >= of[b] for a, b in itertools.pairwise(LADDER)))
        for key, of in sorted(found.items(), key=lambda item: _place(item[0]))
        if len(of) == len(LADDER)
    ]


def _place(key: tuple[str, str, float, int]) -> tuple[int, int, float, int]:
    """Where a model and density stand in a table."""
    return list(grid.ARMS).index(key[0]), TASKS.index(key[1]), *key[2:]


def smallest(rows: Iterable[Row], arm: str, task: str, method: str) -> float | None:
    """The smallest density from which on, in the mean over seeds, the skill is carried.

    From which on: a larger density that does worse takes it back.
    """
    mine = select(singles(rows), arm=arm, task=task, method=method)
    kept = None
    for density in sorted(values(mine, "density"), reverse=True):
        rel = over_seeds(mine, "rel", density=density)
        if rel is None or rel.mean < SHARE_KEPT:
            break
        kept = density
    return kept


def recovery(rows: Iterable[Row], density: float) -> dict[tuple[str, str], Spread]:
    """Of the models that learnt several tasks: Rel of the graft `of` a task `on` a task."""
    mine = [
        row
        for row in select(rows, density=density)
        if "on" in row and "of" in row and "+" not in row["of"]
    ]
    pairs = sorted({(row["of"], row["on"]) for row in mine})
    found = {(of, on): over_seeds(mine, "rel", of=of, on=on) for of, on in pairs}
    return {pair: rel for pair, rel in found.items() if rel is not None}


def diagonal(matrix: dict[tuple[str, str], Spread], on: bool) -> float | None:
    """The mean of a recovery matrix on its diagonal, or off it."""
    found = spread(rel.mean for (of, asked), rel in matrix.items() if (of == asked) is on)
    return found.mean if found else None


def lost(rows: Iterable[Row], row: Row, on: str) -> float:
    """What a model of `continual` lost of a task while it learnt the second one, of its accuracy.

    NaN where the model it started from was not measured.
    """
    start = row["method"].split(",")[0]
    before = select(
        rows,
        task=row["task"],
        seed=row["seed"],
        method=f"{start}, before",
        density=None if start == "whole" else row["density"],
        on=on,
    )
    return score(before[0], "accuracy") - score(row, "accuracy") if before else math.nan
