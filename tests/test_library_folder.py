"""A library that follows a folder: files that come, go and are no grafts."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from hosts import holds
from hotgraft import Library
from hotgraft.errors import (
    DataError,
    FormatError,
)
from libraries import NAMES, Place, eventually


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
    place.path("loop").symlink_to(place.path("loop"))
    with caplog.at_level(logging.WARNING, "hotgraft.library"), Library(place.host) as library:
        for _ in range(3):
            found = library.scan(place.folder)
            assert list(found.failed) == ["e", "loop"]
            assert isinstance(found.failed["e"], FormatError)
            assert isinstance(found.failed["loop"], OSError)
        assert len(caplog.records) == 2
        place.path("e").write_text("still no graft")
        library.scan(place.folder)
        assert len(caplog.records) == 3
        place.grafts["a"].save(place.path("e"))
        assert library.scan(place.folder).added == ("e",)
        other = place.folder / "other"
        other.mkdir()
        place.grafts["a"].save(other / "a.graft.safetensors")
        assert "rename the file" in str(library.scan(other).failed["a"])
        assert len(library) == 5


def test_a_scan_leaves_alone_what_it_did_not_add(place: Place) -> None:
    with Library(place.host) as library:
        library.add(place.path("a"), "mine")
        library.scan(place.folder)
        for name in ("b", "c"):
            place.path(name).unlink()
        library.remove("c")
        assert library.scan(place.folder).removed == ("b",)
        assert sorted(library) == ["a", "d", "mine"]


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
