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
    names: Annotated[list[str] | None, typer.Argument(help="Cases; all by default.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny shapes: see that everything works.")] = False,
    results: Annotated[Path | None, typer.Option(help="Folder for the rows.")] = None,
) -> None:
    """Measure, and append rows. Quick rows go to a temporary folder unless one is named."""
    from bench import cases, environment
    from bench.session import Session

    unknown = set(names or ()) - set(cases.CASES)
    if unknown:
        known = ", ".join(cases.CASES)
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}; known are {known}")
    folder = results or (Path(tempfile.mkdtemp()) if quick else rows.RESULTS)
    path = folder / environment.file_name()
    rows.start(path, environment.describe(quick))
    for name in names or cases.CASES:
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

    found = rows.read(rows.newest(results))
    tables.write(readme, *found, full=False)
    tables.write(page, *found)


@app.command()
def plot(
    results: Results = rows.RESULTS,
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("docs/images"),
) -> None:
    """Draw the newest rows."""
    from bench import plots

    for path in plots.draw(folder, *rows.read(rows.newest(results))):
        typer.echo(str(path))


if __name__ == "__main__":
    app()
