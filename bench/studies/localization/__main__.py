"""Command line: `python -m bench.studies.localization run`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.studies.localization import grid
from bench.studies.localization.rows import RESULTS, Rows

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


class Which(StrEnum):
    """Which grids to run."""

    CORE = "core"
    FULL = "full"


@app.callback()
def main() -> None:
    """Which few weights carry a skill, on real tasks."""


@app.command()
def run(
    work: Annotated[Path, typer.Option(help="Folder for fine-tuned weights and logits.")],
    which: Annotated[Which, typer.Option("--grid", help="How much.")] = Which.CORE,
    rows: Annotated[Path, typer.Option(help="File of the rows.")] = RESULTS / "rows.jsonl",
    threads: Annotated[int | None, typer.Option(help="Of torch.")] = None,
) -> None:
    """Measure what the file of rows lacks; it can be interrupted at any time."""
    from bench.studies.localization.lab import Lab
    from bench.studies.localization.run import run as run_grids

    if threads is not None:
        torch.set_num_threads(threads)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        grids = [grid.CORE] if which is Which.CORE else list(grid.FULL)
        run_grids(Lab(work, grid.Recipe()), Rows(rows), grids, progress)


if __name__ == "__main__":
    app()
