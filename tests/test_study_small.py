"""The study, small: the real model, a real task, fewer steps and texts. Its order has to hold."""

from __future__ import annotations

from pathlib import Path

import hotgraft
import pytest
import torch
from safetensors.torch import load_file

from bench.studies.localization import grid
from bench.studies.localization.lab import Lab

RECIPE = grid.Recipe(steps=50, batch=16, texts=300, ood_texts=50, learned_steps=32)
CELL = grid.Cell("kind", "sgd", 0)
DENSITY = 1e-3


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    # Fast enough on any CPU: one without bf16 instructions takes five times as long for bf16.
    return Lab(tmp_path_factory.mktemp("work"), RECIPE, products=grid.Products.FLOAT32)


@pytest.fixture(scope="module")
def scores(lab: Lab) -> dict[str, dict[str, list[float]]]:
    """What each method's graft is worth on the test."""
    found = {"base": lab.scores(lab.logits(None, CELL.task, "test"), CELL, CELL.task, "test")}
    for method in ("learned", "magnitude", "random", "shuffled"):
        graft, _ = lab.localize(grid.Mask(CELL, method, DENSITY))
        assert graft.nnz == 10_646
        logits = lab.grafted(graft, CELL.task, "test")
        found[method] = lab.scores(logits, CELL, CELL.task, "test")
    assert hotgraft.fingerprint(lab.model) == lab.base_id
    return found


def test_finetuning_teaches(lab: Lab, scores: dict[str, dict[str, list[float]]]) -> None:
    tuned = lab.scores(lab.logits(CELL, CELL.task, "test"), CELL, CELL.task, "test")
    assert tuned["accuracy"][0] > scores["base"]["accuracy"][0] + 0.15


def test_learned_beats_magnitude_beats_random(scores: dict[str, dict[str, list[float]]]) -> None:
    nll = {method: found["nll"][0] for method, found in scores.items()}
    assert nll["learned"] < nll["magnitude"] < nll["random"], nll
    rel = {method: found["rel"][0] for method, found in scores.items()}
    assert rel["learned"] > rel["magnitude"] + 0.1, rel
    assert rel["learned"] > 0.5, rel


def test_controls_recover_nothing(scores: dict[str, dict[str, list[float]]]) -> None:
    for control in ("random", "shuffled"):
        assert abs(scores[control]["rel"][0]) < 0.1, (control, scores[control]["rel"])


def test_a_density_of_one_is_the_finetuned_model(lab: Lab) -> None:
    """Bit for bit in its logits; with nothing active, the base."""
    graft, _ = lab.localize(grid.Mask(CELL, "magnitude", 1.0))
    texts = lab.split(CELL.task, "test").head(64)
    readout = lab.readout(CELL.task)
    before = readout.logits(lab.model, texts)
    host = hotgraft.attach(lab.model)
    host.load(graft, name="all")
    with host.using("all"):
        grafted = readout.logits(lab.model, texts)
    after = readout.logits(lab.model, texts)
    host.detach()
    with lab.holding(load_file(lab.finetuned(CELL)[0])):
        finetuned = readout.logits(lab.model, texts)
    assert torch.equal(grafted, finetuned)
    assert torch.equal(before, after)
    assert not torch.equal(before, grafted)


def test_rows_are_resumed(lab: Lab, tmp_path: Path) -> None:
    from rich.progress import Progress

    from bench.studies.localization.rows import Rows
    from bench.studies.localization.run import run

    small = grid.Grid((CELL,), ("magnitude", "random"), (DENSITY,))
    path = tmp_path / "rows.jsonl"
    with Progress(disable=True) as progress:
        run(lab, Rows(path), [small._replace(methods=("magnitude",))], progress)
        first = path.read_text()
        run(lab, Rows(path), [small], progress)
    assert path.read_text().startswith(first)
    assert [row["method"] for row in Rows(path).all] == [
        "finetuned", "base", "magnitude", "random"
    ]  # fmt: skip
