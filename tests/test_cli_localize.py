"""`hotgraft localize`: graft and scores, every method, bad use, what is broken off."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import hotgraft
import pytest
import tiny_task
import torch
from command import files, run, run_json
from hotgraft import console, tasks
from hotgraft.cli import app
from hotgraft.search import METHODS, Learned
from rich.console import Console
from transformers import AutoModel
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")


OUT = "out.graft.safetensors"
QUICK = ("localize", "task.toml", "-o", OUT, "--steps", "30")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_task.write(tmp_path_factory.mktemp("made")).parent


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: base, tuned, texts and task.toml."""
    place = tmp_path / "task"
    shutil.copytree(made, place)
    monkeypatch.chdir(place)
    return place


def spoil(old: str, new: str) -> None:
    text = Path("task.toml").read_text()
    assert old in text
    Path("task.toml").write_text(text.replace(old, new))


# ---- what it writes and says ---------------------------------------------------------------------


def test_it_writes_what_the_library_finds() -> None:
    found = run_json(*QUICK, "--density", "0.05", "--seed", "3")
    task = tasks.open_task(tasks.read_task("task.toml"))
    expected = hotgraft.localize(
        task.base,
        task.finetuned,
        task.readout.loss,
        task.readout.batches(task.train, 8),
        density=0.05,
        method=Learned(steps=30),
        seed=3,
    )
    graft = hotgraft.Graft.load(OUT)
    assert graft == expected
    eligible = sum(p.numel() for p in task.base.encoder.layer.parameters())
    assert found == {
        "path": OUT,
        "bytes": Path(OUT).stat().st_size,
        "id": expected.id,
        "entries": int(0.05 * eligible),
        "tensors": len(expected.names),
        "density": graft.density,
        "scope": "encoder",
        "eligible": eligible,
        "method": "learned",
        "base_id": hotgraft.fingerprint("base"),
    }
    assert graft.provenance.base_id == found["base_id"]
    run("verify", OUT, "--base", "base", "--base-id")


def test_it_says_what_it_wrote() -> None:
    said = run(*QUICK, "--count", "50", "--scope", "linear")
    graft = hotgraft.Graft.load(OUT)
    assert graft.nnz == 50
    assert graft.id in said
    assert re.search(r"entries +50 in \d+ tensors", said)
    assert re.search(r"of 4,096 elements \(scope linear\)", said)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_budget(method: str) -> None:
    spoil("batch = 8", "batch = 48")
    args = () if method in ("magnitude", "random") else ("--steps", "1")
    args = (*args, "--method", method, "--count", "33")
    assert run_json("localize", "task.toml", "-o", OUT, *args)["method"] == method
    graft = hotgraft.Graft.load(OUT)
    assert (graft.nnz, graft.provenance.method) == (33, method)


def answers(path: str, graft: hotgraft.Graft | None = None) -> torch.Tensor:
    """The logits of the test texts, from nothing that the command has loaded."""
    base, model = (AutoModel.from_pretrained(name).eval() for name in ("base", path))
    names = tuple(tiny_task.CLASSES.values())
    readout = tasks.Prototypes.from_base(base, tiny_task.tokenizer(), names)
    if graft is not None:
        state = model.state_dict()
        for name in graft.names:
            state[name].view(-1)[graft[name].indices] = graft[name].new
    return readout.logits(model, tiny_task.split(36))


def test_it_evaluates_base_graft_and_finetuned() -> None:
    found = run_json(*QUICK, "--density", "0.3", "--evaluate")["evaluation"]
    logits = {
        "base": answers("base"),
        "graft": answers("base", hotgraft.Graft.load(OUT)),
        "fine-tuned": answers("tuned"),
    }
    assert list(found) == list(logits)
    for name, own in logits.items():
        expected = hotgraft.evaluate(
            own,
            tiny_task.split(36).labels,
            base=logits["base"],
            finetuned=logits["fine-tuned"],
        )
        for score in ("accuracy", "f1", "rel", "agreement", "ece10", "ece15", "nll", "brier"):
            value, low, high = getattr(expected, score)
            assert found[name][score] == pytest.approx({"value": value, "low": low, "high": high})
    assert found["base"]["accuracy"]["value"] < found["graft"]["accuracy"]["value"]
    assert found["graft"]["rel"]["value"] > 0.5


def test_the_whole_scope_is_the_finetuned_model() -> None:
    found = run_json(*QUICK, "--density", "1", "--evaluate")["evaluation"]
    assert found["graft"] == found["fine-tuned"]
    assert found["graft"]["rel"]["value"] == found["graft"]["agreement"]["value"] == 1


def test_scores_are_shown_as_a_table() -> None:
    said = run(*QUICK, "--density", "0.3", "--evaluate")
    assert "36 test texts" in said
    assert re.search(r"accuracy +0\.\d{3} \(0\.\d{3} to \d\.\d{3}\)", said)
    for title in ("base", "graft", "fine-tuned", "F1", "Rel", "agreement", "ECE10", "NLL"):
        assert title in said


def test_scores_without_bounds_are_null_and_said_to_be() -> None:
    shutil.rmtree("tuned")
    shutil.copytree("base", "tuned")
    head = tiny_task.model()  # one change that no answer depends on
    with torch.no_grad():
        head.encoder.layer[0].output.dense.bias[3] += 1e-6
    head.save_pretrained("tuned")
    args = ("localize", "task.toml", "-o", OUT, "--method", "magnitude", "--count", "1")
    rel = run_json(*args, "--evaluate")["evaluation"]["graft"]["rel"]
    assert rel == {"value": None, "low": None, "high": None}
    assert re.search(r"Rel +not known +not known +not known", run(*args, "--evaluate", "--force"))


def test_a_head_is_localized_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "head").mkdir()
    monkeypatch.chdir(tmp_path / "head")
    tiny_task.write(Path(), "head")
    found = run_json(*QUICK, "--density", "0.3", "--evaluate")
    assert hotgraft.Graft.load(OUT).names[0].startswith("bert.encoder.layer.0.")
    assert found["evaluation"]["fine-tuned"]["accuracy"]["value"] == 1
    assert found["evaluation"]["graft"]["rel"]["value"] > 0.3


def test_a_bar_shows_budget_loss_and_recovery(monkeypatch: pytest.MonkeyPatch) -> None:
    def terminal(stream: Any) -> Console:
        return Console(file=stream, force_terminal=True, width=120)

    monkeypatch.setattr(console, "_console", terminal)
    result = CliRunner().invoke(app, [*QUICK, "--count", "1000"])
    assert result.exit_code == 0
    assert re.search(r"learned: 1,000 entries, loss \d\.\d{3}, recovery -?\d+ %", result.stderr)


def test_the_example_of_the_docs_runs_as_it_stands() -> None:
    page = (Path(__file__).parents[1] / "docs" / "localization.md").read_text()
    (file,), (rows,), (command,) = (
        re.findall(rf"^```{kind}\n(.*?)^```", page, re.M | re.S)
        for kind in ("toml", "json", "bash")
    )
    name = file.splitlines()[0].removeprefix("# ")
    Path(name).write_text(file)
    Path("base").rename("minilm")
    Path("tuned").rename("minilm-section")
    for data in ("train.jsonl", "test.jsonl"):
        Path(data).write_text(rows)
    program, *args = command.split()
    assert program == "hotgraft"
    said = run(*args, "--steps", "20")
    assert "3 test texts" in said
    assert tasks.read_task(name).classes.keys() == tiny_task.CLASSES.keys()
    assert hotgraft.Graft.load("section.graft.safetensors").nnz == 4
    defaults = tasks.read_task(name)
    words = ("text =", "label =", "max_tokens", "batch", "temperature")
    kept = [line for line in file.splitlines() if not line.startswith(words)]
    Path(name).write_text("\n".join(kept))
    assert tasks.read_task(name) == defaults  # the page says that these are the defaults


# ---- bad use and refusals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("--density", "0.1", "--count", "3"), "not both"),
        (("--density", "0"), "not in (0, 1]"),
        (("--density", "nan"), "not in (0, 1]"),
        (("--count", "0"), "--count"),
        (("--count", "5000"), "5000 is more than the 4448 eligible elements"),
        (("--method", "magic"), "'magic' is not one of magnitude, random, first_order"),
        (("--method", "magnitude"), "magnitude takes no steps"),
        (("--scope", "heads"), "'heads' is not one of all, encoder, linear"),
        (("--seed", "-1"), "--seed"),
        (("--steps", "0"), "--steps"),
        (("--method", "snip", "--checkpoint", "c"), "snip keeps none"),
        (("--checkpoint", "no/c"), "there is no folder no"),
        (("--checkpoint", ""), "it is empty"),
        (("-o", "x.safetensors"), "does not end in .graft.safetensors"),
        (("-o", "no/x.graft.safetensors"), "there is no folder no"),
        (("-o", "base/x.graft.safetensors"), "would write into base"),
        (("-o", "d.graft.safetensors"), "d.graft.safetensors is a folder"),
        (("-o", "there.graft.safetensors"), "is there; --force replaces it"),
    ],
)
def test_bad_use_is_refused(folder: Path, args: tuple[str, ...], complaint: str) -> None:
    Path("d.graft.safetensors").mkdir()
    Path("there.graft.safetensors").write_bytes(b"mine")
    before = files(folder)
    said = " ".join(run(*QUICK, *args, status=2).replace("│", " ").split())
    assert complaint in said
    assert files(folder) == before


def test_a_missing_task_and_one_without_a_test_are_bad_use() -> None:
    assert "does not exist" in run("localize", "no.toml", "-o", OUT, status=2)
    assert "is a directory" in run("localize", "base", "-o", OUT, status=2)
    spoil('test = "test.jsonl"\n', "")
    assert "names no test texts" in run(*QUICK, "--count", "9", "--evaluate", status=2)
    assert run_json(*QUICK, "--count", "9")["entries"] == 9


def test_force_replaces_a_graft() -> None:
    Path(OUT).write_bytes(b"an older one")
    run(*QUICK, "--count", "9", "--force")
    assert hotgraft.Graft.load(OUT).nnz == 9


@pytest.mark.parametrize(
    ("old", "new", "kind", "complaint"),
    [
        ("batch = 8", "bach = 8", "FormatError", "line 8: data.bach is unknown"),
        ('"tuned"', '"tooned"', "FormatError", "line 3: model.finetuned is"),
        ('"train.jsonl"', '"task.toml"', "DataError", "wanted a file that ends in"),
        ("games =", "play =", "DataError", "train.jsonl, line 1: the label 'games' has no class"),
        ('"tuned"', '"base"', "GraftError", "nothing to graft"),
    ],
)
def test_what_a_task_cannot_be_is_one_line_and_status_1(
    folder: Path, old: str, new: str, kind: str, complaint: str
) -> None:
    spoil(old, new)
    before = files(folder)
    said = run(*QUICK, "--density", "0.1", status=1)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert complaint in said
    error = run_json(*QUICK, "--density", "0.1", status=1)["error"]
    assert error["kind"] == kind
    assert complaint in error["message"]
    assert files(folder) == before


def test_a_density_that_leaves_nothing_is_refused(folder: Path) -> None:
    before = files(folder)
    assert "rounds to 0 entries" in run("localize", "task.toml", "-o", OUT, status=1)
    assert files(folder) == before


def test_scoring_without_torchmetrics_is_refused_before_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    said = run(*QUICK, "--count", "9", "--evaluate", status=1)
    assert 'pip install "hotgraft[localize]"' in said
    assert not Path(OUT).exists()


# ---- broken off ----------------------------------------------------------------------------------


class Breaking:
    """A loss that raises when it has been asked often enough."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int) -> None:
        self._left, self._error = after, error
        real = tasks.Prototypes.loss

        def loss(readout: tasks.Prototypes, model: Any, batch: tasks.Batch) -> torch.Tensor:
            self._left -= 1
            if self._left == 0:
                raise self._error
            return real(readout, model, batch)

        monkeypatch.setattr(tasks.Prototypes, "loss", loss)


def test_a_search_that_is_broken_off_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Breaking(monkeypatch, KeyboardInterrupt(), 20)
    before = files(folder)
    result = CliRunner().invoke(app, [*QUICK, "--count", "50"])
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert files(folder) == before


def test_the_same_command_goes_on_from_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*QUICK, "--count", "50", "--steps", "60"]
    run(*command)
    whole = hotgraft.Graft.load(OUT)
    Path(OUT).unlink()
    with monkeypatch.context() as patched:
        Breaking(patched, KeyboardInterrupt(), 50)
        result = CliRunner().invoke(app, [*command, "--checkpoint", "search.safetensors"])
    assert result.exit_code == 130
    assert "the same command goes on from search.safetensors" in result.stderr
    assert not Path(OUT).exists()
    run(*command, "--checkpoint", "search.safetensors")
    assert hotgraft.Graft.load(OUT) == whole


def test_a_graft_that_cannot_be_written_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(OUT).write_bytes(b"an older one")
    before = files(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", OUT)

    monkeypatch.setattr("hotgraft.files.os.replace", full)
    said = run(*QUICK, "--count", "50", "--force", status=1)
    assert said == f"error: {OUT}: No space left on device\n"
    assert files(folder) == before
