"""Rows: one JSON line for each fine-tuned model and each graft, kept as soon as it is measured."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import environment

_KEPT = ("cpu", "cores", "python", "packages", "threads", "commit")
RESULTS = Path(__file__).with_name("results")


@functools.cache
def _environment() -> dict[str, Any]:
    found = environment.describe(quick=False)
    return {part: found[part] for part in _KEPT}


class Rows:
    """The rows of a file, by what was measured.

    Args:
        path: made when the first row comes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.all: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row whose fields are these."""
        return next((r for r in self.all if all(r.get(f) == v for f, v in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, on disk too, with when and where it was measured."""
        row = {
            **row,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "environment": _environment(),
        }
        self.all.append(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
