"""Command line: `python -m bench run | table | plot`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bench import rows

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
Results = Annotated[Path, typer.Option(help="Folder of the row files.")]


@app.command()
def run(
    names: Annotated[
        list[str] | None, typer.Argument(help="Cases; by default all that can run here.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Tiny shapes: see that everything works.")] = False,
    results: Annotated[Path | None, typer.Option(help="Folder for the rows.")] = None,
) -> None:
    """Measure, and append rows. Quick rows go to a temporary folder unless one is named."""
    from bench import cases, environment
    from bench.gpu import environment as gpu_environment
    from bench.gpu.lab import Lab
    from bench.session import Session

    known = {**cases.CASES, **cases.ON_GPU}
    unknown = set(names or ()) - set(known)
    if unknown:
        raise typer.BadParameter(
            f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(known)}"
        )
    chosen = names or [*cases.CASES, *(cases.ON_GPU if Lab.why_not() is None else ())]
    folder = results or (Path(tempfile.mkdtemp()) if quick else rows.RESULTS)
    for there, about in ((cases.CASES, environment), (cases.ON_GPU, gpu_environment)):
        mine = [name for name in chosen if name in there]
        if not mine:
            continue
        path = folder / about.file_name()
        rows.start(path, about.describe(quick))
        for name in mine:
            with tempfile.TemporaryDirectory() as scratch:
                cases.named(name)(Session(path, Path(scratch), quick))
        typer.echo(f"rows in {path}")


@app.command()
def table(
    results: Results = rows.RESULTS,
    readme: Annotated[Path, typer.Option(help="Gets the tables on switching.")] = Path("README.md"),
    page: Annotated[Path, typer.Option(help="Gets them all.")] = Path("docs/benchmarks.md"),
) -> None:
    """Render the tables of the newest rows between two pages' markers."""
    from bench import tables
    from bench.gpu import tables as gpu_tables

    found = rows.read(rows.newest(results))
    on_gpu = rows.newest_gpu(results)
    there = rows.read(on_gpu) if on_gpu else ({}, [])
    tables.write(readme, *found, full=False, more=gpu_tables.render(*there, full=False))
    tables.write(page, *found, more=gpu_tables.render(*there))


@app.command()
def plot(
    results: Results = rows.RESULTS,
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("docs/images"),
) -> None:
    """Draw the newest rows."""
    from bench import plots
    from bench.gpu import plots as gpu_plots

    drawn = plots.draw(folder, *rows.read(rows.newest(results)))
    on_gpu = rows.newest_gpu(results)
    if on_gpu:
        drawn += gpu_plots.draw(folder, *rows.read(on_gpu))
    for path in drawn:
        typer.echo(str(path))


@app.command()
def gpu(folder: Annotated[Path, typer.Argument(help="Of row files; gets the rest too.")]) -> None:
    """Render the tables and draw the pictures of the newest rows from a GPU, beside them."""
    from bench.gpu import plots, tables

    path = rows.newest_gpu(folder)
    if path is None:
        raise typer.BadParameter("there are no rows from a GPU in that folder")
    found = rows.read(path)
    text = tables.render(*found)
    (folder / "gpu.md").write_text(text + "\n")
    typer.echo(text)
    for picture in plots.draw(folder, *found):
        typer.echo(picture.name)


if __name__ == "__main__":
    app()
