"""The demo: its orchestration on a tiny encoder, its messages, and once for real."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hotgraft
import pytest
import torch
from hotgraft.cli import app
from hotgraft.console import Output
from hotgraft.demo import model as demo_model
from hotgraft.demo import run, search, skills, timing, train
from hotgraft.demo.task import TASKS, Task
from hotgraft.errors import DataError, HotgraftError
from hotgraft.search import Learned
from hotgraft.tasks import Prototypes, Split
from safetensors.torch import save_file
from typer.testing import CliRunner

WORDS = ["game", "font", "mail", "chess", "glyph", "letter", "play", "type", "send", "a"]


def tokenizer(texts: list[str], **_: object) -> dict[str, torch.Tensor]:
    """Words as numbers, padded with 0."""
    ids = [[1 + WORDS.index(word) for word in text.split()] for text in texts]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    return {"input_ids": padded, "attention_mask": (padded > 0).long()}


class TinyEncoder(torch.nn.Module):
    """Named as a transformers encoder is: `embeddings`, `encoder.layer.<n>`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = torch.nn.Embedding(len(WORDS) + 1, 16)
        self.encoder = torch.nn.Module()
        self.encoder.layer = torch.nn.ModuleList([torch.nn.Linear(16, 16) for _ in range(2)])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        hidden = self.embeddings(input_ids) * attention_mask.unsqueeze(-1)
        for layer in self.encoder.layer:
            hidden = hidden + torch.tanh(layer(hidden))
        return SimpleNamespace(last_hidden_state=hidden)


def tiny_task(name: str) -> Task:
    """Three classes; a class's texts hold its word. The second task turns the classes round."""
    names = ("game", "font", "mail")
    turn = TASKS.index(name)
    texts = [f"a {word}" + " a" * (i % 3) for i in range(20) for word in ("play", "type", "send")]
    labels = torch.tensor([(i + turn) % 3 for i in range(len(texts))])
    split = Split(tuple(texts), labels, tuple(map(str, range(len(texts)))))
    return Task(name, "What is it?", names, names, split, split)


@pytest.fixture
def tiny(one_thread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: ARG001
    """The demo with a tiny encoder; the folder of its checkpoint."""
    pytest.importorskip("matplotlib")
    folder = tmp_path / "tiny"
    folder.mkdir()
    save_file(TinyEncoder().state_dict(), folder / "model.safetensors")
    monkeypatch.setattr(run, "NEEDED", ())
    monkeypatch.setattr(run, "find_model", lambda _: folder)
    monkeypatch.setattr(run, "load_task", tiny_task)
    monkeypatch.setattr(run, "_load_quietly", lambda _: (TinyEncoder().eval(), tokenizer))
    monkeypatch.setattr(demo_model, "load_model", lambda _: (TinyEncoder().eval(), tokenizer))
    monkeypatch.setattr(skills, "CHOICE", 20)
    monkeypatch.setattr(search, "DENSITIES", (2e-3, 0.3))
    monkeypatch.setattr(search, "METHOD", Learned(steps=5))
    monkeypatch.setattr(train, "finetune", functools.partial(train.finetune, steps=60))
    return folder


def trained(tmp_path: Path, *, as_json: bool = True, texts: int = 30) -> dict[str, Any]:
    return run.demo(
        Output(as_json), train=True, model_folder=None, out=tmp_path / "out", texts=texts
    )


@pytest.mark.usefixtures("tiny")
def test_a_fine_tuning_that_gains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "accuracy", lambda *_: 0.5)
    with pytest.raises(DataError, match=r"right in 50.0% and the base in 50.0%, so there is no"):
        trained(tmp_path, as_json=False)


def test_the_whole_demo_on_a_tiny_encoder(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained(tmp_path)
    printed = capsys.readouterr().out
    assert json.loads(printed) == found
    assert found["parameters"] == sum(p.numel() for p in TinyEncoder().parameters())
    accuracy = found["accuracy"]
    for name in TASKS:
        assert accuracy[name][name] > accuracy["base"][name] + 0.3  # the skill is learnt
        assert accuracy[f"finetuned on {name}"][name] > accuracy["base"][name] + 0.3
        graft = hotgraft.Graft.load(tmp_path / "out" / "skills" / f"{name}.graft.safetensors")
        assert found["skills"][name]["id"] == graft.id
        assert graft.provenance.scope == "encoder"
        assert graft.provenance.method == "learned"
        kept = skills.read_results(tmp_path / "out" / "skills")[name]["kept_by_density"]
        *too_few, last = kept.items()
        assert graft.density == pytest.approx(float(last[0]), rel=0.5)
        assert all(part < search.KEPT for _, part in too_few)
        assert last[1] >= search.KEPT or last[0] == "0.3"
        assert graft.provenance.base_id == hotgraft.fingerprint(tiny)
    prints = found["proof"]["fingerprints"]
    assert len({prints["base"], *(prints[name] for name in TASKS)}) == 3
    assert prints["base"] == prints["after"] == prints["after timing"]
    assert prints["base"] == hotgraft.fingerprint(TinyEncoder())
    assert found["proof"]["same_as_by_hand"] is True
    assert Path(found["plot"]).read_bytes().startswith(b"\x89PNG")
    times = found["seconds"]
    assert all(seconds > 0 for seconds in times["hotgraft"].values())
    assert times["load a checkpoint"]["activate"] is None


@pytest.mark.usefixtures("tiny")
def test_the_tables_show_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained(tmp_path, as_json=False)
    said = capsys.readouterr().out
    for name in TASKS:
        assert f"base + graft {name!r}" in said
        assert f"{100 * found['accuracy'][name][name]:.1f} %" in said
    assert "the same as before" in said
    assert "not shipped" not in said  # measured in this very run
    assert found["proof"]["fingerprints"]["base"][:32] in said


@pytest.mark.usefixtures("tiny")
def test_shipped_skills_are_labelled_as_measured_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trained(tmp_path)
    monkeypatch.setattr(skills, "shipped", lambda: tmp_path / "out" / "skills")
    out = tmp_path / "second"
    capsys.readouterr()
    again = run.demo(Output(False), train=False, model_folder=None, out=out, texts=30)
    assert again["accuracy"] == before["accuracy"]
    assert "measured when the skills were made" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["demo.png"]


@pytest.mark.usefixtures("tiny")
def test_weights_that_do_not_come_back_fail_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(self: hotgraft.Host) -> None:
        with torch.no_grad():
            self._model.embeddings.weight[0] += 1  # type: ignore[union-attr, operator]

    trained(tmp_path)
    monkeypatch.setattr(skills, "shipped", lambda: tmp_path / "out" / "skills")
    monkeypatch.setattr(hotgraft.Host, "detach", careless)
    with pytest.raises(HotgraftError, match="not what they should be"):
        run.demo(Output(True), train=False, model_folder=None, out=tmp_path / "again", texts=30)


def test_by_hand_puts_back_what_was_there() -> None:
    model = TinyEncoder()
    tuned = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    by_hand = timing.PlainTorch(model, {"a": hotgraft.diff(model, tuned)})
    by_hand.activate("a")
    assert hotgraft.fingerprint(by_hand.model) == hotgraft.fingerprint(tuned)
    by_hand.deactivate()
    assert hotgraft.fingerprint(by_hand.model) == hotgraft.fingerprint(model)


def test_answers_are_kept_text_by_text() -> None:
    task = tiny_task("section")
    readout = Prototypes.from_base(TinyEncoder(), tokenizer, task.names)
    answers = skills.correct(TinyEncoder(), readout, task.test)
    assert re.fullmatch("[01]{60}", answers)
    assert skills.share(answers, 1000) == answers.count("1") / 60


# ---- what it says when something is missing -----------------------------------------------------


def refused(*args: str) -> str:
    result = CliRunner().invoke(app, ["demo", *args])
    assert result.exit_code == 1, result.output + str(result.exception)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "NEEDED", ("transformers_of_nowhere", "matplotlib_of_nowhere"))
    said = refused()
    assert "transformers_of_nowhere and matplotlib_of_nowhere" in said
    assert 'pip install "hotgraft[demo]"' in said


def test_a_folder_without_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "NEEDED", ())
    assert "model.safetensors" in refused("--model", str(tmp_path))
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert "wanted" in refused("--model", str(tmp_path))
    assert not (tmp_path / "hotgraft-demo").exists()


def test_skills_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skills, "RESULTS", "nowhere.json")
    with pytest.raises(HotgraftError, match="--train"):
        skills.shipped()
    with pytest.raises(HotgraftError, match=r"nowhere\.json: cannot be read"):
        skills.read_results(tmp_path)


def test_too_few_texts() -> None:
    assert CliRunner().invoke(app, ["demo", "--texts", "3"]).exit_code == 2


# ---- for real -----------------------------------------------------------------------------------


def test_the_real_demo_ends_within_a_minute(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("hotgraft")
    done = subprocess.run(
        [str(script), "demo", "--json"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["took"] < 60
    assert found["proof"]["came_back"] is True
    assert found["parameters"] == 22_713_216
    for name in TASKS:
        accuracy = found["accuracy"]
        gain = accuracy[f"finetuned on {name}"][name] - accuracy["base"][name]
        assert gain > 0.2
        assert found["skills"]["model"]["bytes"] > 100 * found["skills"][name]["bytes"]
        # On 300 texts a part of the gain has a standard error of 0.1.
        assert accuracy[name][name] > accuracy["base"][name] + 0.8 * gain
    assert [found["skills"][name]["entries"] for name in TASKS] == [21_293, 2_129]
    switch = {way: times["switch"] for way, times in found["seconds"].items()}
    assert switch["hotgraft"] < switch["load a checkpoint"]
    assert (tmp_path / "hotgraft-demo" / "demo.png").is_file()
