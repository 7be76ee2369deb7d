"""Pictures of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from bench.tables import time

Rows = Sequence[dict[str, Any]]
_INK, _MINE, _FLOOR, _OTHER = "#333333", "#c2410c", "#64748b", "#94a3b8"


def draw(folder: Path, environment: dict[str, Any], rows: Rows) -> list[Path]:
    """Draw what there are rows for; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    caption = f"{environment['cpu']}, {environment['cores']} cores, {environment['date']}"
    drawn = []
    for name, picture in (("bench-switch", _ways), ("bench-floor", _ratios)):
        figure = picture(rows)
        if figure is not None:
            figure.supxlabel(caption, x=0.99, ha="right", fontsize=7, color=_OTHER)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            drawn.append(path)
    return drawn


def color_of(variant: str) -> str:
    """Ours, the floor's, or anybody else's."""
    if variant == "hotgraft":
        return _MINE
    return _FLOOR if variant.startswith("floor") else _OTHER


def bare(axes: Any) -> None:
    """Take away what is no data."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=8)


def _ways(rows: Rows) -> Any:
    """Each way to activate, on a logarithmic scale."""
    warm = [
        row for row in rows
        if row["operation"] == "activate" and row["parameters"].get("caches") == "warm"
        and (row["case"] == "switch" or row["variant"].startswith("peft"))
    ]  # fmt: skip
    if not warm:
        return None
    sparsest = min(row["parameters"].get("density", 1) for row in warm)
    chosen = [row for row in warm if row["parameters"].get("density", sparsest) == sparsest]
    chosen.sort(key=lambda row: row["median"], reverse=True)
    figure, axes = plt.subplots(figsize=(7, 0.36 * len(chosen) + 1.1), layout="constrained")
    medians = [row["median"] for row in chosen]
    labels = [row["variant"] for row in chosen]
    axes.barh(labels, medians, color=[color_of(label) for label in labels], height=0.65)
    for at, row in enumerate(chosen):
        low, high = row["quartiles"]
        axes.plot([low, high], [at, at], color=_INK, linewidth=1)
        axes.text(max(high, row["median"]) * 1.15, at, time(row["median"]), va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(medians) / 3, max(medians) * 6)
    one = next(row for row in chosen if row["case"] == "switch")["parameters"]
    axes.set_title(
        f"Putting {one['entries']:,} entries into {one['model_parameters'] / 1e9:.2g} B parameters",
        fontsize=10,
    )
    axes.set_xlabel("microseconds, caches warm (bar: median, line: quartiles)", fontsize=8)
    bare(axes)
    return figure


def _ratios(rows: Rows) -> Any:
    """hotgraft over the floor, by density and by model size."""
    mine = [
        row for row in rows
        if row["case"] in ("switch", "scale") and row["variant"] == "hotgraft"
        and row["operation"] in ("activate", "deactivate")
    ]  # fmt: skip
    if not mine:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(7, 3), sharey=True, layout="constrained")
    panels = (("switch", "density", "density"), ("scale", "model_parameters", "parameters"))
    for panel, (case, key, label) in zip(axes, panels, strict=True):
        for operation, marker in (("activate", "o"), ("deactivate", "s")):
            for caches, color in (("warm", _MINE), ("cold", _FLOOR)):
                points = sorted(
                    (row["parameters"][key], row["floor_ratio"]) for row in mine
                    if (row["case"], row["operation"], row["parameters"]["caches"])
                    == (case, operation, caches)
                )  # fmt: skip
                if points:
                    panel.plot(
                        *zip(*points, strict=True), marker=marker, color=color, markersize=4,
                        linewidth=1, label=f"{operation}, {caches}",
                    )  # fmt: skip
        panel.axhline(1.2, color=_OTHER, linestyle="--", linewidth=1)
        panel.axhline(1.0, color=_OTHER, linewidth=1)
        panel.set_xscale("log")
        panel.set_xlabel(label, fontsize=8)
        bare(panel)
    axes[0].set_ylabel("time over the plain C loop's", fontsize=8)
    axes[0].set_ylim(bottom=0.8)
    if axes[0].lines[2:]:
        axes[0].legend(fontsize=7, frameon=False)
    return figure
