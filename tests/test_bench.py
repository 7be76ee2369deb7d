"""The bench runs from end to end on tiny shapes, and its tables come from its rows."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CASES = ["switch", "verbs", "scale", "overhead", "memory", "diff", "topk", "load", "merge"]


def bench(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    bench("run", *CASES, "--quick", "--results", folder)
    return folder


def lines(results: Path) -> list[dict[str, object]]:
    (path,) = results.glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_case_leaves_rows_with_samples(results: Path) -> None:
    environment, *rows = lines(results)
    assert environment["kind"] == "environment"
    assert {row["case"] for row in rows} == set(CASES)
    assert all(row["samples"] and row["body"] for row in rows)


def test_what_was_timed_left_the_right_bits(results: Path) -> None:
    checked = [row for row in lines(results)[1:] if row["correct"] is not None]
    assert [row for row in checked if not row["correct"]] == []
    assert {"switch", "verbs", "memory", "diff", "topk", "merge"} <= {r["case"] for r in checked}


def test_rows_name_no_host_and_no_path(results: Path) -> None:
    import socket

    (path,) = results.glob("*.jsonl")
    text = path.read_text()
    assert str(ROOT) not in text
    assert "/tmp" not in text
    assert f'"{socket.gethostname()}"' not in text


def test_tables_and_plots_come_from_the_rows(results: Path, tmp_path: Path) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    page.write_text("<!-- bench:begin -->\n<!-- bench:end -->\n")
    readme.write_text("before\n<!-- bench:begin -->\nold\n<!-- bench:end -->\nafter\n")
    bench("table", "--results", results, "--readme", readme, "--page", page)
    once = readme.read_text()
    assert once.startswith("before\n")
    assert once.endswith("after\n")
    assert "old\n" not in once
    assert "| hotgraft |" in once
    bench("table", "--results", results, "--readme", readme, "--page", page)
    assert readme.read_text() == once
    drawn = bench("plot", "--results", results, "--folder", tmp_path).split()
    assert all(Path(path).stat().st_size > 10_000 for path in drawn)
    assert len(drawn) == 2


def test_an_unknown_case_is_refused_by_name() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "run", "nothing"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "nothing" in done.stderr
    assert "switch" in done.stderr


def test_docstring_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    tried = 0
    for name in ("rows", "shapes", "tables"):
        result = doctest.testmod(importlib.import_module(f"bench.{name}"))
        assert result.failed == 0, name
        tried += result.attempted
    assert tried > 4
