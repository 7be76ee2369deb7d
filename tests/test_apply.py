"""apply: a full copy of a checkpoint with grafts in it, whole or not at all."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import hotgraft
import pytest
import torch
from command import METADATA, SHARDS, Model, files, place, run, run_json, save_checkpoint
from hotgraft import checkpoint
from hotgraft.cli import app
from hotgraft.errors import BaseMismatchError, CoverageError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

__all__ = ["place"]  # a fixture: pytest finds it in this module by its name


def test_apply_writes_the_whole_checkpoint() -> None:
    found = run_json("apply", "base", "all.graft.safetensors", "-o", "out")
    base, tuned, out = files("base"), files("tuned"), files("out")
    assert out.keys() == base.keys()
    assert {name for name in base if base[name] != out[name]} == set(SHARDS)
    assert out["tokenizer.json"] == base["tokenizer.json"]
    for shard in SHARDS:
        tensors = 8 + int.from_bytes(base[shard][:8], "little")  # where the header ends
        assert out[shard][:tensors] == base[shard][:tensors]
        assert out[shard][tensors:] == tuned[shard][tensors:]
        with safe_open(f"out/{shard}", "pt") as file:
            assert file.metadata() == METADATA
    assert found["shards"] == list(SHARDS)
    assert found["left_out"] == []
    assert found["bytes"] == sum(map(len, out.values()))


def test_applied_equals_a_host_with_the_grafts_live() -> None:
    other = {k: v.clone() for k, v in Model(0).state_dict().items()}
    for tensor in other.values():
        tensor.view(-1)[::2] -= 0.5
    hotgraft.diff("base", other).save("other.graft.safetensors")
    options = ("--policy", "sum", "--weights", "1,-0.25")
    run("apply", "base", "all.graft.safetensors", "other.graft.safetensors", "-o", "out", *options)
    model = Model(0)
    host = hotgraft.attach(model)
    host.load("all.graft.safetensors")
    host.load("other.graft.safetensors")
    host.activate("all", "other", policy="sum", weights=[1, -0.25])
    assert hotgraft.fingerprint("out") == hotgraft.fingerprint(model)
    assert hotgraft.fingerprint("out") != hotgraft.fingerprint("base")


def test_apply_takes_a_single_file() -> None:
    save_file(Model(0).state_dict(), "one.safetensors")
    run("apply", "one.safetensors", "all.graft.safetensors", "-o", "out")
    assert files("out").keys() == {"one.safetensors"}
    assert hotgraft.fingerprint("out") == hotgraft.fingerprint("tuned")


def test_apply_maps_a_prefix(place: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in Model(0).state_dict().items()}
    save_checkpoint(state, place / "prefixed")
    run("apply", "prefixed", "all.graft.safetensors", "-o", "out")
    wanted = {f"model.{name}": t for name, t in load_file(f"tuned/{SHARDS[0]}").items()}
    for name, tensor in load_file(f"out/{SHARDS[0]}").items():
        assert torch.equal(tensor, wanted[name])


def test_apply_leaves_other_weights_behind_and_says_so() -> None:
    Path("base/pytorch_model.bin").write_text("old weights")
    Path("base/pytorch_model.bin.index.json").write_text("{}")
    Path("base/onnx").mkdir()
    Path("base/onnx/model.onnx").write_text("old weights")
    Path("base/.cache").mkdir()
    Path("base/.cache/lock").write_text("")
    Path("base/.gitattributes").write_text("kept")
    result = CliRunner().invoke(app, ["apply", "base", "all.graft.safetensors", "-o", "out"])
    assert "left out, because" in result.stderr
    assert files("out").keys() == {*files("tuned"), ".gitattributes"}
    found = run_json("apply", "base", "all.graft.safetensors", "-o", "again")
    assert found["left_out"] == [
        ".cache/", "onnx/model.onnx", "pytorch_model.bin", "pytorch_model.bin.index.json",
    ]  # fmt: skip


def test_apply_follows_links_to_files(place: Path) -> None:
    Path("blobs").mkdir()
    for name in (*SHARDS, "config.json"):
        Path("base", name).rename(Path("blobs", name))
        Path("base", name).symlink_to(place / "blobs" / name)
    before = files("blobs")
    run("apply", "base", "all.graft.safetensors", "-o", "out")
    assert hotgraft.fingerprint("out") == hotgraft.fingerprint("tuned")
    assert not any(path.is_symlink() for path in Path("out").iterdir())
    assert files("blobs") == before


def test_apply_refuses_a_folder_in_use() -> None:
    Path("out").mkdir()
    run("apply", "base", "all.graft.safetensors", "-o", "out")  # empty: welcome
    before = files("out")
    said = run("apply", "base", "few.graft.safetensors", "-o", "out", status=1)
    assert "out is there already" in said
    assert files("out") == before
    Path("file").write_text("mine")
    assert "is there already" in run(
        "apply", "base", "few.graft.safetensors", "-o", "file", status=1
    )
    with pytest.raises(FileNotFoundError, match="no such folder to write 'b' in"):
        checkpoint.apply("base", [hotgraft.Graft.load("few.graft.safetensors")], "a/b")


def test_apply_checks_the_base_before_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> str:
        raise AssertionError("it wrote")

    monkeypatch.setattr(checkpoint.tempfile, "mkdtemp", never)
    said = run("apply", "tuned", "few.graft.safetensors", "-o", "out", status=1)
    assert "7 of 7 entries differ" in said
    other = {"elsewhere": torch.zeros(3)}
    with pytest.raises(CoverageError, match="the base lacks"):
        checkpoint.check(hotgraft.Graft.load("few.graft.safetensors"), other)
    wider = {name: tensor.double() for name, tensor in Model(0).state_dict().items()}
    with pytest.raises(BaseMismatchError, match="another model or precision"):
        checkpoint.check(hotgraft.Graft.load("few.graft.safetensors"), wider)


def test_apply_refuses_what_is_not_finite() -> None:
    tuned = {name: tensor.clone() for name, tensor in Model(0).state_dict().items()}
    tuned["embed.weight"].view(-1)[4] = math.inf
    hotgraft.diff("base", tuned).save("inf.graft.safetensors")
    assert "NaN or infinity" in run("apply", "base", "inf.graft.safetensors", "-o", "out", status=1)
    run("apply", "base", "inf.graft.safetensors", "-o", "out", "--allow-nonfinite")
    assert load_file(f"out/{SHARDS[0]}")["embed.weight"].view(-1)[4] == math.inf


@pytest.mark.parametrize("failing", ["_write_entries", "_flush"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_apply_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, failing: str, failure: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise failure

    before = files(".")
    monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(type(failure)):
        checkpoint.apply("base", [hotgraft.Graft.load("few.graft.safetensors")], "out")
    assert files(".") == before
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))


def test_a_base_rewritten_meanwhile_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = checkpoint.check

    def then_rewrite(graft: hotgraft.Graft, base: Path) -> dict[str, str]:
        names = honest(graft, base)
        for shard in SHARDS:
            shutil.copyfile(f"tuned/{shard}", f"base/{shard}")
        return names

    monkeypatch.setattr(checkpoint, "check", then_rewrite)
    with pytest.raises(BaseMismatchError, match="changed while it was being copied"):
        checkpoint.apply("base", [hotgraft.Graft.load("few.graft.safetensors")], "out")
    assert not Path("out").exists()


def test_a_killed_apply_leaves_no_folder_under_its_name() -> None:
    script = (
        "import os, hotgraft\n"
        "from hotgraft import checkpoint\n"
        "checkpoint._flush = lambda path: os._exit(9)\n"
        "checkpoint.apply('base', [hotgraft.Graft.load('few.graft.safetensors')], 'out')\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert not Path("out").exists()
    run("apply", "base", "few.graft.safetensors", "-o", "out")  # what was left does not matter


def test_apply_reports_progress() -> None:
    seen: list[tuple[int, int]] = []
    checkpoint.apply(
        "base",
        [hotgraft.Graft.load("few.graft.safetensors")],
        "out",
        progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(map(len, files("out").values()))
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
