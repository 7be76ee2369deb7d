"""Command line: `python -m bench.studies.localization run|multitask|continual|trials|cost|page`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.studies.localization import grid
from bench.studies.localization.rows import RESULTS, Rows

if TYPE_CHECKING:
    from bench.studies.localization.lab import Lab

DOCS = Path(__file__).parents[3] / "docs"
app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


class Which(StrEnum):
    """Which grids to run."""

    CORE = "core"
    FULL = "full"


@app.callback()
def main(
    context: typer.Context,
    products: Annotated[
        grid.Products, typer.Option(help="What products are computed in.")
    ] = grid.Products.BFLOAT16,
) -> None:
    """Which few weights carry a skill, on real tasks."""
    context.obj = products


Work = Annotated[Path, typer.Option(help="Folder for fine-tuned weights and logits.")]
Results = Annotated[Path, typer.Option("--rows", help="File of the rows.")]
Threads = Annotated[int | None, typer.Option(help="Of torch.")]
ROWS = RESULTS / "rows.jsonl"


@app.command()
def run(
    context: typer.Context,
    work: Work,
    which: Annotated[Which, typer.Option("--grid", help="How much.")] = Which.CORE,
    rows: Results = ROWS,
    threads: Threads = None,
) -> None:
    """Measure what the file of rows lacks; it can be interrupted at any time."""
    from bench.studies.localization.run import run as run_grids

    grids = [grid.CORE] if which is Which.CORE else list(grid.FULL)
    with _measuring(threads) as progress:
        run_grids(_lab(context, work), Rows(rows), grids, progress)


@app.command()
def multitask(
    context: typer.Context, work: Work, rows: Results = ROWS, threads: Threads = None
) -> None:
    """The same for one model that learns several tasks: recovery, overlap, unions."""
    from bench.studies.localization import multitask as study

    with _measuring(threads) as progress:
        study.run(_lab(context, work), Rows(rows), progress)


@app.command()
def continual(
    context: typer.Context, work: Work, rows: Results = ROWS, threads: Threads = None
) -> None:
    """The same for one task after another, with the first one's region frozen or not."""
    from bench.studies.localization import continual as study

    with _measuring(threads) as progress:
        study.run(_lab(context, work), Rows(rows), progress)


@app.command()
def trials(
    context: typer.Context, work: Work, rows: Results = ROWS, threads: Threads = None
) -> None:
    """Measure whether other hyper-parameters, or another loss, keep more."""
    from bench.studies.localization import trials as study

    with _measuring(threads) as progress:
        study.run(_lab(context, work), Rows(rows), progress)


@app.command()
def cost(
    work: Work,
    rows: Results = ROWS,
    steps: Annotated[int, typer.Option(help="Batches that each arm reads.")] = 40,
) -> None:
    """Measure memory and time of a search beside fine-tuning and the paper's dense way."""
    from bench.studies.localization.cost import measure

    kept = Rows(rows)
    for row in measure(work, grid.CORE.cells[0], steps):
        kept.add(row)


@app.command()
def page(
    rows: Results = ROWS,
    text: Annotated[Path, typer.Option("--page", help="The page.")] = DOCS / "localization.md",
    images: Annotated[Path, typer.Option(help="Folder of the pictures.")] = DOCS / "images",
) -> None:
    """Draw the pictures, and write the tables between the page's markers."""
    from bench.studies.localization import page as pages
    from bench.studies.localization import plots

    found = Rows(rows).all
    pages.write(text, found, plots.draw(images, found))


def _lab(context: typer.Context, work: Path) -> Lab:
    from bench.studies.localization.lab import Lab  # slow to import

    return Lab(work, grid.Recipe(), products=context.obj)


@contextlib.contextmanager
def _measuring(threads: int | None) -> Iterator[Progress]:
    if threads is not None:
        torch.set_num_threads(threads)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn()) as progress:
        yield progress


if __name__ == "__main__":
    app()
