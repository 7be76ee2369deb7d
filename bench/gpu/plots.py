"""Pictures of what was measured on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from bench.plots import bare, color_of
from bench.tables import Rows, time

_STYLES = (
    ("hotgraft, cuda", "hotgraft, CUDA", "#c2410c", "o"),
    ("hotgraft, triton", "hotgraft, Triton", "#f59e0b", "s"),
    ("floor", "raw kernel (floor)", "#64748b", None),
    ("torch index_copy_", "torch index_copy_", "#94a3b8", "^"),
    ("torch copy_ of whole tensors", "dense copy", "#333333", None),
)


def draw(folder: Path, environment: dict[str, Any], rows: Rows) -> list[Path]:
    """Draw what there are rows for; returns the files."""
    if not environment.get("gpu"):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, picture in (("gpu-switch", _ways), ("gpu-density", _densities)):
        figure = picture(rows)
        if figure is not None:
            caption = f"{environment['gpu']['name']}, {environment['date']}"
            figure.supxlabel(caption, x=0.99, ha="right", fontsize=7, color="#94a3b8")
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=150)
            plt.close(figure)
            drawn.append(path)
    return drawn


def _chosen(rows: Rows, case: str) -> list[dict[str, Any]]:
    wanted = {"caches": "cold", "clock": "device"}
    return [
        row for row in rows
        if row["case"] == case and row["operation"] == "activate" and row["samples"]
        and all(row["parameters"].get(key) == value for key, value in wanted.items())
    ]  # fmt: skip


def _ways(rows: Rows) -> Any:
    """Device time of each way to activate, on a logarithmic scale."""
    chosen = sorted(_chosen(rows, "gpu_switch"), key=lambda row: row["median"], reverse=True)
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.36 * len(chosen) + 1.1), layout="constrained")
    medians = [row["median"] for row in chosen]
    labels = [row["variant"] for row in chosen]
    axes.barh(labels, medians, color=[color_of(label.partition(",")[0]) for label in labels])
    for at, row in enumerate(chosen):
        axes.text(row["median"] * 1.15, at, time(row["median"]), va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(min(medians) / 3, max(medians) * 6)
    one = chosen[0]["parameters"]
    axes.set_title(
        f"Putting {one['entries']:,} entries into {one['model_parameters'] / 1e9:.2g} B parameters",
        fontsize=10,
    )
    axes.set_xlabel("microseconds of device time, L2 emptied (median)", fontsize=8)
    bare(axes)
    return figure


def _densities(rows: Rows) -> Any:
    """Device time by density, to the crossover with a dense copy."""
    chosen = _chosen(rows, "gpu_density")
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for variant, label, color, marker in _STYLES:
        best: dict[float, float] = {}
        for row in chosen:
            if row["variant"].startswith(variant):
                density = row["parameters"]["density"]
                best[density] = min(row["median"], best.get(density, row["median"]))
        if best:
            points = sorted(best.items())
            axes.plot(
                *zip(*points, strict=True), label=label, color=color, marker=marker, markersize=4,
                linewidth=1,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("density", fontsize=8)
    axes.set_ylabel("microseconds of device time, L2 emptied", fontsize=8)
    one = chosen[0]["parameters"]
    axes.set_title(f"Writing into {one['model_parameters'] / 1e9:.2g} B parameters", fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    bare(axes)
    return figure
