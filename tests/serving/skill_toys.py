"""Ranks and a scheduler that do what they are told, and the skills of a server over them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading

from hotgraft.errors import FormatError, HotgraftError, SkillInUseError
from hotgraft.format import FORMAT, VERSION
from hotgraft.library.folder import ENDING
from hotgraft.serve.ranks import Loaded
from hotgraft.serve.vllm.metrics import Events
from hotgraft.serve.vllm.skills import Skills

SIZE = 1000
"""Bytes of a file, and what its skill takes."""


def digest(text):
    """What a file with this text states."""
    return (text * 64)[:64]


class Toy:
    """A server without vLLM: what is loaded is a dictionary, of names and digests."""

    def __init__(self, folder, room=10):
        self.loaded, self.known, self.failing = {}, {}, set()
        self.takes = {}  # what a skill takes, where that is not SIZE
        self.order = []  # the names of skills, as they were loaded
        self.go = threading.Event()
        self.go.set()
        self.unfinished = set()  # skills whose last request the engine is not done with
        self.log = io.StringIO()
        self.limit = room * SIZE
        self.skills = Skills(
            self, self.scheduler, folder, self.limit, lambda name: name == "base", Events(self.log)
        )

    def load(self, name, path, *, cast=False):
        assert not cast
        self.order.append(name)
        assert self.go.wait(30)
        header = json.loads(path.read_bytes()[8:].rstrip(b"x"))["__metadata__"]
        if header["body"] == "corrupt":
            raise FormatError("it is corrupt")
        self._fail("load")
        assert name not in self.loaded
        nbytes = self.takes.get(name, SIZE)
        self.loaded[name] = header["id"]
        assert sum(self.takes.get(each, SIZE) for each in self.loaded) <= self.limit
        return Loaded(name, header["id"], 7, nbytes)

    def unload(self, name):
        self._fail("unload")
        del self.loaded[name]

    async def scheduler(self, method, name, *rest):
        await asyncio.sleep(0)
        self._fail(method)
        if method == "set":
            assert name not in self.known
            self.known[name] = rest[0]
            return None
        if name in self.unfinished and not rest[0]:
            raise SkillInUseError("the engine has unfinished requests of it")
        del self.known[name]
        return 1 if rest[0] else 0

    def _fail(self, method):
        if method in self.failing:
            raise HotgraftError(f"{method} fails")

    def events(self, event):
        lines = map(json.loads, self.log.getvalue().splitlines())
        return [line for line in lines if line["event"] == event]

    def write(self, body="good", **texts):
        """Put files into the folder: a header, and something after it."""
        for name, text in texts.items():
            metadata = {"format": FORMAT, "version": str(VERSION), "id": digest(text), "body": body}
            header = json.dumps({"__metadata__": metadata}).encode()
            data = len(header).to_bytes(8, "little") + header
            path = self.skills.folder / f"{name}{ENDING}"
            path.with_suffix(".new").write_bytes(data.ljust(SIZE, b"x"))
            path.with_suffix(".new").rename(path)

    def consistent(self):
        """Whether all three agree on what is loaded."""
        digests = {skill.name: skill.digest for skill in self.skills.values() if skill.loaded}
        assert self.skills.resident.budget.nbytes == sum(
            self.takes.get(name, SIZE) for name in digests
        )
        return digests == self.loaded == self.known

    async def use(self, name, count=2):
        """A request for a skill; the digest of the weights that answered."""
        skill = self.skills.known(name)
        with self.skills.lease(skill) as lease:
            said = (await lease.ready()).digest
            reading = self.skills.serving(lease, outputs(count))
            async with contextlib.aclosing(reading):
                async for _ in reading:
                    assert self.loaded[name] == self.known[name] == said
        return said

    async def idle(self):
        """Wait until nothing is being loaded."""
        while self.skills.resident._working is not None:
            await asyncio.sleep(0.001)


async def outputs(count):
    for i in range(count):
        await asyncio.sleep(0)
        yield i


def load(toy, name):
    return toy.skills.load(name, toy.skills.find(name))
