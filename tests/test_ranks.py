"""Ranks as one: everybody loads and switches, or nobody, and the server goes on."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import hotgraft
import pytest
import torch
from hotgraft.errors import (
    BaseMismatchError,
    CoverageError,
    FormatError,
    GraftError,
    HostChangedError,
    HotgraftError,
    OverlapError,
    SkillInUseError,
    UnknownSkillError,
)
from hotgraft.graft import Graft
from hotgraft.serve.rank import Prepared, Rank
from hotgraft.serve.ranks import Ranks, error_of
from hotgraft.weights import open_weights
from torch import Tensor, nn

COLUMNS = 4


class Shard(nn.Module):
    """Half of a matrix, and all of a vector."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.matrix = nn.Parameter(torch.zeros(6, COLUMNS))
        self.vector = nn.Parameter(torch.zeros(5))

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            if name == "matrix":
                self.matrix.data.copy_(tensor.narrow(1, COLUMNS * self.rank, COLUMNS))
            elif name == "vector":
                self.vector.data.copy_(tensor)


class Server:
    """Two ranks in one process, with faults to order."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.models = [Shard(0), Shard(1)]
        for model in self.models:
            model.load(state.items())
        with open_weights(state) as weights:
            self.inner = [Rank(model, model.load, weights) for model in self.models]
        self.faults: dict[tuple[str, int], Exception] = {}
        self.calls: list[str] = []
        self.ranks = Ranks(self.call, sleep=lambda _: None)

    def call(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        self.calls.append(method)
        found: list[Any] = []
        for at, rank in enumerate(self.inner):
            fault = self.faults.pop((method, at), None)
            try:
                if fault is not None:
                    raise fault
                found.append(getattr(rank, method)(*args))
            except Exception as error:
                found.append(error)
        return found

    def weights(self) -> dict[str, Tensor]:
        matrix = torch.cat([model.matrix for model in self.models], 1).detach()
        vectors = [model.vector.detach() for model in self.models]
        assert torch.equal(*vectors)
        return {"matrix": matrix, "vector": vectors[0].clone()}

    def holds(self, state: dict[str, Tensor]) -> bool:
        return all(torch.equal(tensor, state[n]) for n, tensor in self.weights().items())


@pytest.fixture
def server() -> Iterator[Server]:
    torch.manual_seed(0)
    state = {"matrix": torch.randn(6, 2 * COLUMNS), "vector": torch.randn(5)}
    found = Server(state | {"unused": torch.randn(3)})
    yield found
    for rank in found.inner:
        rank.close()
    assert found.holds(state)


def tuned(server: Server, by: float, every: int = 1) -> dict[str, Tensor]:
    other = {n: t.clone() for n, t in server.state.items() if n != "unused"}
    for tensor in other.values():
        tensor.view(-1)[::every] += by
    return other


def skill(server: Server, folder: Path, name: str, by: float, every: int = 1) -> Path:
    base = {n: t for n, t in server.state.items() if n != "unused"}
    path = folder / f"{name}.graft.safetensors"
    hotgraft.diff(base, tuned(server, by, every)).save(path)
    return path


def test_all_ranks_load_and_switch(server: Server, tmp_path: Path) -> None:
    loaded = server.ranks.load("up", skill(server, tmp_path, "up", 1.0))
    assert loaded.nnz == 53
    assert server.ranks.skills == {"up": loaded}
    server.ranks.load("down", skill(server, tmp_path, "down", -2.0))
    server.ranks.activate("up")
    assert server.holds(tuned(server, 1.0))
    assert server.ranks.live.names == ("up",)
    assert server.ranks.verify() == 2 * 3 * (24 + 5)  # both skills and what is live
    server.ranks.activate("down")
    assert server.holds(tuned(server, -2.0))
    server.ranks.activate("down", "up", policy="priority")
    assert server.holds(tuned(server, 1.0))
    server.ranks.deactivate()
    server.ranks.unload("up")
    assert set(server.ranks.skills) == {"down"}
    assert all(set(rank.host.skills) == {"down"} for rank in server.inner)


def test_a_skill_on_one_rank_only(server: Server, tmp_path: Path) -> None:
    other = {"matrix": server.state["matrix"].clone()}
    other["matrix"][:, COLUMNS:] += 1
    graft = hotgraft.diff({"matrix": server.state["matrix"]}, other)
    graft.save(tmp_path / "half.graft.safetensors")
    server.ranks.load("half", tmp_path / "half.graft.safetensors")
    server.ranks.activate("half")
    assert torch.equal(server.weights()["matrix"], other["matrix"])


@pytest.mark.parametrize("method", ["begin", "prepared"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_to_load(server: Server, tmp_path: Path, method: str, rank: int) -> None:
    path = skill(server, tmp_path, "up", 1.0)
    server.faults[method, rank] = MemoryError("no room")
    with pytest.raises(MemoryError, match=f"rank {rank}: no room"):
        server.ranks.load("up", path)
    assert not server.ranks.skills
    assert not any(inner.host.skills for inner in server.inner)
    server.ranks.load("up", path)  # and the server goes on
    server.ranks.activate("up")
    assert server.holds(tuned(server, 1.0))


@pytest.mark.parametrize("method", ["prepare", "activate"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("before", [(), ("down",)])
def test_a_rank_that_fails_to_switch(
    server: Server, tmp_path: Path, method: str, rank: int, before: tuple[str, ...]
) -> None:
    server.ranks.load("up", skill(server, tmp_path, "up", 1.0))
    server.ranks.load("down", skill(server, tmp_path, "down", -2.0))
    server.ranks.activate(*before)
    was = server.weights()
    server.faults[method, rank] = HostChangedError("somebody wrote")
    with pytest.raises(HostChangedError, match=f"rank {rank}: somebody wrote"):
        server.ranks.activate("up")
    assert server.holds(was)
    assert server.ranks.live.names == before
    server.ranks.activate("up")
    assert server.holds(tuned(server, 1.0))


def test_ranks_that_cannot_be_brought_together(server: Server, tmp_path: Path) -> None:
    server.ranks.load("up", skill(server, tmp_path, "up", 1.0))
    inner = server.call

    def call(method: str, args: tuple[Any, ...]) -> list[Any]:
        if method == "activate" and args[0] == ():
            return [HostChangedError("written"), None]
        found = inner(method, args)
        return [found[0], HostChangedError("gone")] if method == "activate" else found

    server.ranks._call = call
    with pytest.raises(HotgraftError, match=r"ranks differ now: .*restart"):
        server.ranks.activate("up")


def test_refusals_touch_no_rank(server: Server, tmp_path: Path) -> None:
    path = skill(server, tmp_path, "up", 1.0)
    server.ranks.load("up", path)
    server.calls.clear()
    with pytest.raises(SkillInUseError, match="'up' is loaded already"):
        server.ranks.load("up", path)
    with pytest.raises(UnknownSkillError, match="no skill 'down' is loaded; loaded are: up"):
        server.ranks.activate("up", "down")
    with pytest.raises(UnknownSkillError):
        server.ranks.unload("down")
    assert server.calls == []
    server.ranks.load("side", skill(server, tmp_path, "side", 3.0, every=2))
    with pytest.raises(OverlapError, match="rank 0"):
        server.ranks.activate("up", "side")
    assert server.calls[-1] == "prepare"
    server.ranks.activate("up")
    with pytest.raises(SkillInUseError, match="'up' is live"):
        server.ranks.unload("up")
    assert "up" in server.ranks.skills


def corrupt(server: Server, folder: Path) -> Path:
    path = skill(server, folder, "bad", 1.0)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    return path


def missing(_: Server, folder: Path) -> Path:
    return folder / "nowhere.graft.safetensors"


def foreign(_: Server, folder: Path) -> Path:
    path = folder / "foreign.graft.safetensors"
    other = {"matrix": torch.randn(6, 2 * COLUMNS)}
    hotgraft.diff(other, {"matrix": other["matrix"] + 1}).save(path)
    return path


def unplaced(_: Server, folder: Path) -> Path:
    path = folder / "unplaced.graft.safetensors"
    hotgraft.diff({"matrix": torch.zeros(9, 9)}, {"matrix": torch.ones(9, 9)}).save(path)
    return path


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (corrupt, FormatError),
        (missing, FileNotFoundError),
        (foreign, BaseMismatchError),
        (unplaced, BaseMismatchError),
    ],
)
def test_bad_files(
    server: Server,
    tmp_path: Path,
    make: Callable[[Server, Path], Path],
    error: type[Exception],
) -> None:
    good = skill(server, tmp_path, "up", 1.0)
    server.ranks.load("up", good)
    server.ranks.activate("up")
    with pytest.raises(error, match=r"rank [01]: "):
        server.ranks.load("bad", make(server, tmp_path))
    assert set(server.ranks.skills) == {"up"}
    assert all(set(rank.host.skills) == {"up"} for rank in server.inner)
    assert server.holds(tuned(server, 1.0))


def test_entries_that_no_rank_has(tmp_path: Path) -> None:
    """A server that loads the first half of a tensor only."""
    state = {"matrix": torch.randn(6, 2 * COLUMNS), "vector": torch.randn(5)}
    server = Server(state)
    server.models[1].rank = 0
    server.models[1].load(state.items())
    with open_weights(state) as weights:
        server.inner[1].close()
        server.inner[1] = Rank(server.models[1], server.models[1].load, weights)
    with pytest.raises(CoverageError, match="24 of 53 entries of 'up' have no place on any rank"):
        server.ranks.load("up", skill(server, tmp_path, "up", 1.0))
    assert not any(inner.host.skills for inner in server.inner)


def test_another_client_of_the_same_ranks_is_not_disturbed(server: Server, tmp_path: Path) -> None:
    path = skill(server, tmp_path, "up", 1.0)
    other = Ranks(server.call, sleep=lambda _: None)
    refused: list[Exception] = []

    def meanwhile(_: float) -> None:
        if not refused:
            with pytest.raises(SkillInUseError) as caught:
                other.load("up", path)
            refused.append(caught.value)

    first = Ranks(lambda method, args: late(server, method, args), sleep=meanwhile)
    first.load("up", path)
    assert refused
    first.activate("up")
    assert server.holds(tuned(server, 1.0))


def late(server: Server, method: str, args: tuple[Any, ...]) -> list[Any]:
    """The ranks, which say at the first question that they are not ready."""
    found = server.call(method, args)
    return [None, None] if server.calls.count("prepared") == 1 and method == "prepared" else found


def test_a_file_that_is_replaced_between_two_ranks(server: Server, tmp_path: Path) -> None:
    path, other = (skill(server, tmp_path, name, by) for name, by in (("up", 1.0), ("down", -2.0)))

    def call(method: str, args: tuple[Any, ...]) -> list[Any]:
        if method != "begin":
            return server.call(method, args)
        name, token, _, cast = args
        for rank, file in zip(server.inner, (path, other), strict=True):
            rank.begin(name, token, file, cast)
        return [None, None]

    with pytest.raises(HotgraftError, match="ranks read different files as 'up'"):
        Ranks(call, sleep=lambda _: None).load("up", path)
    assert not any(rank.host.skills for rank in server.inner)


@pytest.mark.parametrize("name", [None, "", 3, ["up"]])
def test_names(server: Server, tmp_path: Path, name: Any) -> None:
    path = skill(server, tmp_path, "up", 1.0)
    with pytest.raises(GraftError, match="its name is a string"):
        server.ranks.load(name, path)
    for use in (server.ranks.unload, server.ranks.activate):
        with pytest.raises(UnknownSkillError, match=r"no skill .* is loaded"):
            use(name)
    assert server.calls == []
    with pytest.raises(GraftError, match="its name is a string"):
        server.inner[0].begin(name, "me", path)


def test_arguments_of_other_types(server: Server, tmp_path: Path) -> None:
    server.ranks.load("up", skill(server, tmp_path, "up", 1.0))
    server.calls.clear()
    path: Any
    for path in (None, 3):
        with pytest.raises(FormatError, match="is no path; wanted that of a graft file"):
            server.ranks.load("more", path)
    with pytest.raises(GraftError, match=r"weights 2\.0: give a list"):
        server.ranks.activate("up", weights=2.0)  # type: ignore[arg-type]
    assert server.calls == []


def test_an_unload_that_failed_on_one_rank_can_be_repeated(server: Server, tmp_path: Path) -> None:
    server.ranks.load("up", skill(server, tmp_path, "up", 1.0))
    server.faults["unload", 1] = MemoryError("no room")
    with pytest.raises(MemoryError):
        server.ranks.unload("up")
    server.ranks.unload("up")
    assert not server.ranks.skills
    assert not any(rank.host.skills for rank in server.inner)


def test_no_rank_forgets_what_another_cannot(server: Server, tmp_path: Path) -> None:
    server.ranks.load("up", skill(server, tmp_path, "up", 1.0))
    server.inner[1].activate(("up",), "refuse", None)
    with pytest.raises(SkillInUseError, match="rank 1: 'up' is live"):
        server.ranks.unload("up")
    assert all(set(rank.host.skills) == {"up"} for rank in server.inner)
    server.ranks.deactivate()


def test_a_rank_by_itself(server: Server, tmp_path: Path) -> None:
    rank = server.inner[0]
    path = skill(server, tmp_path, "up", 1.0)
    rank.begin("up", "me", path)
    with pytest.raises(SkillInUseError, match="just being loaded"):
        rank.begin("up", "you", path)
    with pytest.raises(UnknownSkillError):
        rank.withdraw("up", "you")
    with pytest.raises(SkillInUseError, match="being loaded"):
        rank.unload("up")
    while rank.prepared("up", "me") is None:
        pass
    rank.withdraw("up", "me")
    assert not rank.host.skills
    for method in ("prepared", "keep", "withdraw"):
        with pytest.raises(UnknownSkillError, match="no loading of 'up' was begun"):
            getattr(rank, method)("up", "me")


class Slow:
    """Reads of grafts that wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        load = Graft.load

        def slow(path: Any, **more: Any) -> Graft:
            self.begun.set()
            assert self.go.wait(30)
            return load(path, **more)

        monkeypatch.setattr(Graft, "load", slow)


def finished(rank: Rank, name: str, token: str) -> Prepared:
    while (found := rank.prepared(name, token)) is None:
        pass
    return found


def test_withdrawing_does_not_wait(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = server.inner[0]
    path, other = (skill(server, tmp_path, name, by) for name, by in (("up", 1.0), ("down", -2.0)))
    slow = Slow(monkeypatch)
    rank.begin("up", "me", path)
    assert slow.begun.wait(30)
    rank.withdraw("up", "me")  # which would wait for ever
    with pytest.raises(UnknownSkillError):
        rank.prepared("up", "me")
    rank.begin("up", "you", other)  # the name is free at once
    rank.begin("left", "you", path)
    rank.withdraw("left", "you")  # not begun to be read
    slow.go.set()
    found = finished(rank, "up", "you")
    assert found.id == hotgraft.Graft.load(other).id
    assert rank.host.skills["up"].nnz == 29
    rank.keep("up", "you")
    assert set(rank.host.skills) == {"up"}
    rank.activate(("up",), "refuse", None)
    assert torch.equal(server.models[0].matrix, tuned(server, -2.0)["matrix"][:, :COLUMNS])


def test_a_withdrawn_load_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = server.inner[0]
    path = skill(server, tmp_path, "up", 1.0)
    slow = Slow(monkeypatch)
    plans = []
    load = rank.host.load

    def seen(*args: Any, **more: Any) -> Any:
        found = load(*args, **more)
        plans.append(weakref.ref(found.plan))
        return found

    monkeypatch.setattr(rank.host, "load", seen)
    for source in (path, tmp_path / "nowhere.graft.safetensors"):
        slow.begun.clear()
        slow.go.clear()
        rank.begin("up", "me", source)
        assert slow.begun.wait(30)
        rank.withdraw("up", "me")
        slow.go.set()
        rank.begin("after", "me", skill(server, tmp_path, "after", 2.0))
        finished(rank, "after", "me")
        rank.withdraw("after", "me")
    assert not rank.host.skills
    gc.collect()
    assert [plan() for plan in plans] == [None] * 3


class CutError(Exception):
    """The ranks cannot be reached."""


@pytest.mark.parametrize("method", ["begin", "prepared", "keep"])
@pytest.mark.parametrize("reached", [0, 1, 2])
@pytest.mark.parametrize("lasting", [False, True])
def test_a_call_that_fails_on_the_way(
    server: Server, tmp_path: Path, method: str, reached: int, lasting: bool
) -> None:
    path = skill(server, tmp_path, "up", 1.0)
    cut = [method, "withdraw"] if lasting else [method]

    def call(asked: str, args: tuple[Any, ...]) -> list[Any]:
        if cut[:1] != [asked]:
            return server.call(asked, args)
        del cut[0]
        for rank in server.inner[: reached if asked == method else 0]:
            getattr(rank, asked)(*args)
        raise CutError("the line is dead")

    ranks = Ranks(call, sleep=lambda _: None)
    with pytest.raises(CutError, match="the line is dead") as caught:
        ranks.load("up", path)
    notes = getattr(caught.value, "__notes__", [])
    assert ["load 'up' again" in note for note in notes] == [True] * lasting
    assert not ranks.skills
    ranks.load("up", path)
    ranks.activate("up")
    assert server.holds(tuned(server, 1.0))
    ranks.deactivate()
    ranks.unload("up")
    assert not any(rank.host.skills for rank in server.inner)


def test_a_rank_that_fails_to_keep(server: Server, tmp_path: Path) -> None:
    path = skill(server, tmp_path, "up", 1.0)
    server.faults["keep", 1] = MemoryError("no room")
    with pytest.raises(MemoryError):
        server.ranks.load("up", path)
    assert not any(rank.host.skills for rank in server.inner)
    server.ranks.load("up", path)


def test_errors_from_other_processes() -> None:
    assert isinstance(error_of("FileNotFoundError", "x"), FileNotFoundError)
    assert isinstance(error_of("MemoryError", "x"), MemoryError)
    assert str(error_of("KeyError", "x")) == "KeyError: x"
    assert isinstance(error_of("sys", "x"), HotgraftError)
