"""The skills of a server as its API process keeps them: what comes and goes, and what fails."""

import asyncio
import contextlib
import os
import threading

import pytest

pytest.importorskip("prometheus_client")

from hotgraft.errors import (
    BaseMismatchError,
    FormatError,
    HotgraftError,
    SkillInUseError,
    UnknownSkillError,
)
from hotgraft.library import folder as library_folder
from hotgraft.library.folder import ENDING
from hotgraft.serve.vllm import folder, metrics, skills
from hotgraft.serve.vllm.metrics import Events, Metrics
from skill_toys import SIZE, Toy, digest, load, outputs


@pytest.fixture
def toy(tmp_path):
    return Toy(tmp_path)


def test_load_and_unload(toy):
    async def run():
        toy.write(sql="aa")
        skill = await load(toy, "sql")
        assert (skill.digest, skill.entries, skill.nbytes) == (digest("aa"), 7, SIZE)
        assert toy.consistent()
        await toy.skills.unload("sql")
        assert toy.consistent()
        assert not toy.loaded
        assert "sql" not in toy.skills
        with pytest.raises(UnknownSkillError):
            await toy.skills.unload("sql")

    asyncio.run(run())
    assert [line["skill"] for line in toy.events("load") + toy.events("unload")] == ["sql"] * 2


def test_a_name_is_taken_while_it_comes_and_goes(toy):
    async def run():
        toy.write(sql="aa", other="bb")
        toy.go.clear()
        coming = asyncio.ensure_future(load(toy, "sql"))
        await asyncio.sleep(0)
        for _ in range(2):  # while its header is read, and while it is loaded
            for refused in (load(toy, "sql"), toy.skills.unload("sql")):
                with pytest.raises((SkillInUseError, UnknownSkillError)):
                    await refused
            while not toy.order:
                await asyncio.sleep(0.001)
        with pytest.raises(SkillInUseError, match="being loaded"):
            await toy.skills.unload("sql", abort=True)
        toy.go.set()
        await coming
        with pytest.raises(SkillInUseError, match="loaded already"):
            await load(toy, "sql")
        with pytest.raises(SkillInUseError, match="from 'sql"):
            await toy.skills.load("sql", toy.skills.find("other"))
        assert toy.consistent()

    asyncio.run(run())


def test_a_caller_that_goes_away_leaves_nothing_half_done(toy):
    async def run():
        toy.write(sql="aa")
        toy.go.clear()
        coming = asyncio.ensure_future(load(toy, "sql"))
        await asyncio.sleep(0)
        coming.cancel()
        with pytest.raises(asyncio.CancelledError):
            await coming
        toy.go.set()
        while not toy.loaded:
            await asyncio.sleep(0.01)
        await toy.idle()
        assert toy.consistent()
        assert toy.skills["sql"].requests == 0

    asyncio.run(run())


@pytest.mark.parametrize("failing", ["load", "set", "drop", "unload"])
def test_a_failure_on_one_side_is_undone_on_the_other(toy, failing):
    async def run():
        toy.write(sql="aa")
        toy.failing = {failing}
        with contextlib.suppress(HotgraftError):
            await load(toy, "sql")
            await toy.skills.unload("sql")
        assert toy.events("refusal")[0]["why"] == f"{failing} fails"
        assert toy.consistent()
        assert ("sql" in toy.skills) == (failing in ("drop", "unload"))
        toy.failing = set()
        if failing in ("load", "set"):
            await load(toy, "sql")
        await toy.skills.unload("sql")
        assert toy.consistent()

    asyncio.run(run())


def test_a_skill_is_in_use_until_its_outputs_end_or_are_left(toy):
    async def run():
        toy.write(sql="aa")
        skill = await load(toy, "sql")
        for left in (False, True):
            reading = toy.skills.serving(toy.skills.lease(skill), outputs(3))
            assert await anext(reading) == 0
            assert skill.requests == 1
            with pytest.raises(SkillInUseError, match="1 requests"):
                await toy.skills.unload("sql")
            if left:
                await reading.aclose()
            else:
                assert [output async for output in reading] == [1, 2]
            assert skill.requests == 0
        late = toy.skills.serving(toy.skills.lease(skill), outputs(3))
        await toy.skills.unload("sql")
        await load(toy, "sql")
        with pytest.raises(UnknownSkillError):
            await anext(late)
        assert toy.consistent()

    asyncio.run(run())


def test_one_request_may_ask_the_engine_often(toy):
    async def run():
        toy.write(sql="aa")
        with toy.skills.lease(await load(toy, "sql")) as lease:
            for _ in range(3):
                reading = toy.skills.serving(lease, outputs(2))
                assert [output async for output in reading] == [0, 1]
                assert toy.skills["sql"].requests == 1
        assert toy.skills["sql"].requests == 0

    asyncio.run(run())


def test_aborting(toy):
    async def run():
        toy.write(sql="aa")
        lease = toy.skills.lease(await load(toy, "sql"))
        reading = toy.skills.serving(lease, outputs(3))
        await anext(reading)
        await toy.skills.unload("sql", abort=True)
        assert toy.consistent()
        toy.write(sql="bb")
        await load(toy, "sql")
        with pytest.raises(UnknownSkillError):  # the rest of a request would be by other weights
            await anext(toy.skills.serving(lease, outputs(3)))
        assert [output async for output in reading] == [1, 2]
        assert toy.consistent()

    asyncio.run(run())
    assert toy.events("unload")[0]["aborted"] == 1


def test_a_folder_is_kept_up_with(toy):
    def names():
        return {name: skill.digest[:2] for name, skill in toy.skills.items()}

    async def run():
        toy.write(sql="aa", french="bb", base="cc")
        toy.write("corrupt", broken="dd")
        folder = toy.skills.folder
        (folder / "notes.txt").write_text("no skill")
        (folder / f"text{ENDING}").write_text("no skill either, and it is long enough")
        for _ in range(2):  # and each bad file is reported once
            await toy.skills.scan()
            assert names() == {"sql": "aa", "french": "bb", "broken": "dd"}
            assert not toy.loaded
            assert {x["skill"]: x["kind"] for x in toy.events("refusal")} == {
                "text": "FormatError",
                "base": "HotgraftError",
            }
            assert len(toy.events("refusal")) == 2
        lease = toy.skills.lease(toy.skills["sql"])
        reading = toy.skills.serving(lease, outputs(9))
        await anext(reading)
        toy.write(sql="ee", broken="ff")
        toy.skills.find("french").unlink()
        await toy.skills.scan()
        assert names() == {"sql": "aa", "broken": "ff"}  # one is in use
        assert await toy.use("sql") == digest("aa")
        await reading.aclose()
        assert await toy.use("broken") == digest("ff")
        await toy.skills.scan()
        assert names() == {"sql": "ee", "broken": "ff"}
        assert await toy.use("sql") == digest("ee")
        await toy.skills.unload("broken")
        await toy.skills.scan()
        assert names() == {"sql": "ee"}  # somebody unloaded it, so it does not come back
        toy.write(broken="bc", french="cd")
        await toy.skills.scan()
        assert names() == {"sql": "ee", "broken": "bc", "french": "cd"}
        (folder / f"french{ENDING}").write_text("no skill any more, and it is long enough")
        await toy.skills.scan()
        assert names() == {"sql": "ee", "broken": "bc"}
        assert toy.consistent()

    asyncio.run(run())
    assert [line["added"] for line in toy.events("scan")] == [3, 0, 0, 2, 0]


def test_a_file_that_was_replaced_is_loaded_when_its_skill_is_idle(toy):
    async def run():
        toy.write(sql="aa", pinned="aa")
        await toy.skills.scan()
        await toy.skills.pin("pinned")
        with toy.skills.lease(toy.skills["sql"]) as lease:
            await lease.ready()
            toy.write(sql="bb", pinned="bb")
            await toy.skills.scan()
            assert await toy.use("sql") == digest("aa")
            await toy.idle()
            assert toy.loaded == {"sql": digest("aa"), "pinned": digest("bb")}
        assert await toy.use("sql") == digest("bb")  # before anybody looks at the folder again
        toy.write(sql="cc")
        await toy.skills.scan()
        assert toy.skills["sql"].digest == digest("cc")
        assert "sql" not in toy.loaded
        # One that was replaced since the last look is loaded as it is, and says so.
        toy.write(sql="dd")
        assert await toy.use("sql") == digest("dd")
        await toy.skills.scan()
        assert toy.consistent()

    asyncio.run(run())


def test_a_skill_that_is_just_leaving_is_not_taken_for_its_new_file(tmp_path):
    toy = Toy(tmp_path, room=1)
    plain, leaving = toy.skills.resident._scheduler, asyncio.Event()

    async def slow(method, name, *rest):
        if method == "drop":  # a step is running
            leaving.set()
            await asyncio.sleep(0.1)
        return await plain(method, name, *rest)

    async def run():
        toy.write(sql="aa", other="bb")
        await toy.skills.scan()
        await toy.use("sql")
        toy.skills.resident._scheduler = slow
        toy.unfinished = {"sql"}  # so it stays
        evicting = asyncio.ensure_future(toy.use("other"))
        await leaving.wait()
        toy.write(sql="cc")
        await toy.skills.scan()
        evicting.cancel()
        await toy.idle()
        assert toy.consistent()
        assert toy.loaded == {"sql": digest("aa")}
        toy.unfinished = set()
        await toy.skills.scan()
        assert await toy.use("sql") == digest("cc")
        assert toy.consistent()

    asyncio.run(run())


def test_what_came_since_a_look_is_newer_than_what_it_saw(toy, monkeypatch):
    plain, looked, go = skills.look, threading.Event(), threading.Event()

    def slow(*args):
        found = plain(*args)
        looked.set()
        assert go.wait(30)
        return found

    async def run():
        toy.write(sql="aa")
        (toy.skills.folder / f"go{ENDING}").write_text("no skill yet, but it is going to be one")
        await toy.skills.scan()
        toy.write(sql="bb", go="bb")
        (toy.skills.folder / f"text{ENDING}").write_text("no skill yet, but it is going to be one")
        monkeypatch.setattr(skills, "look", slow)
        scanning = asyncio.ensure_future(toy.skills.scan())
        await asyncio.to_thread(looked.wait)
        toy.write(sql="cc", go="cc", text="cc")
        assert await toy.use("sql") == digest("cc")
        for name in ("go", "text"):
            await load(toy, name)
        go.set()
        await scanning
        for _ in range(2):
            assert toy.loaded == dict.fromkeys(("sql", "go", "text"), digest("cc"))
            assert toy.consistent()
            await toy.skills.scan()

    asyncio.run(run())
    assert not toy.events("unload")


def test_a_header_is_read_once_for_each_file_that_is_put_there(toy, monkeypatch):
    read = []

    def described(path):
        read.append(path.name.removesuffix(ENDING))
        return library_folder.described(path)

    monkeypatch.setattr(folder, "described", described)

    async def run():
        toy.write(sql="aa", french="bb", base="cc")
        (toy.skills.folder / f"text{ENDING}").write_text("no skill, and it is long enough")
        await toy.skills.scan()
        assert sorted(read) == ["base", "french", "sql", "text"]
        await toy.use("sql")
        await toy.skills.unload("french")
        read.clear()
        await toy.skills.scan()
        assert not read
        toy.write(french="dd")
        await toy.skills.scan()
        assert read == ["french"]

    asyncio.run(run())


def test_only_files_of_the_folder_are_found(toy, tmp_path):
    (tmp_path.parent / f"outside{ENDING}").write_text("aa")
    (tmp_path / f"link{ENDING}").symlink_to(tmp_path.parent / f"outside{ENDING}")
    for name, file in [("../outside", None), ("x", f"../outside{ENDING}"), ("link", None)]:
        with pytest.raises(HotgraftError, match="outside"):
            toy.skills.find(name, file)
    with pytest.raises(HotgraftError, match="outside"):
        toy.skills.find("x", str(tmp_path.parent / f"outside{ENDING}"))
    with pytest.raises(FileNotFoundError):
        toy.skills.find("nowhere")


def test_a_folder_that_is_a_link_has_its_files_by_their_path_in_it(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "skills").symlink_to(tmp_path / "data")
    toy = Toy(tmp_path / "skills")
    toy.write(sql="aa")
    with pytest.raises(HotgraftError, match="the path in the folder"):
        toy.skills.find("sql", str(tmp_path / "data" / f"sql{ENDING}"))
    with pytest.raises(HotgraftError, match="the path in the folder"):
        toy.skills.find(str(tmp_path / "skills" / "sql"))
    assert toy.skills.find("sql").relative_to(toy.skills.folder)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_answer_could_have_are_refused(toy, name):
    async def run():
        toy.write(sql="aa")
        for named in ((name,), ("sql", name)):
            with pytest.raises(HotgraftError, match="UTF-8 without NUL"):
                toy.skills.find(*named)
        path = toy.skills.find("sql")
        for coming in (toy.skills.load(name, path), toy.skills.compose(name, [])):
            with pytest.raises(HotgraftError, match="UTF-8 without NUL"):
                await coming
        assert not toy.skills

    asyncio.run(run())


def test_files_with_such_names_are_reported_and_passed_over(toy):
    async def run():
        toy.write(sql="aa", french="bb")
        folder = os.fsencode(toy.skills.folder)
        os.rename(toy.skills.find("french"), folder + b"/\xff" + ENDING.encode())
        for _ in range(2):
            await toy.skills.scan()
            assert set(toy.skills) == {"sql"}
        (refusal,) = toy.events("refusal")
        assert "UTF-8" in refusal["why"]

    asyncio.run(run())


def test_a_watch_goes_on_whatever_happens(toy, monkeypatch):
    plain, errors = skills.look, [MemoryError("of a header"), OSError("the folder")]

    def look(*args):
        if errors:
            raise errors.pop()
        return plain(*args)

    async def run():
        toy.write(sql="aa")
        watching = asyncio.ensure_future(toy.skills.watch())
        while "sql" not in toy.skills:
            assert not watching.done()
            await asyncio.sleep(0.01)
        watching.cancel()

    monkeypatch.setattr(skills, "LOOK_EVERY", 0.001)
    monkeypatch.setattr(skills, "look", look)
    asyncio.run(run())
    assert [line["kind"] for line in toy.events("refusal")] == ["OSError", "MemoryError"]


def test_a_load_by_request_that_fails_changes_nothing(toy):
    async def run():
        toy.write("corrupt", broken="aa")
        with pytest.raises(FormatError):
            await load(toy, "broken")
        assert "broken" not in toy.skills
        await toy.skills.scan()
        with pytest.raises(FormatError):
            await load(toy, "broken")
        assert "broken" in toy.skills  # as before

    asyncio.run(run())


def test_a_load_that_casts_is_tried_where_one_that_does_not_has_failed(toy, monkeypatch):
    plain, tried = toy.load, []

    def load(name, path, *, cast=False):
        tried.append(cast)
        if not cast:
            raise BaseMismatchError("cast=True rounds it")
        return plain(name, path)

    monkeypatch.setattr(toy, "load", load)

    def casting():
        return toy.skills.load("sql", toy.skills.find("sql"), cast=True)

    async def run():
        toy.write(sql="aa")
        await toy.skills.scan()
        toy.failing = {"load"}
        for _ in range(2):
            with pytest.raises(BaseMismatchError):
                await toy.use("sql")
            with pytest.raises(HotgraftError, match="load fails"):
                await casting()
        assert tried == [False, True, True]  # a load that failed does not make others cast
        toy.failing = set()
        assert (await casting()).loaded
        assert toy.consistent()

    asyncio.run(run())


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
        toy.write(sql="aa", french="bb")
        await toy.skills.scan()
        for _ in range(3):
            await toy.use("sql")
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
    assert (values["hotgraft_known_skills"], values["hotgraft_loaded_skills"]) == (2, 1)
    assert values["hotgraft_resident_bytes"] == SIZE
    assert values["hotgraft_resident_limit_bytes"] == 10 * SIZE
    assert (values["hotgraft_skill_hits_total"], values["hotgraft_skill_misses_total"]) == (2, 1)
    assert values["hotgraft_load_wait_seconds_count"] == 1
