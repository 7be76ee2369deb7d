"""Rows: what was measured, kept as JSON lines.

A file holds the runs of one machine on one day. A run is an environment line and the rows after it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).with_name("results")
GPU_MARK = "-gpu-"
"""In the names of files from GPUs."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A number that was asked for, and what was measured.

    Example:
        >>> Target("times the floor", 1.1, 1.2).met, Target("times faster", 9, 10, least=True).met
        (True, False)
    """

    what: str
    measured: float
    limit: float
    least: bool = False
    """Whether the limit is the least that was asked for, rather than the most."""

    @property
    def met(self) -> bool:
        """Whether the measurement keeps to the limit."""
        return self.measured >= self.limit if self.least else self.measured <= self.limit


@dataclasses.dataclass
class Row:
    """One variant of one operation: every sample, and what they come to."""

    case: str
    operation: str
    variant: str
    """What one would run."""
    body: str
    """What ran: backend, instruction set, threads."""
    parameters: dict[str, Any]
    samples: list[float]
    unit: str = "us"
    bytes: int | None = None
    """Bytes that the operation has to move, from counts and item sizes."""
    correct: bool | None = None
    """Whether the bits were right afterwards; None where nothing is written."""
    floor_ratio: float | None = None
    """The median over the fastest floor's, in the same run."""
    targets: list[Target] = dataclasses.field(default_factory=list)
    note: str = ""

    @property
    def status(self) -> str:
        """`measured`, or `not measured` where there are no samples: the note says why.

        Example:
            >>> Row("switch", "activate", "hotgraft", "cuda", {}, []).status
            'not measured'
        """
        return "measured" if self.samples else "not measured"

    @property
    def median(self) -> float:
        """The median sample."""
        return float(np.median(self.samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        """Between these lies the middle half of the samples."""
        low, high = np.percentile(self.samples, [25, 75])
        return float(low), float(high)

    def line(self) -> dict[str, Any]:
        """The row for the file."""
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["status"] = self.status
        fields["samples"] = [_short(sample) for sample in self.samples]
        fields["median"] = _short(self.median) if self.samples else None
        fields["quartiles"] = [_short(q) for q in self.quartiles] if self.samples else None
        fields["targets"] = [dict(vars(t), met=t.met) for t in self.targets]
        return {"kind": "row", **fields}


def _short(number: float) -> float:
    """To two decimals, or three digits where that is more."""
    return round(number, 2) if abs(number) >= 1 else float(f"{number:.3g}")


def start(path: Path, environment: dict[str, Any]) -> None:
    """Begin a run in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _append(path, [{"kind": "environment", **environment}])


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to the run that was begun last."""
    _append(path, [row.line() for row in rows])


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def newest(folder: Path = RESULTS) -> Path:
    """The file of the latest date, of those from CPUs.

    Raises:
        FileNotFoundError: there is none.
    """
    files = [path for path in sorted(folder.glob("*.jsonl")) if GPU_MARK not in path.name]
    if not files:
        raise FileNotFoundError(f"no rows in {folder.name}/: run `python -m bench run` first")
    return files[-1]


def newest_gpu(folder: Path = RESULTS) -> Path | None:
    """The file of the latest date, of those from GPUs. One without a GPU comes last.

    Example:
        >>> newest_gpu(Path("/nowhere")) is None
        True
    """
    files = sorted(
        folder.glob(f"*{GPU_MARK}*.jsonl"), key=lambda path: ("none" not in path.name, path.name)
    )
    return files[-1] if files else None


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The environment of the last run, and the rows; of a case run again, only the last run's.

    Raises:
        ValueError: the file does not begin with an environment.
    """
    environment: dict[str, Any] = {}
    cases: dict[str, tuple[int, list[dict[str, Any]]]] = {}
    for run, line in _runs(path):
        if line["kind"] == "environment":
            environment = line
            continue
        if not run:
            raise ValueError(f"{path.name}: a row comes before any environment")
        if cases.get(line["case"], (0, []))[0] != run:
            cases[line["case"]] = (run, [])
        cases[line["case"]][1].append(line)
    return environment, [row for _, rows in cases.values() for row in rows]


def _runs(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    run = 0
    with path.open() as file:
        for text in file:
            line = json.loads(text)
            run += line["kind"] == "environment"
            yield run, line
