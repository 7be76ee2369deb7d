"""The study's tables, rendered from rows into a page; `-` stands for what was not measured."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from hotgraft.search import METHODS

from bench.studies.localization import continual, grid, multitask, summary, trials
from bench.studies.localization.summary import Row, Spread, over_seeds, score, select, spread
from bench.studies.localization.tasks import RELATED, TASKS
from bench.tables import grid as table

BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"
SHOWN = ("learned", *(m for m in METHODS if m != "learned"), "shuffled")
"""Methods, in the order of the tables."""
LOW = 1e-3
"""The densities up to which the order of methods is asked for."""


def write(page: Path, rows: Sequence[Row], images: Sequence[Path] = ()) -> None:
    """Replace what stands between a page's markers.

    Raises:
        ValueError: the page does not have both markers, once and in order, or the rows are of two
            recipes.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{page.name} needs the lines {BEGIN} and {END}, once each, in this order")
    links = {path.stem: os.path.relpath(path, page.parent) for path in images}
    page.write_text(f"{before}{BEGIN}\n{render(rows, links)}\n{END}{after}")


def render(rows: Sequence[Row], images: dict[str, str] | None = None) -> str:
    """All that there are rows for, with the pictures there are.

    Args:
        images: paths by the picture's name, as `plots.draw` names them.
    """
    recipe = summary.check_recipe(rows)
    if not recipe:
        return "Nothing is measured yet."
    parts: list[tuple[Callable[[Sequence[Row]], str], str, str]] = [
        (recovery, "study-recovery", "Rel against density, by task and method"),
        (order, "", ""),
        (smallest, "study-arms", "Rel of learned grafts against density, by optimizer"),
        (calibration, "study-calibration", "Accuracy and calibration error of grafts"),
        (out_of_domain, "", ""),
        (several, "study-multitask", "Rel of each task's graft on every task"),
        (overlaps, "study-overlap", "Correlation of the tasks' masks"),
        (unions, "", ""),
        (one_after_another, "study-continual", "Accuracy on both tasks after the second"),
        (tried, "", ""),
        (times, "", ""),
        (cost, "", ""),
    ]
    shown = [_recipe(recipe, rows)]
    for part, image, says in parts:
        text = part(rows)
        if text and image in (images or {}):
            text += f"\n\n![{says}]({(images or {})[image]})"
        shown.append(text)
    return "\n\n".join(part for part in shown if part)


def _recipe(recipe: Row, rows: Sequence[Row]) -> str:
    seeds = len(summary.values(rows, "seed"))
    single = len(select(rows, products=grid.Products.FLOAT32))
    return (
        f"Fine-tuned for {recipe['steps']} steps of {recipe['batch']} texts; `learned` searched "
        f"for {recipe['learned_steps']} steps, one-pass scores for {recipe['score_steps']}. Tests "
        f"of {recipe['texts']:,} texts, out of domain {recipe['ood_texts']:,}. Means over the "
        f"seeds that were measured, {seeds} at most, with their range; `-`: not measured. Products "
        f"were computed in bf16, those of {single} of the {len(rows)} rows in fp32."
    )


# ---- the grid ------------------------------------------------------------------------------------


def recovery(rows: Sequence[Row]) -> str:
    """Rel, by task, method and density."""
    mine = [row for row in summary.singles(rows) if row["density"] is not None]
    shown = []
    for arm in summary.values(mine, "arm", grid.ARMS):
        of = select(mine, arm=arm)
        densities = summary.values(of, "density")
        lines = [
            [f"{task}, {method}", *(_ranged(over_seeds(cell, "rel", density=d)) for d in densities)]
            for task in summary.values(of, "task", TASKS)
            for method in summary.values(of, "method", SHOWN)
            for cell in [select(of, task=task, method=method)]
            if cell
        ]
        head = ["", *(f"{d:g}" for d in densities)]
        shown.append(f"**Recovered gain (Rel), {_arm(arm)}**, by density:\n\n{table(head, lines)}")
    return "\n\n".join(shown)


def order(rows: Sequence[Row]) -> str:
    """In how many models each method is at least as good as the next."""
    every = summary.rungs(rows)
    if not every:
        return ""
    names = [f"{a} >= {b}" for a, b in itertools.pairwise(summary.LADDER)]
    lines = []
    for key in dict.fromkeys((r.arm, r.task, r.density) for r in every):
        of = [r for r in every if (r.arm, r.task, r.density) == key]
        each = [sum(r.steps[i] for r in of) for i in range(len(names))]
        counts = [f"{n} of {len(of)}" for n in (*each, sum(all(r.steps) for r in of))]
        lines.append([f"{_arm(key[0])}, {key[1]}", f"{key[2]:g}", *counts])
    told = []
    for arm in dict.fromkeys(r.arm for r in every):
        held = [(r.density, all(r.steps)) for r in every if r.arm == arm]
        low = [holds for density, holds in held if density <= LOW]
        told.append(
            f"{_arm(arm)} {sum(holds for _, holds in held)} of {len(held)} cells, of those at "
            f"{LOW:g} and below {sum(low)} of {len(low)}"
        )
    title = (
        f"**Order**, paired over seeds: {' >= '.join(summary.LADDER)} in accuracy holds in "
        f"{'; '.join(told)}. A cell is one fine-tuned model at one density."
    )
    return f"{title}\n\n{table(['', 'density', *names, 'both'], lines)}"


def smallest(rows: Sequence[Row]) -> str:
    """The smallest density that carries the skill, by optimizer."""
    mine = [row for row in summary.singles(rows) if row["density"] is not None]
    lines = []
    for task in summary.values(mine, "task", TASKS):
        for method in summary.values(select(mine, task=task), "method", SHOWN):
            if method in ("random", "shuffled"):
                continue
            cells = []
            for arm in grid.ARMS:
                of = select(mine, arm=arm, task=task, method=method)
                found = summary.smallest(mine, arm, task, method)
                largest = max(summary.values(of, "density"), default=0.0)
                none = f"none up to {largest:g}" if of else "-"
                cells.append(f"{found:g}" if found is not None else none)
            lines.append([f"{task}, {method}", *cells])
    if not lines:
        return ""
    title = (
        f"**Smallest density** of those measured from which on the mean Rel is at least "
        f"{summary.SHARE_KEPT:g}:"
    )
    return f"{title}\n\n{table(['', *map(_arm, grid.ARMS)], lines)}"


def calibration(rows: Sequence[Row]) -> str:
    """ECE of base, fine-tuned and grafted model."""
    every = summary.singles(rows)
    mine = [r for r in every if r["method"] == "learned"]
    lines = []
    for arm in summary.values(mine, "arm", grid.ARMS):
        for task in summary.values(select(mine, arm=arm), "task", TASKS):
            base = over_seeds(every, "ece10", task=task, method="base")
            tuned = over_seeds(every, "ece10", task=task, arm=arm, method="finetuned")
            for density in summary.values(select(mine, arm=arm, task=task), "density"):
                of = select(mine, arm=arm, task=task, density=density)
                change = over_seeds(of, "ece10_change")
                lines.append(
                    [
                        f"{_arm(arm)}, {task}", f"{density:g}", _number(base), _number(tuned),
                        _number(over_seeds(of, "ece10")), _interval(of, "ece10_change"),
                        f"{100 * change.mean / tuned.mean:+.0f} %"
                        if change and tuned and tuned.mean else "-",
                        _beyond(of, "ece10_change"),
                        _signed(over_seeds(of, "nll_change")),
                        _signed(over_seeds(of, "brier_change")),
                    ]
                )  # fmt: skip
    if not lines:
        return ""
    title = (
        "**Calibration** of learned grafts: ECE over 10 bins; the change is the graft's less the "
        "fine-tuned model's, in brackets from the lowest to the highest end of the seeds' 95 % "
        "intervals; then the seeds whose whole interval lies below 0, and above:"
    )
    head = ["", "density", "base", "fine-tuned", "graft", "change", "relative", "below, above"]
    return f"{title}\n\n{table([*head, 'NLL change', 'Brier change'], lines)}"


def out_of_domain(rows: Sequence[Row]) -> str:
    """Accuracy on the other distribution."""
    every = summary.singles(rows)
    mine = select(every, method="learned")
    densities = summary.values(mine, "density")
    lines = []
    for arm in summary.values(mine, "arm", grid.ARMS):
        for task in summary.values(select(mine, arm=arm), "task", TASKS):
            of = select(mine, arm=arm, task=task)
            tuned = select(every, arm=arm, task=task, method="finetuned")
            base = select(every, task=task, method="base")
            cells = [over_seeds(found, "accuracy", "ood") for found in (base, tuned)]
            cells += [over_seeds(of, "accuracy", "ood", density=d) for d in densities]
            lines.append([f"{_arm(arm)}, {task}", *map(_ranged, cells)])
    if not lines:
        return ""
    head = ["", "base", "fine-tuned", *(f"learned, {d:g}" for d in densities)]
    return f"**Out of domain**, accuracy:\n\n{table(head, lines)}"


# ---- several tasks -------------------------------------------------------------------------------


def several(rows: Sequence[Row]) -> str:
    """The recovery matrix of the models that learnt several tasks."""
    mine = [row for row in rows if "of" in row and "on" in row and "+" not in row["of"]]
    shown = []
    for density in summary.values(mine, "density"):
        matrix = summary.recovery(rows, density)
        names = summary.values(mine, "on", multitask.TASKS)
        lines = [[of, *(_ranged(matrix.get((of, on))) for on in names)] for of in names]
        on, off = (summary.diagonal(matrix, part) for part in (True, False))
        means = f"; mean on the diagonal {_plain(on)}, off it {_plain(off)}"
        title = f"**Several tasks in one model**, density {density:g}: Rel of the row's graft on"
        shown.append(f"{title} the column's task{means}:\n\n{table(['', *names], lines)}")
    return "\n\n".join(shown)


def overlaps(rows: Sequence[Row]) -> str:
    """What two masks share, beside chance."""
    mine = select(rows, method="overlap")
    lines = []
    for density in summary.values(mine, "density"):
        of = select(mine, density=density)
        names = list(dict.fromkeys(name for row in of for name in row["tasks"]))
        pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
        for a, b in sorted(pairs, key=lambda pair: not _related(*pair)):
            shares, chances, alike = (
                spread(_entry(row, what, a, b) for row in of)
                for what in ("share", "chance", "similarity")
            )
            size = spread(_entry(row, "counts", b, b) for row in of)
            by_chance = chances.mean / size.mean if chances and size and size.mean else None
            kind = "related" if _related(a, b) else "unrelated"
            lines.append(
                [f"{a}, {b}", kind, f"{density:g}", _ranged(shares), _plain(by_chance, ".1e"),
                 _ranged(alike)]
            )  # fmt: skip
    if not lines:
        return ""
    title = (
        "**Overlap**: the share of a mask that lies in the other, what chance would make it, and "
        "the correlation of the two (0 at chance, 1 for equal masks):"
    )
    return f"{title}\n\n{table(['', '', 'density', 'shared', 'by chance', 'similarity'], lines)}"


def unions(rows: Sequence[Row]) -> str:
    """What a union of masks carries of each of its tasks."""
    mine = [row for row in rows if "+" in (row.get("of") or "") and "on" in row]
    lines = []
    for density in summary.values(mine, "density"):
        of = select(mine, density=density)
        for union in dict.fromkeys(row["of"] for row in of):
            members = union.split("+")
            rels = [over_seeds(of, "rel", of=union, on=task) for task in members]
            entries = spread(row["entries"] for row in select(of, of=union))
            lines.append(
                [
                    ", ".join(members), f"{density:g}",
                    f"{entries.mean:,.0f}" if entries else "-",
                    "; ".join(map(_ranged, rels)),
                    _plain(_mean([rel.mean for rel in rels if rel])),
                ]
            )  # fmt: skip
    if not lines:
        return ""
    head = ["tasks", "density of each", "entries", "Rel on each", "mean"]
    return f"**Unions** of masks, in the model that learnt all tasks:\n\n{table(head, lines)}"


def one_after_another(rows: Sequence[Row]) -> str:
    """What is left of task 1 after task 2."""
    mine = [row for row in rows if ">" in (row.get("task") or "") and "on" in row]
    shown = []
    for pair in summary.values(mine, "task"):
        first, second = pair.split(">")
        of = select(mine, task=pair)
        densities = sorted({row["density"] for row in of if row["density"] is not None})
        lines = []
        for way in continual.ways(tuple(densities)):
            these = select(of, method=way.name, density=way.density)
            one, two = select(these, on=first), select(these, on=second)
            gone = spread(summary.lost(of, row, first) for row in one)
            lines.append(
                [
                    way.name, "" if way.density is None else f"{way.density:g}",
                    _ranged(spread(score(row, "accuracy") for row in one)),
                    "" if way.then == "before" else _ranged(gone, 100, ".1f"),
                    _ranged(spread(score(row, "accuracy") for row in two)),
                    _ranged(spread(score(row, "rel") for row in two)),
                ]
            )  # fmt: skip
        head = ["model", "density", first, "lost, points", second, "Rel"]
        title = (
            f"**{first}, then {second}**. `whole`: task 2 begins with all that task 1 changed, "
            "`graft`: with the base and task 1's graft. `protected`: the graft's positions are "
            "frozen. `grafts`: the base with task 1's graft and one of what task 2 changed. Lost: "
            "from `before`. Rel: of what learning task 2 alone gains:"
        )
        shown.append(f"{title}\n\n{table(head, lines)}")
    return "\n\n".join(shown)


def tried(rows: Sequence[Row]) -> str:
    """What other searches keep."""
    mine = select(rows, method=trials.METHOD)
    lines = [
        [
            f"{row['of']}, {row['trial']}", "{:.2f} [{:.2f}, {:.2f}]".format(*row["rel"]),
            f"{_kept(row['nll']):.3f}", *(f"{a:.3f}" for a in row["accuracy"].values()),
            f"{row['seconds']:.0f}",
        ]
        for row in mine
    ]  # fmt: skip
    if not lines:
        return ""
    title = (
        f"**Other searches** at {mine[0]['density']:g}, one seed, on {mine[0]['texts']} texts that "
        "no other number is measured on. NLL kept: the part of its fall from base to fine-tuned. "
        "After half the fine-tuning both are parts of what that model gained:"
    )
    head = ["", "Rel", "NLL kept", "accuracy: base", "fine-tuned", "graft", "search, s"]
    return f"{title}\n\n{table(head, lines)}"


def _kept(nll: dict[str, float]) -> float:
    return (nll["base"] - nll["graft"]) / (nll["base"] - nll["finetuned"])


# ---- what it takes -------------------------------------------------------------------------------


def times(rows: Sequence[Row]) -> str:
    """Seconds of fine-tuning and of searching."""
    every = [row for row in summary.singles(rows) if row.get("seconds") is not None]
    lines = []
    for arm in summary.values(every, "arm", grid.ARMS):
        for task in summary.values(select(every, arm=arm), "task", TASKS):
            of = select(every, arm=arm, task=task)
            tuned = _mean([r["seconds"] for r in of if r["method"] == "finetuned"])
            for method in summary.values(of, "method", SHOWN):
                took = _mean([row["seconds"] for row in select(of, method=method)])
                if method in ("finetuned", "shuffled") or took is None:
                    continue
                ratio = None if tuned is None else took / tuned
                lines.append(
                    [f"{_arm(arm)}, {task}, {method}", _plain(tuned, ".0f"), _plain(took, ".0f"),
                     _plain(ratio)]
                )  # fmt: skip
    if not lines:
        return ""
    head = ["", "fine-tuning, s", "search, s", "ratio"]
    return f"**Wall time**, the mean over seeds and densities:\n\n{table(head, lines)}"


def cost(rows: Sequence[Row]) -> str:
    """Memory and time of searching, measured apart."""
    lines = [
        [
            row["arm"], f"{row['batch_seconds']:.2f}", f"{row['growth'] / 2**20:,.0f}",
            f"{row['beyond_passes'] / 2**20:,.0f}",
            f"{row['beyond_passes'] / row['base_nbytes']:.2f}",
        ]
        for row in select(rows, method="cost")
    ]  # fmt: skip
    if not lines:
        return ""
    head = ["", "s a batch", "peak growth, MiB", "beyond passes, MiB", "of the base"]
    title = "**Memory and time**, each in a process of its own; passes: forward and backward alone:"
    return f"{title}\n\n{table(head, lines)}"


# ---- cells ---------------------------------------------------------------------------------------


def _ranged(found: Spread | None, times: float = 1, form: str = ".2f") -> str:
    """A mean with its range, or the number of seeds where there are not three."""
    if found is None:
        return "-"
    mean, low, high = (f"{times * x:{form}}" for x in found[:3])
    if found.count == 1:
        return f"{mean} (1 seed)"
    few = "" if found.count == len(grid.SEEDS) else f", {found.count} seeds"
    return f"{mean} ({low} to {high}{few})"


def _number(found: Spread | None) -> str:
    return "-" if found is None else f"{found.mean:.3f}"


def _signed(found: Spread | None) -> str:
    return "-" if found is None else f"{found.mean:+.3f}"


def _plain(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _mean(found: Sequence[float]) -> float | None:
    return math.fsum(found) / len(found) if found else None


def _ends(rows: Iterable[Row], measure: str) -> list[tuple[float, float]]:
    found = [row["test"][measure] for row in rows if measure in row.get("test", {})]
    return [(low, high) for _, low, high in found]


def _interval(rows: Sequence[Row], measure: str) -> str:
    """A mean, and the reach of all seeds' intervals."""
    mean, ends = over_seeds(rows, measure), _ends(rows, measure)
    if mean is None:
        return "-"
    return f"{mean.mean:+.3f} [{min(e[0] for e in ends):+.3f}, {max(e[1] for e in ends):+.3f}]"


def _beyond(rows: Sequence[Row], measure: str) -> str:
    """How many seeds' intervals lie wholly below 0, and above, of how many."""
    ends = _ends(rows, measure)
    below, above = sum(high < 0 for _, high in ends), sum(low > 0 for low, _ in ends)
    return f"{below}, {above} of {len(ends)}" if ends else "-"


def _related(a: str, b: str) -> bool:
    return (a, b) in RELATED or (b, a) in RELATED


def _entry(row: Row, what: str, a: str, b: str) -> float:
    """An entry of a matrix by the tasks' names; NaN where it has none."""
    if a not in row["tasks"] or b not in row["tasks"]:
        return math.nan
    found: Any = row[what][row["tasks"].index(a)][row["tasks"].index(b)]
    return math.nan if found is None else float(found)


def _arm(arm: str) -> str:
    return grid.ARMS[arm].label
