"""The study's summaries, tables and pictures on made-up rows; all of it once, on a tiny model."""

from __future__ import annotations

import copy
import itertools
import math
import re
import sys
from pathlib import Path
from typing import Any

import hotgraft
import pytest
import tiny_task
import torch
from rich.progress import Progress
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the bench is not installed
from bench.studies.localization import (
    continual,
    grid,
    lab,
    multitask,
    page,
    plots,
    run,
    summary,
    tasks,
    trials,
)
from bench.studies.localization.rows import Rows

RECIPE = {
    "steps": 3, "batch": 2, "texts": 4000, "ood_texts": 10, "score_steps": 1, "learned_steps": 2
}  # fmt: skip
Row = dict[str, Any]


def scores(accuracy: float, rel: float = math.nan, **more: list[float]) -> Row:
    return {"accuracy": [accuracy, 0, 1], "rel": [rel, -math.inf, math.inf], **more}


def row(task: str, method: str, density: float | None = None, seed: int = 0, **more: Any) -> Row:
    found = {"task": task, "arm": "sgd", "seed": seed, "method": method, "density": density}
    return {**found, "recipe": RECIPE, "test": scores(0.5), **more}


def graft_row(seed: int, method: str, density: float, rel: float, task: str = "kind") -> Row:
    return row(task, method, density, seed, test=scores(0.5 + 0.4 * rel, rel))


def lines_of(text: str) -> dict[str, list[str]]:
    """A table's cells, by the first cell of its lines."""
    lines = [line[1:-1].split("|") for line in text.splitlines() if line.startswith("|")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


# ---- summaries ----------------------------------------------------------------------------------


def test_a_spread_leaves_out_what_is_not_finite() -> None:
    assert summary.spread([0.5, math.nan, math.inf, 0.25]) == (0.375, 0.25, 0.5, 2)
    assert summary.spread([math.nan]) is None
    assert summary.spread([]) is None


def test_the_ladder_is_paired_and_wants_all_of_its_methods() -> None:
    rels = {
        (0, 1e-3): (0.9, 0.5, 0.0),
        (1, 1e-3): (0.5, 0.5, 0.5),  # ties hold
        (2, 1e-3): (0.4, 0.5, 0.0),
        (0, 1e-2): (0.9, 0.1, 0.2),
    }
    rows = [
        graft_row(seed, method, density, rel)
        for (seed, density), cell in rels.items()
        for method, rel in zip(summary.LADDER, cell, strict=True)
    ]
    rows += [graft_row(0, "learned", 1e-4, 0.9), graft_row(0, "random", 1e-4, 0.0)]
    assert [(r.density, r.seed, r.steps) for r in summary.rungs(rows)] == [
        (1e-3, 0, (True, True)),
        (1e-3, 1, (True, True)),
        (1e-3, 2, (False, True)),
        (1e-2, 0, (True, False)),
    ]
    said = page.order(rows)
    assert "holds in SGD 2 of 4 cells, of those at 0.001 and below 2 of 3" in said
    assert "| SGD, kind | 0.001 | 2 of 3 | 3 of 3 | 2 of 3 |" in said
    assert "| SGD, kind | 0.01 | 1 of 1 | 0 of 1 | 0 of 1 |" in said
    assert page.order(rows[-2:]) == ""


@pytest.mark.parametrize(
    ("rels", "wanted"),
    [
        ({1e-4: 0.5, 1e-3: 0.96, 1e-2: 0.99}, 1e-3),
        ({1e-4: 0.97, 1e-3: 0.94, 1e-2: 0.99}, 1e-2),  # a lucky one below does not count
        ({1e-4: 0.97, 1e-3: 0.97, 1e-2: 0.94}, None),
        ({1e-3: math.nan}, None),
        ({}, None),
    ],
)
def test_the_smallest_density_that_carries_a_skill(
    rels: dict[float, float], wanted: float | None
) -> None:
    rows = [graft_row(0, "learned", density, rel) for density, rel in rels.items()]
    assert summary.smallest(rows, "sgd", "kind", "learned") == wanted
    assert summary.smallest(rows, "adamw", "kind", "learned") is None


def test_rows_of_two_recipes_are_refused() -> None:
    other = row("kind", "base") | {"recipe": RECIPE | {"steps": 4}}
    with pytest.raises(ValueError, match="two recipes: steps is 3 in some and 4 in others"):
        page.render([row("kind", "base"), other])
    older = row("kind", "base") | {"recipe": {k: v for k, v in RECIPE.items() if k != "batch"}}
    assert summary.check_recipe([older, row("kind", "base")]) == RECIPE


def test_the_page_says_what_products_were_computed_in() -> None:
    rows = [row("kind", "base"), row("kind", "base", products="float32")]
    assert "those of 1 of the 2 rows in fp32" in page.render(rows)


# ---- tables -------------------------------------------------------------------------------------


def test_recovery_shows_what_is_missing() -> None:
    rows = [graft_row(seed, "learned", 1e-3, rel) for seed, rel in enumerate((0.5, 0.75, 1.0))]
    rows += [graft_row(0, "random", 1e-3, 0.25), graft_row(0, "learned", 1e-2, math.nan)]
    rows += [graft_row(seed, "learned", 1e-2, 0.5, "section") for seed in (0, 1)]
    rows.append({**graft_row(0, "learned", 1e-2, 9.0), "on": "kind"})  # not of the grid
    assert lines_of(page.recovery(rows)) == {
        "": ["0.001", "0.01"],
        "---": ["---:", "---:"],
        "section, learned": ["-", "0.50 (0.50 to 0.50, 2 seeds)"],
        "kind, learned": ["0.75 (0.50 to 1.00)", "-"],
        "kind, random": ["0.25 (1 seed)", "-"],
    }
    arms = [{**found, "arm": "adamw"} for found in rows[:1]]
    assert "(Rel), AdamW**" in page.recovery(rows + arms)


def test_calibration_says_how_sure_it_is() -> None:
    changes = ([-0.06, -0.08, -0.04], [-0.02, -0.05, 0.01], [-0.04, -0.05, -0.03])
    rows = [
        row("kind", "learned", 1e-3, seed, test=scores(
            0.8, ece10=[0.1 + change[0], 0, 1], ece10_change=change,
            nll_change=[-0.5, -1, 0], brier_change=[0.25, 0, 1],
        ))
        for seed, change in enumerate(changes)
    ]  # fmt: skip
    rows += [row("kind", "finetuned", None, s, test=scores(0.9, ece10=[0.1, 0, 1])) for s in (0, 1)]
    assert lines_of(page.calibration(rows))["SGD, kind"] == [
        "0.001", "-", "0.100", "0.060", "-0.040 [-0.080, +0.010]", "-40 %", "2, 0 of 3",
        "-0.500", "+0.250",
    ]  # fmt: skip


def test_out_of_domain_is_the_other_test() -> None:
    rows = [row("kind", "learned", 1e-3, seed, ood=scores(0.25)) for seed in (0, 1, 2)]
    rows.append(row("kind", "finetuned", None, ood=scores(0.75)))
    cells = ["-", "0.75 (1 seed)", "0.25 (0.25 to 0.25)"]
    assert lines_of(page.out_of_domain(rows))["SGD, kind"] == cells


def test_times_are_compared() -> None:
    rows = [row("kind", "finetuned", None, s, seconds=x) for s, x in enumerate((100, 300, None))]
    rows += [row("kind", "learned", d, 0, seconds=x) for d, x in ((1e-3, 90), (1e-2, 110))]
    rows.append(row("section", "learned", 1e-3, 0, seconds=5))
    found = lines_of(page.times(rows))
    assert found["SGD, kind, learned"] == ["200", "100", "0.50"]
    assert found["SGD, section, learned"] == ["-", "5", "-"]


JOINT = "language+kind"


def several_rows() -> list[Row]:
    rels = {("language", "language"): 0.9, ("kind", "kind"): 0.7, ("language", "kind"): 0.1}
    rows = [
        row(JOINT, "learned", 1e-2, seed, of=of, on=on, entries=10, test=scores(0.5, rel))
        for (of, on), rel in rels.items()
        for seed in (0, 1, 2)
    ]
    rows += [
        row(JOINT, "learned", 1e-2, 0, of=JOINT, on=on, entries=18, test=scores(0.5, rel))
        for on, rel in (("language", 0.75), ("kind", 0.25))
    ]
    rows.append(row(JOINT, "finetuned", None, on="kind", test=scores(0.8, 1.0)))
    rows.append({
        **row(JOINT, "overlap", 1e-2), "tasks": ["language", "kind"], "eligible": 1000,
        "counts": [[10, 2], [2, 10]], "share": [[1, 0.2], [0.2, 1]],
        "chance": [[0.1, 0.1], [0.1, 0.1]], "similarity": [[1, 0.19], [0.19, math.nan]],
    })  # fmt: skip
    return rows


def test_several_tasks() -> None:
    rows = several_rows()
    said = page.several(rows)
    assert "mean on the diagonal 0.80, off it 0.10" in said
    assert lines_of(said)["language"] == ["0.90 (0.90 to 0.90)", "0.10 (0.10 to 0.10)"]
    assert lines_of(said)["kind"] == ["-", "0.70 (0.70 to 0.70)"]
    cells = ["unrelated", "0.01", "0.20 (1 seed)", "1.0e-02", "0.19 (1 seed)"]
    assert lines_of(page.overlaps(rows))["language, kind"] == cells
    cells = ["0.01", "18", "0.75 (1 seed); 0.25 (1 seed)", "0.50"]
    assert lines_of(page.unions(rows))["language, kind"] == cells


def test_related_pairs_come_first() -> None:
    names = ["language", "kind", "library"]
    ones = [[1.0] * 3] * 3
    rows = [{
        **row("+".join(names), "overlap", 1e-2), "tasks": names, "counts": ones, "share": ones,
        "chance": ones, "similarity": ones,
    }]  # fmt: skip
    found = list(lines_of(page.overlaps(rows)).items())[2:]
    assert [(pair, cells[0]) for pair, cells in found] == [
        ("kind, library", "related"),
        ("language, kind", "unrelated"),
        ("language, library", "unrelated"),
    ]


def continual_rows() -> list[Row]:
    found = {
        ("whole, before", None): ((0.9, 0.8), (0.2, 0.2)),
        ("whole, free", None): ((0.6, 0.6), (0.9, 0.9)),
        ("graft, before", 1e-2): ((0.85, 0.75), (0.2, 0.2)),
        ("graft, protected", 1e-2): ((0.8, 0.75), (0.85, 0.85)),
        ("graft, free", 1e-3): ((0.5, 0.5), (0.9, 0.9)),
    }
    return [
        row("kind>language", method, density, seed, on=on, test=scores(accuracies[seed], 0.5))
        for (method, density), of in found.items()
        for on, accuracies in zip(("kind", "language"), of, strict=True)
        for seed in (0, 1)
    ]


def test_what_a_second_task_costs_the_first() -> None:
    said = page.one_after_another(continual_rows())
    lines = [line[1:-1].split("|") for line in said.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    found = {(line[0], line[1]): line[2:] for line in cells}
    both = ", 2 seeds)"
    assert found["whole, free", ""] == [
        "0.60 (0.60 to 0.60" + both, "25.0 (20.0 to 30.0" + both,
        "0.90 (0.90 to 0.90" + both, "0.50 (0.50 to 0.50" + both,
    ]  # fmt: skip
    assert found["graft, protected", "0.01"][1] == "2.5 (0.0 to 5.0" + both
    assert found["graft, free", "0.001"][1] == "-"  # what it started from is not there
    assert found["graft, grafts", "0.01"] == ["-", "-", "-", "-"]
    assert "kind, then language" in said


def everything() -> list[Row]:
    rows = several_rows() + continual_rows()
    ece = {f"{what}_change": [0.0, -1.0, 1.0] for what in ("ece10", "nll", "brier")}
    for arm, task, seed in itertools.product(("sgd", "adamw"), ("kind", "section"), (0, 1, 2)):
        rows.append(row(task, "finetuned", None, seed, seconds=9, ood=scores(0.5)) | {"arm": arm})
        for method, density in itertools.product(summary.LADDER, (1e-3, 1e-2)):
            test = scores(0.5, 0.5, ece10=[0.1, 0, 1], **ece)
            rows.append(row(task, method, density, seed, seconds=3, test=test) | {"arm": arm})
    rows.append({
        "method": "cost", "arm": "learned", "batch_seconds": 1.0, "growth": 2**30,
        "beyond_passes": 2**24, "base_nbytes": 2**26,
    })  # fmt: skip
    return rows


def test_a_page_is_written_between_its_markers(tmp_path: Path) -> None:
    text = tmp_path / "docs" / "page.md"
    text.parent.mkdir()
    text.write_text(f"before\n{page.BEGIN}\nstale text\n{page.END}\nafter\n")
    drawn = plots.draw(tmp_path / "docs" / "images", everything())
    page.write(text, everything(), drawn)
    first = text.read_text()
    assert first.startswith(f"before\n{page.BEGIN}\n")
    assert first.endswith(f"\n{page.END}\nafter\n")
    assert "stale text" not in first
    assert {path.name for path in drawn} == {
        f"study-{name}.png"
        for name in ("recovery", "calibration", "arms", "multitask", "overlap", "continual")
    }
    linked = re.findall(r"!\[.+?\]\((.+?)\)", first)
    assert sorted(linked) == sorted(f"images/{path.name}" for path in drawn)
    assert "Memory and time" in first
    assert "| learned | 1.00 | 1,024 | 16 | 0.25 |" in first
    page.write(text, everything(), drawn)
    assert text.read_text() == first


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        page.BEGIN,
        f"{page.END}\n{page.BEGIN}",
        f"{page.BEGIN}\n{page.END}\n{page.BEGIN}\n{page.END}",
    ],
)
def test_a_page_without_its_markers_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md needs the lines"):
        page.write(path, [])
    assert path.read_text() == text


def test_nothing_is_shown_of_nothing(tmp_path: Path) -> None:
    assert page.render([]) == "Nothing is measured yet."
    assert plots.draw(tmp_path, []) == []


@pytest.mark.parametrize("count", range(0, 60, 7))
def test_some_rows_are_enough(count: int, tmp_path: Path) -> None:
    rows = everything()[count : count + 7]
    plots.draw(tmp_path, rows)
    page.render(rows)


# ---- all of it, on a tiny model -----------------------------------------------------------------

TINY = grid.Recipe(
    steps=4, joint_steps=2, batch=4, texts=40, ood_texts=20, score_steps=2, learned_steps=2
)  # fmt: skip
PAIR = ("kind", "library")
DENSITY = 0.02


def measure(there: lab.Lab, path: Path) -> list[Row]:
    with Progress(disable=True) as progress:
        run.run(
            there,
            Rows(path),
            [grid.Grid((grid.Cell("kind", "sgd", 0),), ("learned", "random"), (DENSITY,))],
            progress,
        )
        once: dict[str, Any] = {"seeds": (0,), "densities": (DENSITY,)}
        multitask.run(there, Rows(path), progress, tasks=PAIR, unions=(PAIR,), **once)
        continual.run(there, Rows(path), progress, pairs=(PAIR,), **once)
        few = trials.TRIALS[0], trials.Trial("other", {"steps": 3}, distilled=True)
        trials.run(there, Rows(path), progress, names=("kind",), trials=few, density=DENSITY)
    return Rows(path).all


def tiny_lab(work: Path) -> lab.Lab:
    return lab.Lab(work, TINY, (tiny_task.model(), tiny_task.tokenizer()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def measured(place: Path) -> list[Row]:
    return measure(tiny_lab(place / "work"), place / "rows.jsonl")


def test_the_whole_study_runs(measured: list[Row], place: Path) -> None:
    joint = summary.select(measured, task="kind+library", arm="sgd")
    on = [(r["method"], r.get("of"), r.get("on")) for r in joint]
    assert on == [
        ("finetuned", None, "kind"), ("finetuned", None, "library"), ("overlap", None, None),
        ("learned", "kind", "kind"), ("learned", "kind", "library"),
        ("learned", "library", "kind"), ("learned", "library", "library"),
        ("learned", "kind+library", "kind"), ("learned", "kind+library", "library"),
    ]  # fmt: skip
    shared = summary.select(joint, method="overlap")[0]
    union = summary.select(joint, of="kind+library")[0]
    counts = shared["counts"]
    assert union["entries"] == counts[0][0] + counts[1][1] - counts[0][1]
    one_after_another = summary.select(measured, task="kind>library")
    assert len(one_after_another) == 2 * len(list(continual.ways((DENSITY,))))
    one, other = summary.select(measured, method="trial")
    assert (one["trial"], other["trial"], one["of"]) == ("as in the study", "other", "kind")
    assert one["texts"] == len(tasks.load("kind").test.texts) - TINY.texts
    assert one["nll"]["finetuned"] == other["nll"]["finetuned"] != one["nll"]["base"]
    shown = page.render(measured)
    assert "kind, then library" in shown
    assert "| kind, other |" in shown
    plots.draw(place / "images", measured)


def test_it_goes_on_where_it_ended(measured: list[Row], place: Path) -> None:
    """Every row is taken away once, and comes back with the same scores; no model is made anew."""
    path = place / "rows.jsonl"
    whole = path.read_text()
    files = {f: f.stat().st_mtime_ns for f in (place / "work").iterdir()}
    there = tiny_lab(place / "work")
    measure(there, path)
    assert path.read_text() == whole
    part = place / "part.jsonl"
    part.write_text("".join(line + "\n" for line in whole.splitlines()[::2]))
    found = measure(there, part)
    assert hotgraft.fingerprint(there.model) == there.base_id
    assert {f: f.stat().st_mtime_ns for f in (place / "work").iterdir()} == files

    def plain(rows: list[Row]) -> list[str]:
        volatile = ("at", "seconds")
        return sorted(repr({k: v for k, v in r.items() if k not in volatile}) for r in rows)

    assert plain(found) == plain(measured)


def test_a_readout_is_the_bases_also_when_logits_are_all_that_lacks(
    measured: list[Row], place: Path, tmp_path: Path
) -> None:
    cell = grid.Cell("kind", "sgd", 0)
    assert measured
    first, other = tiny_lab(place / "work"), tiny_lab(tmp_path)
    for name in (place / "work").glob("kind-sgd-0-4.safetensors"):
        (tmp_path / name.name).write_bytes(name.read_bytes())
    assert torch.equal(other.logits(cell, "kind", "test"), first.logits(cell, "kind", "test"))


def test_tasks_learnt_at_once_take_turns(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, seen = tiny_lab(place / "turns"), []
    finetune = lab.train.finetune

    def watched(model: Any, loss: Any, batches: Any, optimizer: Any, **more: Any) -> list[float]:
        seen.extend(task for task, _ in batches)
        return finetune(model, loss, batches, optimizer, **more)

    monkeypatch.setattr(lab.train, "finetune", watched)
    there.finetuned(grid.Cell("kind+library", "sgd", 0))
    assert seen == ["kind", "library"] * TINY.joint_steps


def test_a_protected_region_holds_the_graft(measured: list[Row], place: Path) -> None:
    assert measured
    there = tiny_lab(place / "work")
    first, second = (grid.Cell(task, "sgd", 0) for task in PAIR)
    graft, _ = there.localize(grid.Mask(first, "learned", DENSITY))
    base = dict(there.model.state_dict())

    def model(start: str, then: str) -> dict[str, torch.Tensor]:
        way = continual.Way(start, then, DENSITY)
        return dict(continual._weights(there, first, second, way))

    def kept(weights: dict[str, torch.Tensor]) -> bool:
        return all(
            torch.equal(weights[n].view(-1)[graft[n].indices], graft[n].new) for n in graft.names
        )

    assert kept(model("graft", "protected"))
    assert kept(model("whole", "protected"))
    assert kept(model("graft", "grafts"))
    assert not kept(model("graft", "free"))

    start, both = (
        {n: w != base[n] for n, w in model("graft", then).items()} for then in ("before", "grafts")
    )
    assert sum(int(moved.sum()) for moved in start.values()) <= graft.nnz
    moved = sum(int(m.sum()) for m in both.values())
    assert graft.nnz < moved <= 2 * graft.nnz
    elsewhere = model("graft", "protected")
    assert sum(int((w != base[n]).sum()) for n, w in elsewhere.items()) > 2 * graft.nnz


def test_a_graft_goes_only_where_its_old_bits_are(measured: list[Row], place: Path) -> None:
    assert measured
    there = tiny_lab(place / "work")
    cell = grid.Cell("kind", "sgd", 0)
    graft, _ = there.localize(grid.Mask(cell, "learned", DENSITY))
    other = copy.deepcopy(load_file(there.finetuned(cell)[0]))
    with pytest.raises(AssertionError):
        continual.grafted(there, graft, other)
