"""Tables for docs/vllm.md, from the rows:

python bench/serving/tables.py bench/serving/results/DATE-patch.jsonl  # -overhead, -traffic
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Rows = list[dict[str, Any]]
PATCHING = {"vllm": 0, "load": 0, "switch": 2}
"""What was timed, and the digits of it that mean something."""
VARIANTS = ("plain", "installed", "live", "idle", "loaded")


def main() -> None:
    """Print all that there are rows for."""
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    cases = {row.get("case") for row in rows}
    for show, case in TABLES.items():
        if case in cases:
            print("\n".join(show(rows)), end="\n\n")


def patches(rows: Rows) -> Iterable[str]:
    """A patch: vLLM's own loader beside a switch."""
    decode = {row["parameters"]: median(row["samples_ms"]) for row in of(rows, "decode")}
    columns = ("vLLM's loader", "load", "switch", "times", "a decode step")
    yield from head("parameters", "density", "entries", *columns)
    for row in of(rows, "patch"):
        size = row["parameters"]
        times = {name: median(samples) for name, samples in row["samples_ms"].items()}
        cells = [f"{times[name]:.{digits}f} ms" for name, digits in PATCHING.items()]
        cells += [f"{times['vllm'] / times['switch']:.0f}", f"{decode[size]:.0f} ms"]
        yield line(f"{size / 1e6:.0f} M", row["density"], f"{row['entries']:,}", *cells)


def linears(rows: Rows) -> Iterable[str]:
    """The model's linears by themselves."""
    yield from head("type", "rows", "packed", "torch", "live", "torch / packed", "live / packed")
    for row in of(rows, "linears"):
        samples = row["samples_ms"]
        times = [f"{median(s):.1f} ms" for s in samples.values()]
        shares = [f"{ratio(samples[n], samples['packed']):.2f}" for n in ("torch", "live")]
        yield line(row["dtype"], row["rows"], *times, *shares)


def base(rows: Rows) -> Iterable[str]:
    """Base-model traffic, steps in pairs."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in of(rows, "base traffic"):
        found[row["dtype"], row["step"]][row["variant"]] += row["samples_ms"]
    shares = [f"{name} / plain" for name in VARIANTS[1:]]
    yield from head("type", "step", "plain", *shares, "idle / live", "loaded / live")
    for (dtype, what), each in found.items():
        cells = [f"{ratio(each[name], each['plain']):.3f}" for name in VARIANTS[1:]]
        cells += [f"{ratio(each[name], each['live']):.3f}" for name in VARIANTS[3:]]
        yield line(dtype, what, f"{median(each['plain']):.2f} ms", *cells)


def shuffled(rows: Rows) -> Iterable[str]:
    """Throughput over live skills and quanta, as shares of one skill's."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    switching: dict[tuple[int, int], Rows] = defaultdict(list)
    for row in of(rows, "shuffled"):
        found[row["skills"], row["quantum"]].append(row["tokens"] / row["seconds"])
        switching[row["skills"], row["quantum"]].append(row)
    counts = sorted({skills for skills, _ in found})
    quanta = sorted({quantum for skills, quantum in found if skills > 1})
    alone = median(rate for (skills, _), rates in found.items() for rate in rates if skills == 1)
    yield f"One skill: {alone:.0f} tokens/s"
    yield from head("live skills", *(f"quantum {quantum}" for quantum in quanta))
    for skills in counts[1:]:
        yield line(skills, *(f"{median(found[skills, q]) / alone:.2f}" for q in quanta))
    yield from head("live skills", *(f"switches, quantum {quantum}" for quantum in quanta))
    for skills in counts[1:]:
        yield line(skills, *(switches(switching[skills, q]) for q in quanta))


def bursts(rows: Rows) -> Iterable[str]:
    """Bursts, each beside the same traffic on one skill."""
    rates: dict[tuple[int, int], list[float]] = defaultdict(list)
    runs: dict[int, Rows] = defaultdict(list)
    for row in of(rows, "burst"):
        rates[row["burst"], row["skills"]].append(row["tokens"] / row["seconds"])
        if row["skills"] > 1:
            runs[row["burst"]].append(row)
    yield from head("requests in a burst", "one skill", "eight skills", "ratio", "switches")
    for burst, found in runs.items():
        one, eight = rates[burst, 1], rates[burst, 8]
        cells = (f"{median(one):.0f} tokens/s", f"{median(eight):.0f} tokens/s")
        yield line(burst, *cells, f"{ratio(eight, one):.2f}", switches(found))


def waits(rows: Rows) -> Iterable[str]:
    """Waits for a turn beside their bound."""
    yield from head("traffic", "quantum", "`max_wait`", "longest step", "p99", "longest", "bound")
    for row in rows:
        waited = sorted(row.get("waits_seconds", ()))
        if waited and row["skills"] == 8 and row["case"] != "burst":
            limit = f"{row['max_wait']} s" if row["case"] == "waits" else "none"
            times = max(row["steps_ms"]) / 1e3, percentile(waited, 99), waited[-1]
            cells = [f"{seconds:.2f} s" for seconds in (*times, row["bound_seconds"])]
            yield line(row["case"], row["quantum"], limit, *cells)


TABLES = {
    patches: "patch",
    linears: "linears",
    base: "base traffic",
    shuffled: "shuffled",
    bursts: "burst",
    waits: "waits",
}


def switches(runs: Rows) -> str:
    """How many a second, and their share of the time."""
    seconds = sum(row["seconds"] for row in runs)
    times = [ms for row in runs for ms in row["switches_ms"]]
    return f"{len(times) / seconds:.1f}/s, {sum(times) / 1e3 / seconds:.1%}"


def percentile(ascending: Sequence[float], share: int) -> float:
    """The smallest of these that so many in a hundred do not exceed."""
    return ascending[-(-len(ascending) * share // 100) - 1]


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """The median of the ratios, in pairs."""
    return median(x / y for x, y in zip(a, b, strict=True))


def of(rows: Rows, case: str) -> Rows:
    """The rows of a case."""
    return [row for row in rows if row.get("case") == case]


def head(*cells: str) -> Iterable[str]:
    """The first two lines of a table."""
    return line(*cells), "|" + "---:|" * len(cells)


def line(*cells: Any) -> str:
    """A line of a table."""
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
