"""Which skills of a server are loaded: who waits, who goes, and what may happen at once."""

import asyncio
import contextlib
import gc
import random
import time
import weakref

import pytest

pytest.importorskip("prometheus_client")

from hotgraft.errors import (
    FormatError,
    HotgraftError,
    LibraryFullError,
    SkillInUseError,
    UnknownSkillError,
)
from hotgraft.serve.vllm import resident
from skill_toys import SIZE, Toy, digest

NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture
def toy(tmp_path):
    """Room for two of five."""
    made = Toy(tmp_path, room=2)
    made.write(**{name: name for name in NAMES})
    asyncio.run(made.skills.scan())
    return made


def start(toy, *names):
    return [asyncio.ensure_future(toy.use(name)) for name in names]


async def begun(toy, *names):
    """Wait until the last of some loads began."""
    while toy.order[-len(names) :] != list(names):
        await asyncio.sleep(0.001)


def counts(toy):
    found = toy.skills.resident.counts
    return found.hits, found.misses, found.evictions


def test_skills_come_when_they_are_asked_for_and_the_least_recently_used_goes(toy):
    async def run():
        assert set(toy.skills) == set(NAMES)
        assert not toy.loaded
        for name in "abacab":
            assert await toy.use(name) == digest(name)
            assert toy.consistent()
        assert toy.order == ["a", "b", "c", "b"]
        assert set(toy.loaded) == {"a", "b"}
        # `serving` does not count again: a request is a lease.
        assert counts(toy) == (2, 4, 2)
        assert sum(toy.skills.resident.counts.waits) == 4

    asyncio.run(run())
    assert [(line["skill"], line["resident"]) for line in toy.events("evict")] == [
        ("b", SIZE),
        ("c", SIZE),
    ]


def test_two_requests_for_one_skill_load_it_once(toy):
    async def run():
        toy.go.clear()
        both = start(toy, "a", "a")
        await begun(toy, "a")
        third = start(toy, "a")
        await asyncio.sleep(0.01)
        toy.go.set()
        assert await asyncio.gather(*both, *third) == [digest("a")] * 3
        assert toy.order == ["a"]

    asyncio.run(run())


def test_others_go_on_while_a_skill_is_loaded(toy):
    async def run():
        await toy.use("a")
        toy.go.clear()
        (waiting,) = start(toy, "b")
        await begun(toy, "b")
        assert await toy.use("a") == digest("a")
        assert not waiting.done()
        toy.go.set()
        assert await waiting == digest("b")

    asyncio.run(run())


def test_a_hint_never_goes_before_a_request_that_waits(toy):
    async def run():
        toy.go.clear()
        toy.skills.fetch("a")
        await begun(toy, "a")
        for name in "bcd":
            toy.skills.fetch(name)
        (wanted,) = start(toy, "e")
        (promoted,) = start(toy, "d")
        toy.go.set()
        assert await asyncio.gather(wanted, promoted) == [digest("e"), digest("d")]
        await toy.idle()
        assert toy.order == ["a", "e", "d", "b", "c"]
        assert toy.consistent()
        toy.skills.fetch("c")  # it is there
        await toy.idle()
        assert toy.order[-1] == "c"
        with pytest.raises(UnknownSkillError):
            toy.skills.fetch("nowhere")

    asyncio.run(run())


@pytest.mark.parametrize("when", ["in line", "being loaded"])
def test_who_goes_away_disturbs_nobody_and_holds_nothing(toy, when):
    async def run():
        toy.go.clear()
        others = start(toy, "a")
        await begun(toy, "a")
        gone = start(toy, "b", "b")
        staying = start(toy, "c", *("b" if when == "being loaded" else ""))
        await asyncio.sleep(0.01)
        if when == "being loaded":
            toy.go.set()
            await others[0]
            toy.go.clear()
        for task in gone:
            task.cancel()
        found = await asyncio.gather(*gone, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError) for each in found)
        toy.go.set()
        await asyncio.gather(*others, *staying)
        await toy.idle()
        assert ("b" in toy.order) == (when == "being loaded")
        assert all(skill.requests == 0 for skill in toy.skills.values())
        assert toy.consistent()

    asyncio.run(run())


def test_pinned_skills_stay(toy):
    async def run():
        await toy.skills.pin("a")
        for name in "bcd":
            await toy.use(name)
        assert set(toy.loaded) == {"a", "d"}
        await toy.skills.pin("d")
        with pytest.raises(LibraryFullError, match="2,000 by pinned ones") as told:
            await toy.use("b")
        assert "--resident" in str(told.value)
        toy.skills.unpin("a")
        assert await toy.use("b") == digest("b")
        assert set(toy.loaded) == {"b", "d"}
        await toy.skills.unload("d")  # by request a pinned one goes too
        assert toy.consistent()

    asyncio.run(run())
    assert [line["kind"] for line in toy.events("refusal")] == ["LibraryFullError"]


def test_one_that_waits_for_room_gets_it_before_those_that_come_later(toy):
    async def run():
        holds = []
        for name in "ab":
            lease = toy.skills.lease(toy.skills[name]).__enter__()
            await lease.ready()
            holds.append(lease)
        (waiting,) = start(toy, "c")
        await asyncio.sleep(0.02)
        assert toy.skills["a"].leaving  # the least recently used
        assert not toy.skills["b"].leaving
        (later,) = start(toy, "a")
        assert await toy.use("b") == digest("b")  # there is nothing that it had to wait for
        await asyncio.sleep(0.02)
        assert not waiting.done()
        assert not later.done()
        holds[0].__exit__()
        assert await waiting == digest("c")
        assert await later == digest("a")  # in place of c, as b is in use
        assert set(toy.loaded) == {"a", "b"}
        holds[1].__exit__()
        assert toy.consistent()
        assert not any(skill.leaving for skill in toy.skills.values())

    asyncio.run(run())


def test_who_waits_for_room_too_long_is_told_what_to_do(toy, monkeypatch):
    monkeypatch.setattr(resident, "PATIENCE", 0.1)

    async def run():
        with toy.skills.lease(toy.skills["a"]) as a, toy.skills.lease(toy.skills["b"]) as b:
            await asyncio.gather(a.ready(), b.ready())
            begun = time.monotonic()
            late = start(toy, "c", "d", "a", "c")
            found = await asyncio.gather(*late, return_exceptions=True)
            assert time.monotonic() - begun < 5
            assert [type(each) for each in found] == [
                LibraryFullError,
                LibraryFullError,
                str,  # it was to leave, and has not
                LibraryFullError,
            ]
            toy.skills.fetch("e")  # who only hints does not wait at all
            await toy.idle()
        assert await toy.use("c") == digest("c")
        assert toy.consistent()

    asyncio.run(run())
    assert [line["skill"] for line in toy.events("refusal")] == ["c", "d", "e"]


def test_what_is_larger_than_all_room_is_refused_at_once(toy):
    async def run():
        path = toy.skills.find("c")
        path.write_bytes(path.read_bytes().ljust(2 * SIZE + 1, b"x"))
        await toy.use("a")
        begun = time.monotonic()
        with pytest.raises(LibraryFullError, match="takes about 2,001 bytes, and there are 2,000"):
            await toy.use("c")
        assert time.monotonic() - begun < resident.PATIENCE / 2
        assert set(toy.loaded) == {"a"}

    asyncio.run(run())


def test_a_skill_that_takes_more_than_its_file_let_think(tmp_path):
    toy = Toy(tmp_path, room=4)
    toy.write(**{name: name for name in NAMES})
    toy.takes = {"b": 2 * SIZE, "c": 5 * SIZE, "d": 2 * SIZE}
    toy.limit = 9 * SIZE  # of the toy's own check, which sees it before it goes again

    async def run():
        await toy.skills.scan()
        for name in "ae":
            await toy.use(name)
        assert await toy.use("b") == digest("b")  # it fits
        assert set(toy.loaded) == {"a", "e", "b"}
        await toy.use("d")  # judged by what the last one took
        assert set(toy.loaded) == {"b", "d"}
        toy.limit = 4 * SIZE + 5 * SIZE
        with pytest.raises(LibraryFullError, match="takes 5,000 bytes"):
            await toy.use("c")
        assert "c" not in toy.loaded
        assert toy.skills.resident.budget.nbytes <= 4 * SIZE
        assert toy.order.count("c") == 1
        with pytest.raises(LibraryFullError):
            await toy.use("c")
        assert toy.order.count("c") == 1  # what it takes is known by now
        assert toy.consistent()

    asyncio.run(run())


def test_one_odd_skill_keeps_no_other_out(toy):
    async def run():
        toy.limit = 8 * SIZE  # of the toy's own check
        path = toy.skills.find("b")
        path.write_bytes(path.read_bytes().ljust(2 * SIZE, b"x"))
        toy.takes = {"a": 2 * SIZE, "b": 2 * SIZE, "c": 6 * SIZE}
        await toy.use("a")
        assert await toy.use("b") == digest("b")  # a file like a's would take 4,000
        with pytest.raises(LibraryFullError, match="takes 6,000 bytes, and there are 2,000"):
            await toy.use("c")
        assert await toy.use("d") == digest("d")
        assert await toy.use("e") == digest("e")  # judged by what the last one took
        assert set(toy.loaded) == {"d", "e"}
        assert toy.consistent()

    asyncio.run(run())


def test_a_bad_file_is_told_to_whoever_asks_and_logged_once(toy):
    async def run():
        toy.write("corrupt", a="a")
        for _ in range(3):
            with pytest.raises(FormatError, match="corrupt"):
                await toy.use("a")
        assert toy.order == ["a"]  # read once
        assert str(toy.skills["a"].failure[1]) == "it is corrupt"
        toy.write(a="ab")
        assert await toy.use("a") == digest("ab")  # also where nobody looks at the folder
        toy.failing = {"load"}
        for _ in range(2):  # what may pass is tried again
            with pytest.raises(HotgraftError, match="load fails"):
                await toy.use("b")
        toy.failing = set()
        assert await toy.use("b") == digest("b")
        toy.skills.find("c").unlink()
        with pytest.raises(FileNotFoundError):
            await toy.use("c")
        assert toy.consistent()

    asyncio.run(run())
    assert [line["skill"] for line in toy.events("refusal")] == ["a", "b", "b", "c"]


def test_errors_that_are_told_again_hold_nothing_of_those_who_were_told(toy):
    class Body:
        """What a request holds."""

    bodies = weakref.WeakSet()

    async def request():
        body = Body()
        bodies.add(body)
        with pytest.raises(FormatError, match="it is corrupt") as told:
            await toy.use("a")
        return told.value

    async def run():
        toy.write("corrupt", a="a")
        toy.go.clear()
        together = [asyncio.ensure_future(request()) for _ in range(3)]
        await begun(toy, "a")
        toy.go.set()
        found = await asyncio.gather(*together)
        found.append(await request())
        assert len({id(error) for error in found}) == len(found)
        assert toy.skills["a"].failure[1].__traceback__ is None
        del found, together
        gc.collect()
        assert not bodies

    asyncio.run(run())


def test_one_that_the_engine_is_not_done_with_goes_later(toy):
    async def run():
        await toy.use("a")
        await toy.use("b")
        toy.unfinished = {"a", "b"}
        (waiting,) = start(toy, "c")
        await asyncio.sleep(0.02)
        assert not waiting.done()
        toy.unfinished = {"a"}
        assert await waiting == digest("c")
        assert set(toy.loaded) == {"a", "c"}
        toy.unfinished = set()
        assert toy.consistent()

    asyncio.run(run())


def test_a_failing_eviction_takes_another_one(toy):
    async def run():
        await toy.use("a")
        await toy.use("b")
        toy.failing = {"unload"}
        (waiting,) = start(toy, "c")
        await asyncio.sleep(0.02)
        assert toy.consistent()
        toy.failing = set()
        assert await waiting == digest("c")
        assert toy.consistent()

    asyncio.run(run())
    assert {line["what"] for line in toy.events("refusal")} == {"evict"}


@pytest.mark.parametrize("when", ["coming", "leaving"])
def test_what_ranks_were_left_with_is_taken_back_by_the_next_load(toy, when):
    async def run():
        if when == "leaving":
            await toy.use("a")
        toy.failing = {"set", "unload"}
        with pytest.raises(HotgraftError, match=" fails"):
            await (toy.use("a") if when == "coming" else toy.skills.unload("a"))
        assert set(toy.loaded) == {"a"}
        assert not toy.skills["a"].loaded
        assert not toy.skills.resident.budget.nbytes
        with pytest.raises(HotgraftError, match="unload fails"):
            await toy.use("a")
        toy.failing = set()
        for name in "abc":
            assert await toy.use(name) == digest(name)
        assert toy.consistent()

    asyncio.run(run())


def test_a_file_that_was_empty_when_it_was_asked_for(toy, monkeypatch):
    """And is written when ranks read it: what is loaded must be known here."""
    plain = resident.signature_of
    empty = {"b": 0}  # by its name
    monkeypatch.setattr(
        resident, "signature_of", lambda path: (empty.get(path.name[0], 9), *plain(path)[1:])
    )

    async def run():
        for name in "ba":
            assert await toy.use(name) == digest(name)
        assert toy.consistent()
        assert set(toy.loaded) == {"a", "b"}  # "b" says nothing of what "a" takes

    asyncio.run(run())


def test_unloading_one_that_is_waited_for(toy):
    async def run():
        toy.go.clear()
        (other,) = start(toy, "a")
        await begun(toy, "a")
        (waiting,) = start(toy, "b")
        toy.skills.fetch("c")
        await asyncio.sleep(0)
        with pytest.raises(SkillInUseError, match="1 requests"):
            await toy.skills.unload("b")
        aborting = [
            asyncio.ensure_future(toy.skills.unload(name, abort=True)) for name in ("b", "c")
        ]
        await asyncio.sleep(0.01)
        toy.go.set()
        with pytest.raises(UnknownSkillError):
            await waiting
        await asyncio.gather(*aborting, other)
        assert toy.order == ["a"]
        assert set(toy.skills) == {"a", "d", "e"}
        assert toy.consistent()

    asyncio.run(run())


async def a_client(toy, chance, answered):
    """Asks for this and that, and sometimes goes away."""
    for _ in range(25):
        asking = asyncio.ensure_future(toy.use(chance.choice(NAMES), chance.randrange(6)))
        if chance.random() < 0.2:
            await asyncio.sleep(chance.random() / 200)
            asking.cancel()
        try:
            answered.append(await asking)
        except asyncio.CancelledError:
            pass
        except (LibraryFullError, UnknownSkillError, FormatError):
            pass
        except HotgraftError as error:
            if "fails" not in str(error):
                raise


async def an_operator(toy, chance):
    """Does whatever may be done, while things fail and files are replaced."""
    tasks = []
    for turn in range(60):
        name = chance.choice(NAMES)
        toy.failing = set()
        what = chance.choice(["unload", "abort", "fetch", "pin", "unpin", "write", "fail"])
        with contextlib.suppress(SkillInUseError, UnknownSkillError):
            if what in ("unload", "abort"):
                await toy.skills.unload(name, abort=what == "abort")
            elif what in ("fetch", "unpin"):
                getattr(toy.skills, what)(name)
            elif what == "pin":
                toy.skills.known(name)
                tasks.append(asyncio.ensure_future(toy.skills.pin(name)))
            elif what == "write":
                body = "corrupt" if chance.random() < 0.2 else "good"
                toy.write(body, **{name: f"{name}{turn:02}"})
            else:
                toy.failing = {chance.choice(["load", "set", "drop", "unload"])}
        await asyncio.sleep(chance.random() / 200)
        await toy.skills.scan()
    toy.failing = set()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("seed", range(6))
def test_a_random_walk(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(resident, "PATIENCE", 0.3)
    chance, answered = random.Random(seed), []
    toy = Toy(tmp_path, room=3)

    async def run():
        toy.write(**{name: name for name in NAMES})
        await toy.skills.scan()
        clients = [a_client(toy, chance, answered) for _ in range(8)]
        await asyncio.wait_for(asyncio.gather(an_operator(toy, chance), *clients), 60)
        await toy.idle()
        # Whatever happened: all is well again.
        for name in toy.skills:
            toy.skills.unpin(name)
        toy.write(**{name: f"{name}e" for name in NAMES})
        await toy.skills.scan()
        for name in NAMES:
            assert await toy.use(name) == digest(f"{name}e")
        assert all(skill.requests == 0 for skill in toy.skills.values())
        assert toy.consistent()

    asyncio.run(run())
    assert len(answered) > 20
