"""The library: what is loaded, what goes, and who waits."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import factories
import hotgraft
import pytest
import torch
from hosts import contents, holds
from hotgraft import Graft, Library
from hotgraft.errors import (
    AdoptWarning,
    BaseMismatchError,
    DataError,
    FormatError,
    GraftError,
    HotgraftError,
    LibraryFullError,
    SkillInUseError,
    UnknownSkillError,
)
from hotgraft.library.shelf import A_TENSOR
from libraries import NAMES, Gated, Place, eventually, loaded
from torch import nn

# ---- loading and switching -----------------------------------------------------------------------


def test_skills_are_loaded_when_they_are_asked_for(place: Place) -> None:
    with place.library() as library:
        assert sorted(library) == list(NAMES)
        assert loaded(library) == []
        assert library["a"].id == place.grafts["a"].id  # from the header alone
        with library.using("a"):
            assert holds(place.model, place.weights("a"))
            assert library["a"].leases == 1
        assert holds(place.model, place.base)
        library.activate("b")
        assert holds(place.model, place.weights("b"))
        assert loaded(library) == ["a", "b"]
        assert library["b"].nbytes == place.grafts["b"].nbytes + 2 * A_TENSOR
        library.activate("a", "b", policy="priority", weights=[1.0, 1.0])
        assert place.host.active == ("a", "b")
        place.host.deactivate()
        assert library.stats[:3] == (4, 2, sum(library[n].nbytes for n in "ab"))
        assert (library.stats.hits, library.stats.misses) == (2, 2)
    assert not place.host.skills


def test_a_graft_can_be_added_as_it_is(place: Place) -> None:
    with Library(place.host) as library:
        assert library.add(place.grafts["a"]) == place.grafts["a"].id[:12]
        assert library.add(place.grafts["b"], "mine") == "mine"
        assert library["mine"].tier == "memory"
        with library.using("mine"):
            assert holds(place.model, place.weights("b"))
        library.remove("mine")
        assert "mine" not in library
        assert len(library) == 1


def test_fetching_does_not_wait(place: Place) -> None:
    with place.library() as library:
        library.fetch("c").result(timeout=30)
        assert loaded(library) == ["c"]
        again = library.fetch("c")
        assert again.done()


def test_options_are_those_of_load(place: Place) -> None:
    names = {name: name for name in place.base}
    with place.library(names=names.get, verify_id=False) as library, library.using("a"):
        assert holds(place.model, place.weights("a"))


# ---- the budget ----------------------------------------------------------------------------------


def test_the_least_recently_used_goes(place: Place) -> None:
    with place.library(room=2) as library:
        for name in ("a", "b", "a", "c"):
            with library.using(name):
                assert holds(place.model, place.weights(name))
            assert library.stats.loaded_nbytes <= 2 * place.nbytes
        assert loaded(library) == ["a", "c"]
        assert set(place.host.skills) == {"a", "c"}
        assert library.stats.evictions == 1
        assert library["b"].tier == "disk"


@pytest.mark.parametrize("how", ["pinned", "leased", "live", "put back later"])
def test_what_is_in_use_stays(place: Place, how: str) -> None:
    with place.library(room=1) as library, contextlib.ExitStack() as stack:
        if how == "pinned":
            library.pin("a")
        elif how == "leased":
            stack.enter_context(library.lease("a"))
        else:
            library.activate("a")
        if how == "put back later":
            place.host.load(place.grafts["d"], name="theirs")
            stack.enter_context(place.host.using("theirs"))
        with pytest.raises(LibraryFullError, match=r"'b' takes [\d,]+ bytes"):
            library.fetch("b").result()
        assert loaded(library) == ["a"]
        assert library.stats.failures == 1
        stack.close()
        library.unpin("a")
        place.host.deactivate()
        library.fetch("b").result()
        assert loaded(library) == ["b"]


def test_a_refused_skill_moves_nobody(place: Place) -> None:
    everything = hotgraft.diff(place.base, contents(nn.Linear(64, 64)))
    everything.save(place.path("large"))
    with place.library(room=2) as library:
        library.activate("a")
        library.fetch("b").result()
        with pytest.raises(LibraryFullError):
            library.fetch("large").result()
        assert loaded(library) == ["a", "b"]
        assert library.stats.evictions == 0
        place.host.deactivate()


def test_what_is_evicted_is_freed_at_once(place: Place) -> None:
    with place.library(room=1) as library:
        with library.using("a"):
            plan = weakref.ref(place.host.skills["a"].plan)
        gc.collect()
        gc.disable()
        try:
            library.fetch("b").result()
            assert plan() is None
        finally:
            gc.enable()


def test_a_refused_graft_is_freed_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    load = Graft.load

    def seen(path: Any, **more: Any) -> Graft:
        found = load(path, **more)
        kept.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Graft, "load", seen)
    factories.graft_on(contents(nn.Linear(64, 64)), seed=1, share=0.5).save(place.path("a"))
    with place.library() as library:
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(BaseMismatchError):
                library.activate("a")
            assert kept[0]() is None
        finally:
            gc.enable()


def test_a_skill_larger_than_the_budget_moves_nobody(place: Place) -> None:
    everything = hotgraft.diff(place.base, contents(nn.Linear(64, 64)))
    everything.save(place.path("large"))
    with place.library(room=1) as library:
        library.fetch("a").result()
        assert everything.nbytes > place.nbytes
        with pytest.raises(LibraryFullError):
            library.activate("large")
        assert loaded(library) == ["a"]


def test_evicted_grafts_stay_in_memory(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    load = Graft.load

    def counted(path: Any, **more: Any) -> Graft:
        reads.append(Path(path).name[0])
        return load(path, **more)

    monkeypatch.setattr(Graft, "load", counted)
    most = max(graft.nbytes for graft in place.grafts.values())
    with place.library(room=1, memory=2 * most) as library:
        for name in ("a", "b", "c", "d"):
            library.fetch(name).result()
            assert library.stats.memory_nbytes <= 2 * most
        assert [library[name].tier for name in "abcd"] == ["disk", "memory", "memory", "loaded"]
        for name in ("b", "a"):
            with library.using(name):
                assert holds(place.model, place.weights(name))
        assert reads == ["a", "b", "c", "d", "a"]
        for name in "abcd":
            library.remove(name)
        assert library.stats.memory_nbytes == library.stats.loaded_nbytes == 0


# ---- threads -------------------------------------------------------------------------------------


def test_reading_one_skill_stalls_nobody_else(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.library() as library:
        library.fetch("a").result()
        gated = Gated(monkeypatch, "b")
        slow = library.fetch("b")
        assert gated.begun.wait(30)
        for name in ("a", "c"):  # one that is loaded, and one that is not
            with library.using(name):
                assert holds(place.model, place.weights(name))
        assert library["b"].tier == "disk"
        assert len(library) == 4
        assert not slow.done()
        gated.go.set()
        slow.result(timeout=30)
        assert loaded(library) == ["a", "b", "c"]


def test_many_wait_for_one_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.library() as library, ThreadPoolExecutor(8) as pool:
        gated = Gated(monkeypatch, "a")

        def enter() -> str:
            with library.lease("a"):
                return library["a"].tier

        waiting = [pool.submit(enter) for _ in range(8)]
        eventually(lambda: library["a"].leases == 8)
        gated.go.set()
        assert [future.result(timeout=30) for future in waiting] == ["loaded"] * 8
        assert library["a"].leases == 0
        assert library.stats.misses == 8


def test_many_threads_many_skills_little_room(place: Place) -> None:
    with place.library(room=2, workers=3) as library:
        wrong: list[str] = []
        done: list[str] = []

        def work(seed: int) -> None:
            order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
            for i in order:
                name = NAMES[i % len(NAMES)]
                try:
                    with library.lease(name):
                        done.append(name)
                        if library[name].tier != "loaded":
                            wrong.append(name)
                except LibraryFullError:  # the others have it all
                    pass
                if library.stats.loaded_nbytes > 2 * place.nbytes:
                    wrong.append("budget")

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        assert not wrong
        assert set(done) == set(NAMES)
        stats = library.stats
        assert stats.loaded_nbytes == sum(library[name].nbytes for name in loaded(library))
        assert all(library[name].leases == 0 for name in library)


def test_who_gives_up_stops_nobody_else(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.library(workers=1) as library, ThreadPoolExecutor(1) as pool:
        gated = Gated(monkeypatch, "a")
        library.fetch("a")
        assert gated.begun.wait(30)
        waiting = pool.submit(library.activate, "b")
        eventually(lambda: library["b"].leases == 1)

        async def client() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.wrap_future(library.fetch("b")), 0.02)

        asyncio.run(client())
        gated.go.set()
        waiting.result(timeout=30)
        assert place.host.active == ("b",)
        place.host.deactivate()


def test_a_lease_right_after_an_eviction_loads_anew(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.library(room=1) as library:
        loads, others = library._shelf.load, ["b"]

        def evicted(volume: Any, graft: Graft) -> None:
            loads(volume, graft)
            if volume.name == "a" and others:
                library.fetch(others.pop()).result()

        monkeypatch.setattr(library._shelf, "load", evicted)
        library.fetch("a").result()
        assert loaded(library) == ["b"]
        with library.lease("a"):
            assert loaded(library) == ["a"]


def test_closing_tells_who_waits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    library = place.library(workers=1)
    gated = Gated(monkeypatch, "a")
    with ThreadPoolExecutor(2) as pool:
        library.fetch("a")
        assert gated.begun.wait(30)
        waiting = pool.submit(library.activate, "b")
        eventually(lambda: library["b"].leases == 1)
        fetched = library.fetch("c")
        closing = pool.submit(library.close)
        eventually(library._closed.is_set)
        gated.go.set()
        closing.result(timeout=30)
        for future in (waiting, fetched):
            with pytest.raises(HotgraftError, match="the library is closed"):
                future.result(timeout=30)
    assert not place.host.skills


def test_what_the_host_lets_go_is_loaded_again(place: Place) -> None:
    with place.library(room=2) as library:
        for name in ("a", "b"):
            library.fetch(name).result()
        place.host.unload("a")
        with library.using("a"):
            assert holds(place.model, place.weights("a"))
        with torch.no_grad():
            place.model.weight.copy_(torch.arange(4096.0).view(64, 64))
        with pytest.warns(AdoptWarning):
            assert set(place.host.adopt()) == {"a", "b"}
        now = contents(place.model)
        hotgraft.diff(now, contents(nn.Linear(64, 64)), count=100).save(place.path("n"))
        library.scan(place.folder)
        with library.using("n"):
            assert not holds(place.model, now)
        with pytest.raises(BaseMismatchError):
            library.activate("a")
        library.remove("b")
        assert library.stats.loaded_nbytes == library["n"].nbytes
        place.base = now


def test_five_thousand_skills(place: Place, tmp_path: Path) -> None:
    """The budget is kept, and what is loaded is switched to as fast as among ten."""
    many = tmp_path / "many"
    many.mkdir()

    def quickest() -> float:
        """Of many switches between two skills that are loaded: other work on the machine is out."""
        took = []
        with library.lease("s0", "s1"):
            for i in range(300):
                before = time.perf_counter()
                library.activate(f"s{i % 2}")
                took.append(time.perf_counter() - before)
            place.host.deactivate()
        return min(took)

    with Library(place.host, loaded=40 * place.nbytes) as library:
        for known in (10, 5000):
            for i in range(len(library), known):
                os.link(place.path(NAMES[i % 4]), many / f"s{i}.graft.safetensors")
            library.scan(many)
            assert len(library) == known
            for i in range(0, known, max(known // 100, 1)):
                with library.using(f"s{i}"):
                    assert holds(place.model, place.weights(NAMES[i % 4]))
                    assert library.stats.loaded_nbytes <= 40 * place.nbytes
                    assert len(place.host.skills) == library.stats.loaded
            if known == 10:
                few = quickest()
        assert 30 < library.stats.loaded < 60
        assert library.stats.evictions > 40
        assert quickest() < 3 * few


def test_a_skill_can_be_removed_while_it_is_read(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.library(workers=1) as library:
        gated = Gated(monkeypatch, "a")
        reading, queued = library.fetch("a"), library.fetch("b")
        assert gated.begun.wait(30)
        library.remove("b")
        thread = threading.Thread(target=library.remove, args=("a",))
        thread.start()
        gated.go.set()
        thread.join(30)
        assert reading.exception() is None
        assert isinstance(queued.exception(30), UnknownSkillError)
        assert sorted(library) == ["c", "d"]
        assert not place.host.skills
        assert library.stats.loaded_nbytes == 0


# ---- failures ------------------------------------------------------------------------------------


def test_a_damaged_file_fails_for_who_asks(place: Place) -> None:
    data = bytearray(place.path("a").read_bytes())
    data[-1] ^= 1
    place.path("a").write_bytes(data)
    with place.library() as library:
        for _ in range(2):
            with pytest.raises(FormatError, match=r"a\.graft\.safetensors: "):
                library.activate("a")
        library.activate("b")
        assert library.stats.failures == 2
        assert library.stats.loaded_nbytes == library["b"].nbytes
        place.host.deactivate()
        place.grafts["a"].save(place.path("a"))
        library.scan(place.folder)
        with library.using("a"):  # mended
            assert holds(place.model, place.weights("a"))


def test_a_graft_of_another_base_is_refused(place: Place) -> None:
    other = contents(nn.Linear(64, 64))
    factories.graft_on(other, seed=1, share=0.5).save(place.path("a"))
    with place.library() as library:
        with pytest.raises(BaseMismatchError):
            library.activate("a")
        with pytest.raises(BaseMismatchError):
            library.fetch("a").result()
        assert library.stats.loaded_nbytes == 0
        library.pin("b")


def test_a_file_that_vanished(place: Place) -> None:
    with place.library() as library:
        place.path("a").unlink()
        with pytest.raises(FileNotFoundError):
            library.activate("a")


def test_names(place: Place) -> None:
    with place.library() as library:
        with pytest.raises(UnknownSkillError, match="no skill 'x' in the library, which has 4"):
            library.activate("x")
        with pytest.raises(UnknownSkillError):
            library.activate("a", "x")
        assert library["a"].leases == 0
        with pytest.raises(UnknownSkillError):
            library.remove(["a"])  # type: ignore[arg-type]
        with pytest.raises(GraftError, match="its name is a string"):
            library.add(place.path("a"), 3)  # type: ignore[arg-type]
        with pytest.raises(SkillInUseError, match="there is a skill 'a' already"):
            library.add(place.path("a"))
        place.host.load(place.grafts["b"], name="theirs")
        with pytest.raises(SkillInUseError):
            library.add(place.path("b"), "theirs")
        with library.lease("a"), pytest.raises(SkillInUseError, match="'a' is leased"):
            library.remove("a")
        library.pin("a")
        with pytest.raises(SkillInUseError, match="'a' is pinned"):
            library.remove("a")
        library.unpin("a")
        library.activate("a")
        with pytest.raises(SkillInUseError, match="live"):
            library.remove("a")
        assert "a" in library
        place.host.deactivate()


@pytest.mark.parametrize(
    ("name", "number"),
    [("loaded", 0), ("loaded", 1.5), ("memory", -1), ("workers", 0), ("workers", True)],
)
def test_numbers_out_of_range(name: str, number: Any) -> None:
    with pytest.raises(DataError, match=f"{name} {number!r}: wanted a whole number"):
        Library(hotgraft.attach(nn.Linear(2, 2)), **{name: number})


def test_a_closed_library(place: Place) -> None:
    library = place.library()
    library.activate("a")
    library.fetch("b").result()
    library.close()
    assert place.host.active == ("a",)
    assert set(place.host.skills) == {"a"}  # live, so it stays
    for use in (lambda: library.activate("a"), lambda: library.scan(place.folder)):
        with pytest.raises(HotgraftError, match="the library is closed"):
            use()
    library.close()
