"""The tables of what was measured on a GPU."""

from __future__ import annotations

from typing import Any

from bench.tables import Rows, cell, find, grid, targets, time

FLOOR = "floor, "


def render(environment: dict[str, Any], rows: Rows, full: bool = True) -> str:
    """All the tables there are rows for, or those on switching; or that nothing was measured."""
    if not any(row["samples"] for row in rows):
        why = next((row["note"] for row in rows), "no machine with a GPU was to be had")
        return f"**On a GPU**: not measured ({why})."
    sections = [_machine(environment), _switching(rows), _between(rows)]
    if full:
        sections += [_loading(rows), _densities(rows), _scale(rows), _missing(rows), targets(rows)]
    return "\n\n".join(section for section in sections if section)


def _machine(environment: dict[str, Any]) -> str:
    gpu, packages = environment["gpu"], environment["packages"]
    return (
        f"**On a GPU**: {gpu['name']}, {gpu['memory_gib']:.0f} GiB, L2 {gpu['l2_mib']:.0f} MiB, "
        f"driver {gpu['driver']}; torch {packages['torch']}, triton {packages['triton']}; "
        f"{environment['date']}, commit {environment['commit']}. "
        "Device time is between two events; "
        "a whole call is what Python takes until it returns. Medians; cold: the L2 was emptied "
        "before each sample; every sample is in `bench/results/`."
    )


def _model(row: dict[str, Any]) -> str:
    p = row["parameters"]
    return (
        f"{p['model_parameters'] / 1e9:.3g} B bf16 parameters in {p['tensors']} tensors, "
        f"{p['entries']:,} entries"
    )


def _exact(rows: Rows) -> str:
    return "yes" if all(row["correct"] for row in rows) else "no"


def _measured(rows: Rows, case: str, *operations: str) -> list[dict[str, Any]]:
    return [
        row for row in rows
        if row["case"] == case and row["operation"] in operations and row["samples"]
    ]  # fmt: skip


def _switching(rows: Rows) -> str:
    mine = _measured(rows, "gpu_switch", "activate", "deactivate")
    if not mine:
        return ""
    columns = [
        ("activate", "device", "warm"), ("activate", "device", "cold"),
        ("deactivate", "device", "warm"), ("activate", "call", "warm"),
        ("deactivate", "call", "warm"),
    ]  # fmt: skip
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in mine):
        these = [row for row in mine if row["variant"] == variant]
        cells = [
            cell(find(these, operation=operation, clock=clock, caches=caches))
            for operation, clock, caches in columns
        ]
        lines.append([variant, *cells, _exact(these)])
    head = [
        "", "activate, device", "cold", "deactivate, device", "activate, whole call",
        "deactivate, whole call", "exact on the way back",
    ]  # fmt: skip
    return f"**Switching on a GPU**, {_model(mine[0])}:\n\n{grid(head, lines)}"


def _between(rows: Rows) -> str:
    mine = _measured(rows, "gpu_switch", "A to B")
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in mine):
        these = [row for row in mine if row["variant"] == variant]
        cells = [
            cell(find(these, patches=patches, clock=clock, caches=caches))
            for patches in ("disjoint", "overlapping")
            for clock, caches in (("device", "warm"), ("device", "cold"), ("call", "warm"))
        ]
        lines.append([variant, *cells, _exact(these)])
    if not lines:
        return ""
    head = ["", "disjoint, device", "cold", "whole call", "overlapping, device", "cold"]
    return f"**A to B on a GPU**:\n\n{grid([*head, 'whole call', 'exact'], lines)}"


def _loading(rows: Rows) -> str:
    lines = [
        [
            row["operation"], row["variant"], row["parameters"].get("clock", "until it is done"),
            cell(row), {True: "yes", False: "no", None: ""}[row["correct"]],
        ]
        for row in rows
        if row["case"] == "gpu_load" and row["samples"]
    ]  # fmt: skip
    head = ["", "what ran", "clock", "median", "exact"]
    return f"**Loading and merging on a GPU**:\n\n{grid(head, lines)}" if lines else ""


def _fastest_floor(rows: Rows) -> str:
    medians = [row["median"] for row in rows if row["variant"].startswith(FLOOR)]
    return time(min(medians)) if medians else "-"


def _densities(rows: Rows) -> str:
    mine = [
        row for row in _measured(rows, "gpu_density", "activate")
        if row["parameters"]["caches"] == "cold"
    ]  # fmt: skip
    others = [
        variant
        for variant in dict.fromkeys(row["variant"] for row in mine)
        if not variant.startswith(FLOOR)
    ]
    lines = []
    for density in sorted({row["parameters"]["density"] for row in mine}):
        these = [row for row in mine if row["parameters"]["density"] == density]
        cells = [cell(find(these, variant=variant)) for variant in others]
        entries = f"{these[0]['parameters']['entries']:,}"
        lines.append([f"{density:g}", entries, *cells, _fastest_floor(these)])
    if not lines:
        return ""
    said = [
        f"{row['variant']}: a dense copy is as fast at {row['median']:.2g}"
        if row["samples"]
        else f"{row['variant']}: {row['note']}"
        for row in rows
        if row["case"] == "gpu_density" and row["operation"] == "crossover"
    ]
    title = f"**By density on a GPU**, L2 emptied. Crossover: {'; '.join(said) or '-'}."
    return f"{title}\n\n{grid(['density', 'entries', *others, 'floor'], lines)}"


def _scale(rows: Rows) -> str:
    mine = _measured(rows, "gpu_scale", "activate")
    lines = []
    for row in mine:
        p = row["parameters"]
        if row["variant"].startswith("hotgraft") and p["clock"] == "device":
            same = [other for other in mine if other["parameters"] == p]
            lines.append(
                [
                    f"{p['shape']}, {p['layers']} layers", f"{p['model_parameters'] / 1e9:.3g} B",
                    f"{p['entries']:,}", row["variant"], p["caches"], cell(row),
                    _fastest_floor(same), cell(find(same, variant="torch index_copy_")),
                ]
            )  # fmt: skip
    if not lines:
        return ""
    head = ["shape", "parameters", "entries", "what ran", "caches", "activate", "floor"]
    title = "**One patch size on models of several sizes, on a GPU**, device time:"
    return f"{title}\n\n{grid([*head, 'torch index_copy_'], lines)}"


def _missing(rows: Rows) -> str:
    lines = [
        f"- {row['case']}, {row['operation']}, {row['variant']}: not measured: {row['note']}"
        for row in rows
        if not row["samples"] and row["operation"] != "crossover"
    ]
    return "\n".join(lines)
