"""The library: what is loaded, what goes, and who waits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import factories
import hotgraft
import pytest
import torch
from hosts import State, contents, holds
from hotgraft import Graft, Library
from hotgraft.errors import (
    BaseMismatchError,
    DataError,
    FormatError,
    HotgraftError,
    LibraryFullError,
    SkillInUseError,
    UnknownSkillError,
)
from hotgraft.library.shelf import A_TENSOR
from torch import nn

NAMES = ("a", "b", "c", "d")


class Place:
    """A model, a folder with the files of four skills of one size, and their names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = nn.Linear(64, 64)  # arrays of a size that counts
        self.base = contents(self.model)
        self.host = hotgraft.attach(self.model)
        self.grafts = {
            name: factories.graft_on(self.base, seed=i, share=0.5) for i, name in enumerate(NAMES)
        }
        for name, graft in self.grafts.items():
            graft.save(self.path(name))
        self.nbytes = max(g.nbytes + A_TENSOR * len(g.names) for g in self.grafts.values())
        """What the largest is thought to take."""

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.graft.safetensors"

    def weights(self, name: str) -> State:
        return factories.grafted(self.base, self.grafts[name])

    def library(self, room: float = 100, **more: Any) -> Library:
        """With room for so many skills, of the folder's."""
        made = Library(self.host, loaded=int(room * self.nbytes), **more)
        made.scan(self.folder)
        return made


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    found.host.detach(force=True)
    assert holds(found.model, found.base)


def loaded(library: Library) -> list[str]:
    return [name for name in library if library[name].tier == "loaded"]


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
        assert library["b"].nbytes == place.host.skills["b"].nbytes
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
    with place.library(room=1) as library:
        if how == "pinned":
            library.pin("a")
        elif how == "live":
            library.activate("a")
        blocks = {
            "leased": lambda: library.lease("a"),
            "put back later": lambda: library.using("a"),
        }
        if how in blocks:
            with blocks[how]():
                with pytest.raises(LibraryFullError, match=r"'b' takes [\d,]+ bytes"):
                    library.activate("b")
                assert loaded(library) == ["a"]
        else:
            with pytest.raises(LibraryFullError):
                library.activate("b")
            assert loaded(library) == ["a"]
        assert library.stats.failures == 1
        if how == "pinned":
            library.unpin("a")
        place.host.deactivate()
        library.activate("b")
        assert loaded(library) == ["b"]
        place.host.deactivate()


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


class Gated:
    """Reads that wait until they are let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.names, self.go, self.begun = names, threading.Event(), threading.Event()
        load = Graft.load

        def slow(path: Any, **more: Any) -> Graft:
            if Path(path).name.partition(".")[0] in self.names:
                self.begun.set()
                assert self.go.wait(30)
            return load(path, **more)

        monkeypatch.setattr(Graft, "load", slow)


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

        def work(seed: int) -> None:
            order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
            for i in order:
                name = NAMES[i % len(NAMES)]
                try:
                    with library.lease(name):
                        if library[name].tier != "loaded":
                            wrong.append(name)
                except LibraryFullError:  # the others have it all
                    pass
                if library.stats.loaded_nbytes > 2 * place.nbytes:
                    wrong.append("budget")

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        assert not wrong
        stats = library.stats
        assert stats.loaded_nbytes == sum(library[name].nbytes for name in loaded(library))
        assert all(library[name].leases == 0 for name in library)


def test_a_skill_can_be_removed_while_it_is_read(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.library(workers=1) as library:
        gated = Gated(monkeypatch, "a")
        reading, queued = library.fetch("a"), library.fetch("b")
        assert gated.begun.wait(30)
        library.remove("b")
        assert queued.cancelled()
        thread = threading.Thread(target=library.remove, args=("a",))
        thread.start()
        gated.go.set()
        thread.join(30)
        assert reading.exception() is None
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
        with pytest.raises(SkillInUseError, match="there is a skill 'a' already"):
            library.add(place.path("a"))
        place.host.load(place.grafts["b"], name="theirs")
        with pytest.raises(SkillInUseError):
            library.add(place.path("b"), "theirs")
        with library.lease("a"), pytest.raises(SkillInUseError, match="'a' is leased"):
            library.remove("a")
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


# ---- folders -------------------------------------------------------------------------------------


def test_a_folder_is_followed(place: Place) -> None:
    with Library(place.host) as library:
        assert library.scan(place.folder).added == NAMES
        assert library.scan(place.folder) == ((), (), (), (), {})
        place.path("a").rename(place.path("z"))
        found = library.scan(place.folder)
        assert (found.added, found.removed) == (("z",), ("a",))
        with library.using("z"):
            assert holds(place.model, place.weights("a"))
            place.path("z").unlink()
            assert library.scan(place.folder).kept == ("z",)
        assert library.scan(place.folder).removed == ("z",)
        assert "z" not in place.host.skills


def test_a_replaced_file_is_taken_when_nobody_uses_the_old_one(place: Place) -> None:
    with place.library() as library:
        with library.using("a"):
            place.grafts["b"].save(place.path("a"))
            assert library.scan(place.folder).replaced == ("a",)
            with library.lease("a"):
                assert holds(place.model, place.weights("a"))  # as it was
        assert library["a"].id == place.grafts["a"].id
        with library.using("a"):
            assert holds(place.model, place.weights("b"))
        assert library["a"].id == place.grafts["b"].id
        place.grafts["c"].save(place.path("d"))  # of one that is not loaded
        library.scan(place.folder)
        assert library["d"].id == place.grafts["c"].id
        with library.using("d"):
            assert holds(place.model, place.weights("c"))


def test_a_file_replaced_by_a_damaged_one_is_an_error_until_it_is_mended(place: Place) -> None:
    with place.library() as library:
        library.fetch("a").result()
        place.grafts["b"].save(place.path("a"))
        data = bytearray(place.path("a").read_bytes())
        data[-1] ^= 1
        place.path("a").write_bytes(data)
        assert library.scan(place.folder).replaced == ("a",)
        for _ in range(2):
            with pytest.raises(FormatError):
                library.activate("a")
        place.grafts["c"].save(place.path("a"))
        library.scan(place.folder)
        with library.using("a"):
            assert holds(place.model, place.weights("c"))


def test_other_files_are_told_of_once(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.path("e").write_text("no graft")
    (place.folder / "notes.txt").write_text("not looked at")
    place.path(".hidden").write_text("being written")
    with caplog.at_level(logging.WARNING, "hotgraft.library"), Library(place.host) as library:
        for _ in range(3):
            found = library.scan(place.folder)
            assert list(found.failed) == ["e"]
            assert isinstance(found.failed["e"], FormatError)
        assert len(caplog.records) == 1
        place.path("e").write_text("still no graft")
        library.scan(place.folder)
        assert len(caplog.records) == 2
        place.grafts["a"].save(place.path("e"))
        assert library.scan(place.folder).added == ("e",)
        other = place.folder / "other"
        other.mkdir()
        place.grafts["a"].save(other / "a.graft.safetensors")
        assert "rename the file" in str(library.scan(other).failed["a"])
        assert len(library) == 5


def test_watching(place: Place) -> None:
    with Library(place.host) as library:
        with pytest.raises(DataError, match="more than 0"):
            library.watch(place.folder, every=0)
        assert library.watch(place.folder, every=0.02).added == NAMES
        place.path("a").unlink()
        eventually(lambda: "a" not in library)
        place.grafts["a"].save(place.path("y"))
        eventually(lambda: "y" in library)
    assert not any(thread.name == "hotgraft-watch" for thread in threading.enumerate())


def test_a_folder_that_is_not_there(place: Place, tmp_path: Path) -> None:
    with Library(place.host) as library, pytest.raises(FileNotFoundError):
        library.watch(tmp_path / "nowhere")
