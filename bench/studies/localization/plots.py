"""Pictures of the study's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from hotgraft.search import METHODS
from matplotlib import pyplot as plt

from bench.plots import bare
from bench.studies.localization import continual, grid, multitask, summary
from bench.studies.localization.summary import Row, Spread, over_seeds, select, spread
from bench.studies.localization.tasks import TASKS

_INK, _MINE, _FLOOR, _OTHER = "#333333", "#c2410c", "#64748b", "#94a3b8"
_COLORS = {
    "learned": _MINE,
    "first_order": "#0f766e",
    "magnitude": "#1d4ed8",
    "panigrahi": "#7e22ce",
    "movement": "#a16207",
    "snip": "#be185d",
    "fisher": "#15803d",
    "random": _OTHER,
    "shuffled": _FLOOR,
}
_ARMS = dict(
    zip(
        grid.ARMS,
        (_MINE, "#be185d", "#7e22ce", "#15803d", "#84cc16", "#1d4ed8", "#a16207", "#0f766e"),
        strict=True,
    )
)
_COLUMNS = 3


def draw(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw what there are rows for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "recovery": _recovery,
        "calibration": _calibration,
        "arms": _arms,
        "multitask": _multitask,
        "overlap": _overlap,
        "continual": _continual,
    }
    drawn = []
    for name, picture in pictures.items():
        figure = picture(rows)
        if figure is not None:
            path = folder / f"study-{name}.png"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            drawn.append(path)
    return drawn


def _panels(count: int, height: float = 2.3) -> tuple[Any, list[Any]]:
    """A figure with some panels, side by side and below each other."""
    columns = min(count, _COLUMNS)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(0.4 + 2.4 * columns, height * lines + 0.4),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    flat = list(axes.flat)
    for idle in flat[count:]:
        idle.set_visible(False)
    for panel in flat[:count]:
        bare(panel)
    return figure, flat[:count]


def _line(panel: Any, points: dict[float, Spread], color: str, label: str) -> None:
    """A mean with its range, against density."""
    densities = sorted(points)
    panel.plot(
        densities, [points[d].mean for d in densities], marker="o", markersize=3, linewidth=1,
        color=color, label=label,
    )  # fmt: skip
    panel.fill_between(
        densities, [points[d].low for d in densities], [points[d].high for d in densities],
        color=color, alpha=0.15, linewidth=0,
    )  # fmt: skip


def _points(rows: Sequence[Row], measure: str) -> dict[float, Spread]:
    found = {d: over_seeds(rows, measure, density=d) for d in summary.values(rows, "density")}
    return {density: value for density, value in found.items() if value is not None}


def _by_density(panel: Any, title: str) -> None:
    panel.set_xscale("log")
    panel.set_title(title, fontsize=9, color=_INK)
    panel.set_xlabel("density", fontsize=8)


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", fontsize=7,
            ncols=min(len(entries), 5), frameon=False,
        )  # fmt: skip


def _recovery(rows: Sequence[Row]) -> Any:
    """Rel against density by method, a panel a task."""
    mine = [r for r in select(summary.singles(rows), arm="sgd") if r["density"] is not None]
    tasks = summary.values(mine, "task", TASKS)
    if not tasks:
        return None
    figure, panels = _panels(len(tasks))
    for panel, task in zip(panels, tasks, strict=True):
        for method in (*METHODS, "shuffled"):
            points = _points(select(mine, task=task, method=method), "rel")
            if points:
                _line(panel, points, _COLORS.get(method, _INK), method)
        for level in (0, 1):
            panel.axhline(level, color=_OTHER, linewidth=0.8)
        panel.axhline(summary.SHARE_KEPT, color=_OTHER, linewidth=0.8, linestyle="--")
        _by_density(panel, task)
    panels[0].set_ylabel("Rel (dashed: 0.95)", fontsize=8)
    _legend(figure, panels)
    return figure


def _calibration(rows: Sequence[Row]) -> Any:
    """Accuracy and ECE of learned and magnitude grafts, with the fine-tuned model's and base's."""
    every = summary.singles(rows)
    mine = [r for r in select(every, arm="sgd") if r["method"] in ("learned", "magnitude")]
    tasks = summary.values(mine, "task", TASKS)
    if not tasks:
        return None
    measures = (("accuracy", "accuracy"), ("ece10", "ECE, 10 bins"))
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(0.4 + 2.4 * len(tasks), 5), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for line, (measure, label) in zip(axes, measures, strict=True):
        for panel, task in zip(line, tasks, strict=True):
            bare(panel)
            for method in ("learned", "magnitude"):
                points = _points(select(mine, task=task, method=method), measure)
                if points:
                    _line(panel, points, _COLORS[method], method)
            for of, style in (("finetuned", "-"), ("base", ":")):
                arm = {"arm": "sgd"} if of == "finetuned" else {}
                level = over_seeds(every, measure, task=task, method=of, **arm)
                if level is not None:
                    panel.axhline(
                        level.mean, color=_INK, linewidth=0.8, linestyle=style, label=of
                    )  # fmt: skip
            _by_density(panel, task)
        line[0].set_ylabel(label, fontsize=8)
    _legend(figure, list(axes.flat))
    return figure


def _arms(rows: Sequence[Row]) -> Any:
    """Rel of learned and magnitude grafts against density by optimizer, a panel a task."""
    mine = [row for row in summary.singles(rows) if row["method"] in ("learned", "magnitude")]
    tasks = [
        task
        for task in summary.values(mine, "task", TASKS)
        if len(summary.values(select(mine, task=task), "arm")) > 1
    ]
    if not tasks:
        return None
    figure, panels = _panels(len(tasks))
    for panel, task in zip(panels, tasks, strict=True):
        for arm in grid.ARMS:
            for method, style in (("learned", "-"), ("magnitude", ":")):
                points = _points(select(mine, task=task, arm=arm, method=method), "rel")
                if points:
                    _line(panel, points, _ARMS[arm], f"{arm}, {method}")
                    panel.lines[-1].set_linestyle(style)
        panel.axhline(summary.SHARE_KEPT, color=_OTHER, linewidth=0.8, linestyle="--")
        _by_density(panel, task)
    panels[0].set_ylabel("Rel (dashed: 0.95)", fontsize=8)
    _legend(figure, panels)
    return figure


def _heat(panel: Any, names: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> None:
    """A matrix of numbers, those missing left white."""
    shown = [[float("nan") if value is None else value for value in line] for line in matrix]
    panel.imshow(shown, cmap="Oranges", vmin=0, vmax=1)
    for i, line in enumerate(matrix):
        for j, value in enumerate(line):
            if value is not None:
                color = "white" if value > 0.6 else _INK
                panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right")
    panel.set_yticks(range(len(names)), names)


def _multitask(rows: Sequence[Row]) -> Any:
    """Rel of each task's graft on every task, a panel a density."""
    mine = [row for row in rows if "of" in row and "on" in row and "+" not in row["of"]]
    densities = summary.values(mine, "density")
    if not densities:
        return None
    names = summary.values(mine, "on", multitask.TASKS)
    figure, panels = _panels(len(densities), 2.6)
    for panel, density in zip(panels, densities, strict=True):
        found = summary.recovery(rows, density)
        cells = [[found.get((of, on)) for on in names] for of in names]
        _heat(panel, names, [[cell and cell.mean for cell in line] for line in cells])
        panel.set_title(f"Rel, density {density:g}", fontsize=9, color=_INK)
        panel.set_xlabel("on", fontsize=8)
    panels[0].set_ylabel("graft of", fontsize=8)
    return figure


def _overlap(rows: Sequence[Row]) -> Any:
    """The correlation of the tasks' masks, a panel a density."""
    mine = select(rows, method="overlap")
    densities = summary.values(mine, "density")
    if not densities:
        return None
    figure, panels = _panels(len(densities), 2.6)
    for panel, density in zip(panels, densities, strict=True):
        of = select(mine, density=density)
        names = of[0]["tasks"]
        alike = [row["similarity"] for row in of if row["tasks"] == names]
        means = [
            [spread(m[i][j] for m in alike if m[i][j] is not None) for j in range(len(names))]
            for i in range(len(names))
        ]
        _heat(panel, names, [[cell and cell.mean for cell in line] for line in means])
        panel.set_title(f"mask similarity (phi), density {density:g}", fontsize=9, color=_INK)
    return figure


def _continual(rows: Sequence[Row]) -> Any:
    """Accuracy on both tasks, a panel a pair of tasks."""
    mine = [row for row in rows if ">" in (row.get("task") or "") and "on" in row]
    pairs = summary.values(mine, "task")
    if not pairs:
        return None
    ways = list(continual.ways(tuple(summary.values(mine, "density"))))
    figure, axes = plt.subplots(
        1, len(pairs), figsize=(1.5 + 3.2 * len(pairs), 0.34 * len(ways) + 1.3),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    labels = [w.name + ("" if w.density is None else f", {w.density:g}") for w in ways]
    for panel, pair in zip(axes.flat, pairs, strict=True):
        bare(panel)
        of = select(mine, task=pair)
        for shift, on, color in zip((-0.2, 0.2), pair.split(">"), (_MINE, _FLOOR), strict=True):
            for at, way in enumerate(ways):
                found = over_seeds(of, "accuracy", method=way.name, density=way.density, on=on)
                if found is not None:
                    label = on if not any(b.get_label() == on for b in panel.containers) else None
                    panel.barh(at + shift, found.mean, 0.36, color=color, label=label)
                    panel.plot([found.low, found.high], [at + shift] * 2, color=_INK, linewidth=1)
        panel.set_yticks(range(len(ways)), labels)
        panel.set_xlabel("accuracy (bar: mean, line: range over seeds)", fontsize=8)
        panel.set_title(pair.replace(">", ", then "), fontsize=9, color=_INK)
        panel.legend(fontsize=7, frameon=False, loc="lower right")
    axes[0][0].set_ylim(len(ways) - 0.4, -0.6)  # the first on top
    return figure
