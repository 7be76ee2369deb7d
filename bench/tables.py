"""The README's tables, rendered from rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

Rows = Sequence[dict[str, Any]]


def write(
    page: Path, environment: dict[str, Any], rows: Rows, full: bool = True, more: str = ""
) -> None:
    """Replace what stands between a page's markers, by all tables or by those on switching.

    `more` comes after them.

    Raises:
        ValueError: the file does not have both markers, once and in order.
    """
    text = page.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{page.name} needs the lines {BEGIN} and {END}, once each")
    text = "\n\n".join(part for part in (render(environment, rows, full), more) if part)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def render(environment: dict[str, Any], rows: Rows, full: bool = True) -> str:
    """All the tables there are rows for, or those on switching."""
    sections = [_switching(rows), _by_size(rows)]
    if full:
        sections += [_others(rows), targets(rows)]
    return "\n\n".join([_machine(environment), *(s for s in sections if s)])


def time(us: float) -> str:
    """A time with its unit, to three digits.

    Example:
        >>> time(412.34), time(2534.0), time(10_300_000)
        ('412 us', '2.53 ms', '10.3 s')
    """
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{_digits(us / size)} {unit}"
    return f"{_digits(us)} us"


def amount(value: float, unit: str) -> str:
    """A median with its unit."""
    if unit == "us":
        return time(value)
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{_digits(value / size)} {name}"
    return f"{value:.0f} {unit}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def grid(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table, its first column to the left and the others to the right."""
    head = list(head)
    every = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in every)


def _machine(environment: dict[str, Any]) -> str:
    packages = environment["packages"]
    return (
        f"{environment['cpu']}, {environment['cores']} cores, {environment['memory_gib']:.0f} GiB; "
        f"torch {packages['torch']}, numpy {packages['numpy']}, Python {environment['python']}; "
        f"{environment['date']}, commit {environment['commit']}. Medians; every sample is in "
        "`bench/results/`."
    )


def find(rows: Rows, **wanted: Any) -> dict[str, Any] | None:
    """The first row with these fields or parameters."""
    for row in rows:
        fields = {**row["parameters"], **row}
        if all(fields.get(key) == value for key, value in wanted.items()):
            return row
    return None


def cell(row: dict[str, Any] | None) -> str:
    """A row's median, if there is one."""
    if row is None:
        return "-"
    return amount(row["median"], row["unit"]) if row["samples"] else "not measured"


def _switching(rows: Rows) -> str:
    mine = [row for row in rows if row["case"] in ("switch", "peft")]
    if not mine:
        return ""
    sparsest = min(row["parameters"]["density"] for row in mine if row["case"] == "switch")
    chosen = [row for row in mine if row["parameters"].get("density") in (sparsest, None)]
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in chosen):
        case = "peft" if variant.startswith("peft") else "switch"
        these = [row for row in chosen if (row["case"], row["variant"]) == (case, variant)]
        cells = [
            cell(find(these, operation=operation, caches=caches))
            for operation, caches in (
                ("activate", "warm"),
                ("activate", "cold"),
                ("A to B", "warm"),
                ("deactivate", "warm"),
            )
        ]
        exact = "yes" if all(row["correct"] for row in these) else "no"
        note = next((row["note"] for row in these if row["note"]), "")
        lines.append([variant, *cells, f"{exact}: {note}" if note else exact])
    one = next(row for row in chosen if row["case"] == "switch")["parameters"]
    title = (
        f"**Switching**, {one['model_parameters'] / 1e9:.3g} B bf16 parameters in {one['tensors']} "
        f"tensors, density {one['density']:g} ({one['entries']:,} entries):"
    )
    head = ["", "activate", "caches evicted", "A to B", "deactivate", "exact on the way back"]
    return f"{title}\n\n{grid(head, lines)}"


def _by_size(rows: Rows) -> str:
    mine = [
        row
        for row in rows
        if row["case"] in ("switch", "scale")
        and (row["operation"], row["variant"]) == ("activate", "hotgraft")
    ]
    lines = []
    for row in mine:
        p = row["parameters"]
        same = [
            r for r in rows
            if (r["case"], r["operation"], r["parameters"]) == (row["case"], "activate", p)
        ]  # fmt: skip
        floor = min(r["median"] for r in same if r["variant"].startswith("floor"))
        copy = find(same, variant="torch index_copy_")
        lines.append(
            [
                f"{p['model_parameters'] / 1e9:.3g} B", f"{p['density']:.2g}", f"{p['entries']:,}",
                p["caches"], time(row["median"]), time(floor), f"{row['floor_ratio']:.2f}",
                cell(copy),
            ]
        )  # fmt: skip
    if not lines:
        return ""
    head = ["parameters", "density", "entries", "caches", "hotgraft", "floor", "ratio"]
    title = "**activate** by density and model size, beside the fastest plain C loop (the floor):"
    return f"{title}\n\n{grid([*head, 'torch index_copy_'], lines)}"


def _others(rows: Rows) -> str:
    lines = [
        [
            f"{row['case']}: {row['operation']}",
            row["variant"],
            ", ".join(
                f"{row['parameters'][key]}"
                for key in ("shape", "density", "changed", "caches")
                if key in row["parameters"]
            ),
            cell(row),
            f"{row['floor_ratio']:.2f}" if row["floor_ratio"] else "",
        ]
        for row in rows
        if row["case"] not in ("switch", "scale", "peft")
    ]
    if not lines:
        return ""
    head = ["", "what ran", "on", "median", "over the floor"]
    return f"**Everything else**:\n\n{grid(head, lines)}"


def targets(rows: Rows) -> str:
    """What was asked for, and what was measured; empty where nothing was asked."""
    lines = []
    for row in rows:
        p = row["parameters"]
        told = ("shape", "density", "changed", "patches", "caches", "clock")
        on = ", ".join(str(p[key]) for key in told if key in p)
        for target in row["targets"]:
            sign = "at least" if target["least"] else "at most"
            lines.append(
                [
                    f"{row['case']}: {row['operation']}", on, target["what"],
                    f"{target['measured']:.4g}", f"{sign} {target['limit']:g}",
                    "yes" if target["met"] else "**no**",
                ]
            )  # fmt: skip
    if not lines:
        return ""
    met = sum(line[-1] == "yes" for line in lines)
    head = ["", "on", "what", "measured", "asked", "met"]
    return f"**Targets**, {met} of {len(lines)} met:\n\n{grid(head, lines)}"
