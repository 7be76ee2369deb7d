"""What a command prints: tables for people, JSON for programs, progress, a line for an error."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hotgraft.graft import Graft

WIDE = 120
"""Columns of a table that goes to a file or pipe."""


class Output:
    """One command's output. As a context manager it turns expected errors into one line and exit 1.

    With `as_json`, standard output holds one JSON value and nothing else, also after an error:
    `{"error": {"kind": ..., "message": ...}}`. Errors, notes and progress go to standard error.

    Example:
        >>> with Output(as_json=True) as output:
        ...     output.result({"entries": 3})
        {
          "entries": 3
        }
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = _console(sys.stdout)
        self._errors = _console(sys.stderr)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from hotgraft.errors import HotgraftError

        expected = isinstance(error, HotgraftError | OSError)
        if error is None or not expected or isinstance(error, BrokenPipeError):
            return
        self.note(f"error: {describe(error)}")
        if self.as_json:
            self.result({"error": {"kind": type(error).__name__, "message": describe(error)}})
        raise typer.Exit(1) from None

    def result(self, value: Any) -> None:
        """Print what the command found, where JSON was asked for."""
        if self.as_json:
            typer.echo(json.dumps(value, indent=2, allow_nan=False))

    def say(self, sentence: str) -> None:
        """Print a line for people: left out under `--json`."""
        if not self.as_json:
            self.console.print(_text(sentence), soft_wrap=True)

    def note(self, sentence: str) -> None:
        """Print a line to standard error."""
        self._errors.print(_text(" ".join(sentence.split())), soft_wrap=True)

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        title: str | None = None,
        words: int = 1,
    ) -> None:
        """Print a table for people; its first `words` columns are words, the others numbers."""
        if self.as_json:
            return
        if title is not None:
            self.console.print(_text(title, "bold"), soft_wrap=True)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(
                _text(column), justify="left" if i < words else "right", overflow="fold"
            )
        for row in rows:
            table.add_row(*map(_text, row))
        self.console.print(table)

    def facts(self, facts: dict[str, str]) -> None:
        """Print names and values for people, one a line."""
        if self.as_json:
            return
        width = max(map(len, facts))
        for name, value in facts.items():
            line = Text.assemble(_text(name.ljust(width), "dim"), "  ", _text(value))
            self.console.print(line, soft_wrap=True)

    @contextlib.contextmanager
    def bars(self) -> Iterator[Progress]:
        """Progress bars on standard error, gone when done, and not there without a terminal."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
        )
        with Progress(
            *columns,
            TimeRemainingColumn(),
            console=self._errors,
            transient=True,
            disable=not self._errors.is_terminal,
        ) as progress:
            yield progress

    @contextlib.contextmanager
    def bar(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """One progress bar, as the callback (done, total) that the library's functions take."""
        with self.bars() as progress:
            task = progress.add_task(printable(description), total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)


def _console(stream: Any) -> Console:
    """A console on a stream that writes a file as wide as its tables need."""
    return Console(file=stream, width=None if stream.isatty() else WIDE, highlight=False)


def printable(text: str) -> str:
    """Text in which a terminal finds nothing to obey: what cannot be printed is escaped.

    Example:
        >>> printable("é \\x1b[2J\\ud800") == "é " + r"\\x1b[2J\\ud800"
        True
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def _text(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


def describe(error: BaseException) -> str:
    """An error in one line.

    Example:
        >>> describe(FileNotFoundError(2, "No such file or directory", "a.graft.safetensors"))
        'a.graft.safetensors: No such file or directory'
    """
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def number(value: float) -> str:
    """A count for people.

    Example:
        >>> number(1064678)
        '1,064,678'
    """
    return f"{value:,}"


def size(nbytes: float) -> str:
    """A number of bytes for people.

    Example:
        >>> size(1310000)
        '1.31 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"


def percent(share: float) -> str:
    """A share for people.

    Example:
        >>> percent(0.0123), percent(0.000004)
        ('1.23 %', '0.0004 %')
    """
    return f"{100 * share:.3g} %" if share >= 1e-6 or share == 0 else f"{100 * share:.1g} %"


def say_saved(output: Output, graft: Graft, path: Path, **more: object) -> None:
    """Say what a command wrote: `diff`, `compose` and `localize` made a graft.

    Args:
        more: what a program is told besides.
    """
    nbytes = path.stat().st_size
    about = graft.provenance
    output.result(
        {
            "path": str(path),
            "bytes": nbytes,
            "id": graft.id,
            "entries": graft.nnz,
            "tensors": len(graft.names),
            "density": graft.density,
            "scope": about.scope,
            "eligible": about.eligible,
            "method": about.method,
            "base_id": about.base_id,
            **more,
        }
    )
    output.facts(
        {
            "wrote": f"{path} ({size(nbytes)})",
            "entries": f"{number(graft.nnz)} in {number(len(graft.names))} tensors",
            "density": f"{percent(graft.density)} of {number(about.eligible)} elements "
            f"(scope {about.scope})",
            "method": about.method,
            "id": graft.id,
            "base id": about.base_id or "not stored",
        }
    )
