"""Checkpoints of the learned mask: going on where it stopped, and files that are something else."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import searching
import torch
from hosts import contents, holds
from hotgraft import Graft, diff, localize
from hotgraft.errors import DataError, FormatError
from hotgraft.search import Learned, Step
from hotgraft.search.learned import SAVE_EVERY
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from searching import batches, loss, pair

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 2 * SAVE_EVERY + 10
DATA = batches(7)


class StopError(Exception):
    """Somebody pulled the plug."""


def search(path: Path | None, stop: int | None = None, **how: Any) -> Graft:
    """A search, broken off in a step if wanted. The model must come back as it was."""
    model, base, tuned, _ = pair()
    steps = how.pop("steps", STEPS)

    def progress(step: Step) -> None:
        if step.step == stop:
            raise StopError

    given = {"count": 12, "scope": "all", "method": Learned(steps=steps), "seed": 3, **how}
    data = given.pop("data", DATA)
    used = given.pop("loss", loss)
    tuned = given.pop("tuned", tuned)
    try:
        return localize(model, tuned, used, data, checkpoint=path, progress=progress, **given)
    finally:
        assert holds(model, base)


def half_way(path: Path, **how: Any) -> bytes:
    """A checkpoint of a search that stopped a little after its second save."""
    with pytest.raises(StopError):
        search(path, 2 * SAVE_EVERY + 3, **how)
    return path.read_bytes()


# ---- going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, SAVE_EVERY, SAVE_EVERY + 1, 2 * SAVE_EVERY + 9, STEPS])
@pytest.mark.parametrize("kind", ["list", "stream"])
def test_it_goes_on_bit_for_bit(stop: int, kind: str, tmp_path: Path) -> None:
    class Stream:
        def __iter__(self) -> Any:
            return iter(DATA)

    data: Any = DATA if kind == "list" else Stream()
    told: list[float] = []

    def watched(model: Any, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            told.append(float(batch[0].sum()))
        return loss(model, batch)

    whole = search(None, data=data, loss=watched)
    uninterrupted = list(told)
    told.clear()
    path = tmp_path / "search"
    with pytest.raises(StopError):
        search(path, stop, data=data, loss=watched)
    assert told == uninterrupted[:stop]
    saved = (stop - 1) // SAVE_EVERY * SAVE_EVERY  # a step is saved once its progress was told
    assert path.exists()  # also before the first step
    told.clear()
    assert search(path, data=data, loss=watched) == whole
    assert told == uninterrupted[saved:]


def test_scores_and_progress_go_on_bit_for_bit(tmp_path: Path) -> None:
    def run(path: Path | None) -> tuple[list[Step], Any]:
        told: list[Step] = []
        model, _, tuned, _ = pair()
        how: Any = {"count": 12, "scope": "all", "method": Learned(steps=STEPS)}
        graft = localize(model, tuned, loss, DATA, checkpoint=path, progress=told.append, **how)
        return told, graft

    path = tmp_path / "search"
    with pytest.raises(StopError):
        search(path, SAVE_EVERY + 4, seed=0)
    rest, graft = run(path)
    told, whole = run(None)
    assert graft == whole
    assert rest == told[SAVE_EVERY:]
    stopped = load_file(path)
    path.unlink()
    run(path)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, stopped[name]), name


def test_a_search_that_is_done_is_done(tmp_path: Path) -> None:
    path = tmp_path / "search"
    whole = search(path)
    before = path.read_bytes()

    steps: list[torch.Tensor] = []

    def counted(model: Any, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            steps.append(batch)
        return loss(model, batch)

    assert search(path, loss=counted) == whole
    assert not steps
    assert path.read_bytes() == before


def test_another_loss_does_not_go_on_from_it(tmp_path: Path) -> None:
    """Two tasks of one model have the same candidates: only the losses tell them apart."""
    path = tmp_path / "search"
    search(path)

    def other(model: Any, batch: Any) -> torch.Tensor:
        return loss(model, (batch[0], batch[1].roll(1, 0)))

    for how in ({"loss": other}, {"data": batches(7, seed=9)}):
        with pytest.raises(DataError, match="another search: the loss of the base"):
            search(path, **how)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors["scores"][:-1],
        lambda tensors: tensors["scores"].double(),
        lambda tensors: tensors["scores"] * float("nan"),
        lambda tensors: {"numbers": tensors["numbers"][:2]},
        lambda tensors: {"numbers": tensors["numbers"].index_fill(0, torch.tensor(0), -5.0)},
        lambda tensors: {"numbers": tensors["numbers"].index_fill(0, torch.tensor(0), 1e3)},
        lambda tensors: {"numbers": tensors["numbers"].index_fill(0, torch.tensor(0), 2.5)},
        lambda tensors: {"numbers": tensors["numbers"] * float("nan")},
    ],
)
def test_a_damaged_body_is_found(spoil: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "search"
    search(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    spoilt = spoil(tensors)
    spoilt = spoilt if isinstance(spoilt, dict) else {"scores": spoilt}
    save_file({**tensors, **spoilt}, path, metadata)
    with pytest.raises(FormatError, match="a damaged checkpoint"):
        search(path)


def test_an_iterator_has_to_begin_anew(tmp_path: Path) -> None:
    whole = search(None, data=iter(DATA * 20))
    path = tmp_path / "search"
    half_way(path, data=iter(DATA * 20))
    with pytest.raises(DataError, match=f"ended after {STEPS - 1} of {STEPS} batches"):
        search(path, data=iter((DATA * 20)[: STEPS - 1]))
    assert search(path, data=iter(DATA * 20)) == whole


def test_there_are_no_other_files(tmp_path: Path) -> None:
    half_way(tmp_path / "search")
    search(tmp_path / "search")
    assert [path.name for path in tmp_path.iterdir()] == ["search"]


# ---- whole or not at all ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_checkpoint_is_written_whole_or_not_at_all(
    call: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "search"
    with pytest.raises(StopError):
        search(path, SAVE_EVERY + 3)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise error("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(error, match="the disk is full"):
            search(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["search"]
    assert search(path) == search(None)


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*missing"):
        search(tmp_path / "missing" / "search")


# ---- other files --------------------------------------------------------------------------------


def cut(data: bytes, part: float) -> bytes:
    return data[: int(part * len(data))]


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "garbage": lambda _: b"\x80\x04\x95" + bytes(range(256)) * 9,
    "text": lambda _: b"steps = 300\n",
    "cut in the header": lambda data: cut(data, 0.1),
    "cut in the scores": lambda data: data[:-9],
    "bytes at the end": lambda data: data + b"\0",
}


@pytest.mark.parametrize("what", FILES)
def test_what_is_no_checkpoint(what: str, tmp_path: Path) -> None:
    path = tmp_path / "search"
    spoiled = FILES[what](half_way(path))
    path.write_bytes(spoiled)
    with pytest.raises(FormatError, match=f"{path}: not a checkpoint of a search: "):
        search(path)
    assert path.read_bytes() == spoiled


def test_other_safetensors_files(tmp_path: Path) -> None:
    _, _, tuned, graft = pair()
    path = tmp_path / "a.graft.safetensors"
    graft.save(path)
    before = path.read_bytes()
    with pytest.raises(FormatError, match="not a checkpoint of a search"):
        search(path)
    assert path.read_bytes() == before
    save_file(tuned, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="not a checkpoint of a search"):
        search(tmp_path / "model.safetensors")


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises((FormatError, OSError)):
        search(tmp_path)


@pytest.mark.parametrize(
    ("how", "found", "wanted"),
    [
        ({"seed": 4}, '"seed": 3', '"seed": 4'),
        ({"count": 13}, '"budget": 12', '"budget": 13'),
        ({"steps": STEPS + 1}, f'"steps": {STEPS}', f'"steps": {STEPS + 1}'),
        ({"method": Learned(STEPS, rate=0.3)}, '"rate": ', '"rate": 0.3'),
        ({"method": Learned(STEPS, prior=0.7)}, '"prior": 0.5', '"prior": 0.7'),
        ({"scope": "encoder"}, '"candidates": ', '"candidates": '),
        ({"tuned": searching.nudged(contents(pair()[0]), seed=8)}, '"candidates"', '"candidates"'),
    ],
)
def test_the_checkpoint_of_another_search(
    how: dict[str, Any], found: str, wanted: str, tmp_path: Path
) -> None:
    path = tmp_path / "search"
    before = half_way(path)
    with pytest.raises(DataError) as caught:
        search(path, **how)
    text = str(caught.value)
    assert text.startswith(f"{path} is the checkpoint of another search: found ")
    assert text.endswith("; name another file, or remove this one to start anew")
    told, asked = text.split(", wanted ", 1)
    assert found in told
    assert wanted in asked
    assert path.read_bytes() == before


def test_a_checkpoint_says_what_it_is_of(tmp_path: Path) -> None:
    path = tmp_path / "search"
    data = half_way(path)
    (length,) = struct.unpack("<Q", data[:8])
    about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["hotgraft.search"])
    _, base, tuned, _ = pair()
    assert about["candidates"] == diff(base, tuned, count=24).id
    assert about["method"]["name"] == "learned"
    assert load_file(path)["scores"].shape == (24,)
