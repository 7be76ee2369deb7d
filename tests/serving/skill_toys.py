"""Ranks and a scheduler that do what they are told, and the skills of a server over them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from collections import Counter

from hotgraft.errors import FormatError, HotgraftError, SkillInUseError, UnknownSkillError
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
        self.running = {}  # the requests of each skill that the engine is at work on
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
        assert rest[0] or not self.running.get(name, {}).get("requests"), "it is in use"
        self.running.pop(name, None)  # they are aborted
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
        """A request for a skill; the digest of the weights that answered.

        Raises `UnknownSkillError` if it is aborted, and whatever a lease does.
        """
        skill = self.skills.known(name)
        with self.skills.lease(skill) as lease:
            said = (await lease.ready()).digest
            reading = self.skills.serving(lease, outputs(count))
            running = None
            try:
                async with contextlib.aclosing(reading):
                    async for _ in reading:
                        if running is None:
                            running = self.running.setdefault(name, Counter())
                            running["requests"] += 1
                        if self.running.get(name) is not running or name not in self.known:
                            raise UnknownSkillError("it was aborted")
                        assert self.loaded[name] == self.known[name] == said
            finally:
                if running is not None:
                    running["requests"] -= 1
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
