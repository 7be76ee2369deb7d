"""The skills of a server as its API process keeps them: what may happen at once, and what fails."""

import asyncio
import contextlib
import io
import json
import threading

import pytest

pytest.importorskip("prometheus_client")

from hotgraft.errors import FormatError, HotgraftError, SkillInUseError, UnknownSkillError
from hotgraft.serve.ranks import Loaded
from hotgraft.serve.vllm import metrics
from hotgraft.serve.vllm.metrics import Events, Metrics
from hotgraft.serve.vllm.skills import SUFFIX, Skills


class Toy:
    """Ranks and a scheduler that do what they are told."""

    def __init__(self, folder):
        self.loaded, self.known, self.failing = {}, {}, set()
        self.go = threading.Event()
        self.go.set()
        self.log = io.StringIO()
        self.skills = Skills(
            self, self.scheduler, folder, lambda name: name == "base", Events(self.log)
        )

    def load(self, name, path, *, cast=False):
        assert not cast
        self.go.wait()
        text = path.read_text()
        if text == "corrupt":
            raise FormatError("it is corrupt")
        assert name not in self.loaded
        self.loaded[name] = text
        return Loaded(name, text, len(text), 8 * len(text))

    def unload(self, name):
        self._fail("unload")
        del self.loaded[name]

    async def scheduler(self, method, name, *rest):
        self._fail(method)
        if method == "set":
            self.known[name] = rest[0]
            return None
        del self.known[name]
        return 0

    def _fail(self, method):
        if method in self.failing:
            raise HotgraftError(f"{method} fails")

    def events(self, event):
        lines = map(json.loads, self.log.getvalue().splitlines())
        return [line for line in lines if line["event"] == event]

    def consistent(self):
        """Whether all three agree on what there is."""
        digests = {skill.name: skill.digest for skill in self.skills.all()}
        return digests == self.loaded == self.known


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


def write(toy, **texts):
    for name, text in texts.items():
        (toy.skills.folder / f"{name}{SUFFIX}").write_text(text)


def load(toy, name):
    return toy.skills.load(name, toy.skills.find(name))


async def outputs(count):
    for i in range(count):
        await asyncio.sleep(0)
        yield i


def test_load_and_unload(toy):
    async def run():
        write(toy, sql="aa")
        skill = await load(toy, "sql")
        assert (skill.digest, skill.entries, skill.nbytes) == ("aa", 2, 16)
        assert toy.consistent()
        await toy.skills.unload("sql")
        assert toy.consistent()
        assert not toy.loaded

    asyncio.run(run())
    assert [line["skill"] for line in toy.events("load") + toy.events("unload")] == ["sql"] * 2


def test_a_name_is_taken_while_it_comes_and_goes(toy):
    async def run():
        write(toy, sql="aa")
        toy.go.clear()
        coming = asyncio.ensure_future(load(toy, "sql"))
        await asyncio.sleep(0)
        for refused in (load(toy, "sql"), toy.skills.unload("sql")):
            with pytest.raises(SkillInUseError):
                await refused
        assert "sql" not in toy.skills
        toy.go.set()
        await coming
        with pytest.raises(SkillInUseError):
            await load(toy, "sql")
        assert toy.consistent()

    asyncio.run(run())


def test_a_caller_that_goes_away_leaves_nothing_half_done(toy):
    async def run():
        write(toy, sql="aa")
        toy.go.clear()
        coming = asyncio.ensure_future(load(toy, "sql"))
        await asyncio.sleep(0)
        coming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await coming
        toy.go.set()
        while "sql" not in toy.skills:
            await asyncio.sleep(0.01)
        assert toy.consistent()

    asyncio.run(run())


@pytest.mark.parametrize("failing", ["set", "drop", "unload"])
def test_a_failure_on_one_side_is_undone_on_the_other(toy, failing):
    async def run():
        write(toy, sql="aa")
        toy.failing = {failing}
        with contextlib.suppress(HotgraftError):
            await load(toy, "sql")
            await toy.skills.unload("sql")
        assert toy.events("refusal")[0]["why"] == f"{failing} fails"
        assert toy.consistent()
        assert ("sql" in toy.skills) == (failing != "set")
        toy.failing = set()
        if failing == "set":
            await load(toy, "sql")
        await toy.skills.unload("sql")
        assert toy.consistent()

    asyncio.run(run())


def test_a_skill_is_in_use_until_its_outputs_end_or_are_left(toy):
    async def run():
        write(toy, sql="aa")
        skill = await load(toy, "sql")
        for left in (False, True):
            reading = toy.skills.serving(skill, outputs(3))
            assert await anext(reading) == 0
            assert toy.skills.requests(skill) == 1
            with pytest.raises(SkillInUseError, match="1 requests"):
                await toy.skills.unload("sql")
            if left:
                await reading.aclose()
            else:
                assert [output async for output in reading] == [1, 2]
            assert toy.skills.requests(skill) == 0
        late = toy.skills.serving(skill, outputs(3))
        await toy.skills.unload("sql")
        await load(toy, "sql")
        with pytest.raises(UnknownSkillError):
            await anext(late)

    asyncio.run(run())


def test_aborting(toy):
    async def run():
        write(toy, sql="aa")
        reading = toy.skills.serving(await load(toy, "sql"), outputs(3))
        await anext(reading)
        await toy.skills.unload("sql", abort=True)
        assert toy.consistent()
        assert [output async for output in reading] == [1, 2]

    asyncio.run(run())


def test_a_folder_is_kept_up_with(toy):
    async def run():
        write(toy, sql="aa", french="bb", broken="corrupt", base="cc")
        (toy.skills.folder / "notes.txt").write_text("no skill")
        for _ in range(2):  # and each bad file is reported once
            await toy.skills.scan()
            assert toy.loaded == {"sql": "aa", "french": "bb"}
            assert {x["skill"]: x["kind"] for x in toy.events("refusal")} == {
                "broken": "FormatError",
                "base": "HotgraftError",
            }
            assert len(toy.events("refusal")) == 2
        reading = toy.skills.serving(toy.skills["sql"], outputs(9))
        await anext(reading)
        write(toy, sql="aaaa", broken="dddd")
        toy.skills.find("french").unlink()
        await toy.skills.scan()
        assert toy.loaded == {"sql": "aa", "broken": "dddd"}  # one is in use
        await reading.aclose()
        await toy.skills.scan()
        assert toy.loaded == {"sql": "aaaa", "broken": "dddd"}
        await toy.skills.unload("broken")
        await toy.skills.scan()
        assert toy.loaded == {"sql": "aaaa"}  # somebody unloaded it, so it does not come back
        write(toy, broken="eeeeee", french="ff")
        await toy.skills.scan()
        assert toy.loaded == {"sql": "aaaa", "broken": "eeeeee", "french": "ff"}
        assert toy.consistent()

    asyncio.run(run())


def test_only_files_of_the_folder_are_found(toy, tmp_path):
    (tmp_path.parent / f"outside{SUFFIX}").write_text("aa")
    (tmp_path / f"link{SUFFIX}").symlink_to(tmp_path.parent / f"outside{SUFFIX}")
    for name, file in [("../outside", None), ("x", f"../outside{SUFFIX}"), ("link", None)]:
        with pytest.raises(HotgraftError, match="outside"):
            toy.skills.find(name, file)
    with pytest.raises(HotgraftError, match="outside"):
        toy.skills.find("x", str(tmp_path.parent / f"outside{SUFFIX}"))
    with pytest.raises(FileNotFoundError):
        toy.skills.find("nowhere")


COUNTERS = {
    "switches": 3, "steps": {"base": 1, "skills": 7}, "empty": 0, "evictions": 0, "refusals": 0,
    "waits": [4, 1, 0], "wait_bounds": [0.1, 1.0], "wait_seconds": 0.5, "longest_wait": 0.4,
}  # fmt: skip
RANKS = [{"bounds": [0.001], "counts": [2, 1], "seconds": 0.25}]


def test_metrics_and_the_summary(toy, monkeypatch):
    asked = []

    async def ask():
        asked.append(1)
        if len(asked) > 1:
            raise HotgraftError("the engine is gone")
        return COUNTERS, RANKS

    async def run():
        events = Events(toy.log)
        found = Metrics(toy.skills, events, ask)
        assert found.describe() == []
        await asyncio.gather(*(found.refresh() for _ in range(5)))
        assert len(asked) == 1
        monkeypatch.setattr(metrics, "FRESH", 0.0)
        monkeypatch.setattr(metrics, "SUMMARY_EVERY", 0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(found.summarise(), 0.1)
        return {sample.name: sample.value for each in found.collect() for sample in each.samples}

    values = asyncio.run(run())
    (summary,) = toy.events("switches")
    assert (summary["new"], summary["switch_seconds"]) == (3, 0.25)
    assert toy.events("refusal")[0]["what"] == "metrics"
    assert values["hotgraft_switches_total"] == values["hotgraft_switch_seconds_count"] == 3
    assert values["hotgraft_wait_seconds_count"] == 5
