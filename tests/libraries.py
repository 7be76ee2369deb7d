"""A folder of skills and a library of them, for the tests of libraries."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factories
import hotgraft
import pytest
from hosts import State, contents
from hotgraft import Graft, Library
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


def loaded(library: Library) -> list[str]:
    return [name for name in library if library[name].tier == "loaded"]


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
