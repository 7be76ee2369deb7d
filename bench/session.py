"""A run of the bench: its settings, and where its rows go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bench import rows
from bench.rows import Row
from bench.timing import Contender


@dataclasses.dataclass
class Session:
    """Where a case finds its settings and leaves its rows.

    Args:
        path: the file that rows are appended to.
        scratch: a folder for files that a case writes; it is removed afterwards.
        quick: whether to use tiny shapes and few samples, to see that everything works.
    """

    path: Path
    scratch: Path
    quick: bool = False
    console: Console = dataclasses.field(default_factory=lambda: Console(stderr=True))

    def pick(self, full: Any, quick: Any) -> Any:
        """One of two settings."""
        return quick if self.quick else full

    def add(self, found: Sequence[Row]) -> None:
        """Keep rows and show them."""
        rows.append(self.path, found)
        for row in found:
            ratio = f"{row.floor_ratio:6.2f}x floor" if row.floor_ratio is not None else " " * 12
            wrong = "" if row.correct in (None, True) else "  BITS DIFFER"
            measured = f"{row.median:14,.1f} {row.unit:6}" if row.samples else f"  {row.status}"
            self.console.print(
                f"{row.case:8} {row.operation:14} {row.variant:34} {_short(row.parameters):34} "
                f"{measured}{ratio}{wrong}",
                highlight=False,
                soft_wrap=True,
            )
            for target in row.targets:
                mark = "met " if target.met else "MISS"
                self.console.print(
                    f"    {mark} {target.what}: {target.measured:.4g} "
                    f"({'at least' if target.least else 'at most'} {target.limit:g})",
                    highlight=False,
                    soft_wrap=True,
                )


def make_rows(
    case: str,
    contenders: Iterable[Contender],
    parameters: dict[str, Any],
    moved: Callable[[Contender, str], int | None] = lambda _c, _s: None,
) -> list[Row]:
    """A row for every contender and step, with the ratio to the fastest floor of that step."""
    found = [
        Row(
            case, step, contender.name, contender.body, dict(parameters), samples,
            bytes=moved(contender, step), correct=contender.correct,
        )
        for contender in contenders
        for step, samples in contender.samples.items()
    ]  # fmt: skip
    for row in found:
        floors = [
            r.median
            for r in found
            if r.operation == row.operation and r.variant.startswith("floor")
        ]
        if floors:
            row.floor_ratio = round(row.median / min(floors), 3)
    return found


def ratio(found: Sequence[Row], operation: str, variant: str, over: str, of: str = "") -> float:
    """The median of one row over that of another, `of` being the other's operation if not the same.

    Where several variants begin with `over`, the fastest of them counts.
    """
    mine = [r.median for r in found if (r.operation, r.variant) == (operation, variant)]
    theirs = [
        r.median
        for r in found
        if r.operation == (of or operation) and r.variant.startswith(over) and r.samples
    ]
    return float(np.min(mine) / np.min(theirs))


def _short(parameters: dict[str, Any]) -> str:
    wanted = ("shape", "density", "caches", "clock", "policy", "changed")
    return " ".join(str(parameters[key]) for key in wanted if key in parameters)
