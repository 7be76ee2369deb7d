"""Skills that a server composes of others."""

import asyncio

import hotgraft
import pytest

pytest.importorskip("prometheus_client")

import torch
from hotgraft.errors import (
    BaseMismatchError,
    FormatError,
    GraftError,
    HotgraftError,
    OverlapError,
    UnknownSkillError,
)
from hotgraft.serve.vllm import skills
from skill_toys import Toy

BASE = torch.arange(8.0)


def graft(*positions, by=1.0):
    tuned = BASE.clone()
    tuned[list(positions)] += by
    return hotgraft.diff({"w": BASE}, {"w": tuned})


class Files(Toy):
    """The toy, with real grafts in its folder."""

    def load(self, name, path, *, cast=False):
        assert not cast
        self._fail("load")
        assert name not in self.loaded
        found = hotgraft.Graft.load(path)
        self.loaded[name] = found.id
        return hotgraft.serve.ranks.Loaded(name, found.id, found.nnz, 1000)


@pytest.fixture
def toy(tmp_path):
    toy = Files(tmp_path)
    for name, made in (("sql", graft(1, 2)), ("french", graft(2, 3, by=2.0)), ("c", graft(5))):
        made.save(tmp_path / f"{name}.graft.safetensors")
    asyncio.run(toy.skills.scan())
    return toy


def left(toy):
    return {path.name for path in toy.skills.folder.iterdir()}


def test_a_composition_is_a_skill_like_the_others(toy):
    async def run():
        both = await toy.skills.compose("both", ["sql", "french"], policy="sum", weights=[1.0, 0.5])
        wanted = hotgraft.compose([graft(1, 2), graft(2, 3, by=2.0)], "sum", [1.0, 0.5])
        assert both.digest == wanted.id == toy.loaded["both"]
        assert hotgraft.Graft.load(both.path) == wanted
        await toy.skills.scan()
        assert set(toy.skills) == {"sql", "french", "c", "both"}
        await toy.skills.unload("sql")
        assert await toy.use("both") == wanted.id
        assert toy.consistent()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "parts", "policy", "error", "why"),
    [
        ("both", ["sql", "french"], "refuse", OverlapError, "french and sql on 1"),
        ("both", ["sql", "c"], "average", GraftError, "average"),
        ("both", ["sql", "poems"], "refuse", UnknownSkillError, "poems"),
        ("both", ["c", "c"], "sum", HotgraftError, "twice"),
        ("c", ["sql"], "refuse", FileExistsError, "choose another name"),
        ("base", ["sql", "c"], "refuse", HotgraftError, "something else"),
        ("../both", ["sql", "c"], "refuse", HotgraftError, "no name for a file"),
    ],
)
def test_what_cannot_be_composed_leaves_nothing(toy, name, parts, policy, error, why):
    async def run():
        before = left(toy)
        with pytest.raises(error, match=why):
            await toy.skills.compose(name, parts, policy=policy)
        assert left(toy) == before
        assert toy.consistent()
        assert toy.events("refusal")[-1]["what"] == "compose"

    asyncio.run(run())


def test_one_that_cannot_be_loaded_leaves_no_file(toy):
    async def run():
        before = left(toy)
        toy.failing = {"load"}
        with pytest.raises(HotgraftError, match="load fails"):
            await toy.skills.compose("both", ["sql", "c"])
        assert left(toy) == before
        toy.failing = set()
        await toy.skills.compose("both", ["sql", "c"])
        assert toy.consistent()

    asyncio.run(run())


def test_a_scan_in_between_adds_nothing_that_stays(toy, monkeypatch):
    plain = skills.described

    async def run():
        before, scans = left(toy), []
        loop = asyncio.get_running_loop()

        def described(path):  # the file is there, and is not loaded yet
            scans.append(asyncio.run_coroutine_threadsafe(toy.skills.scan(), loop).result(30))
            return plain(path)

        monkeypatch.setattr(skills, "described", described)
        toy.failing = {"load"}
        with pytest.raises(HotgraftError, match="load fails"):
            await toy.skills.compose("both", ["sql", "c"])
        assert len(scans) == 1
        assert left(toy) == before
        await toy.skills.scan()
        assert set(toy.skills) == {"sql", "french", "c"}
        assert not toy.events("unload")

    asyncio.run(run())


def test_parts_are_the_ones_that_the_server_knows(toy):
    async def run():
        graft(6).save(toy.skills["c"].path)
        with pytest.raises(HotgraftError, match="'c' was replaced"):
            await toy.skills.compose("both", ["sql", "c"])
        toy.skills["c"].path.write_text("no graft any more, and it is long enough")
        with pytest.raises(FormatError):
            await toy.skills.compose("both", ["sql", "c"])
        assert "both" not in toy.skills

    asyncio.run(run())


def test_of_two_at_once_one_wins(toy):
    async def run():
        tries = [toy.skills.compose("both", ["sql", "c"]) for _ in range(3)]
        found = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(not isinstance(one, Exception) for one in found) == 1
        assert toy.skills["both"].path.exists()
        assert toy.consistent()

    asyncio.run(run())


def test_a_composition_of_skills_that_are_cast_is_cast(toy):
    plain = toy.load

    async def run():
        toy.load = lambda name, path, *, cast=False: plain(name, path) if cast else odd()
        with pytest.raises(BaseMismatchError):
            await toy.use("sql")
        await toy.skills.load("sql", toy.skills.find("sql"), cast=True)
        await toy.skills.compose("both", ["sql", "c"])
        assert toy.skills["both"].cast
        assert toy.consistent()

    def odd():
        raise BaseMismatchError("cast=True rounds it")

    asyncio.run(run())
