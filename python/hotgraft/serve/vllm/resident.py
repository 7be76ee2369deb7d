"""Resident: which of a server's skills are loaded, within a number of bytes.

`hotgraft.library` does the same for one host, for threads that may block. Here are all ranks of a
server and one event loop, in which nothing may: loads and evictions are awaited, the scheduler has
its say, and who finds everything in use waits his turn. What both share is the order in which
skills go (`hotgraft.library.budget`), and how a folder's files are read.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import dataclasses
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hotgraft.errors import LibraryFullError, SkillInUseError, UnknownSkillError
from hotgraft.library.budget import Budget
from hotgraft.library.folder import signature_of
from hotgraft.library.shelf import Signature
from hotgraft.serve.ranks import Loaded
from hotgraft.serve.vllm.leases import Lease, Skill, again

PATIENCE = 10.0
"""Seconds for which a request waits for room."""
LOOK_EVERY = 0.1
"""Seconds after which it looks again whether there is room: the engine may still be at work on the
last request of a skill after its client has gone."""
WAIT_BOUNDS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Seconds: the upper bounds of the counted waits; one more count is for those above."""

T = TypeVar("T")


class Ranks(Protocol):
    """What is needed of `hotgraft.serve.ranks.Ranks`."""

    def load(self, name: str, path: str | os.PathLike[str], *, cast: bool = False) -> Loaded:
        """On all ranks, or on none."""
        ...

    def unload(self, name: str) -> None:
        """From all ranks."""
        ...


@dataclasses.dataclass
class Counts:
    """What happened so far."""

    hits: int = 0
    """Requests whose skill was loaded."""
    misses: int = 0
    """Requests that had to wait for it."""
    evictions: int = 0
    waits: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(WAIT_BOUNDS) + 1))
    """How many waits ended within each of `WAIT_BOUNDS`, but not the one before it."""
    wait_seconds: float = 0.0
    """All of these together."""

    def count_wait(self, seconds: float) -> None:
        """A request has its skill after so long, or will not get it."""
        self.waits[bisect.bisect_left(WAIT_BOUNDS, seconds)] += 1
        self.wait_seconds += seconds


class Resident:
    """Loads skills in the order in which they are asked for, and lets others go for them.

    One is loaded at a time, those that a request waits for before those that are merely expected to
    be asked for. A skill is loaded on all ranks first and then made known to the scheduler; it goes
    the other way round. The least recently used ones go, of those that no request uses and nobody
    has pinned. Where these do not make room, the least recently used of the others are to go as
    soon as their requests have ended, and new requests of theirs wait in line: so nobody can keep
    others out for ever. Who has waited for `PATIENCE` seconds gets an error.

    All methods are called in the server's event loop; ranks are spoken to in a thread of its own.

    Args:
        ranks: the workers.
        scheduler: calls a method of `hotgraft.serve.vllm.core` in the engine.
        limit: bytes that loaded skills may take on all ranks together.
        report: is told of each event, by its name and with what there is to say.
        folder: clients are told of files by their paths in there.
    """

    def __init__(
        self,
        ranks: Ranks,
        scheduler: Callable[..., Awaitable[Any]],
        limit: int,
        report: Callable[..., None],
        folder: Path,
    ) -> None:
        self.budget = Budget[Skill](limit)
        self.counts = Counts()
        self._ranks = ranks
        self._scheduler = scheduler
        self._report = report
        self._folder = folder
        self._wanted: dict[Skill, None] = {}  # in the order in which they were asked for
        self._loading: Skill | None = None
        self._working: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()  # held while skills come and go
        self._freed = asyncio.Event()
        self._left: set[str] = set()  # names that ranks may still have, and nobody else
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hotgraft-skills")
        self._factor = 1.0
        """What the skill that was loaded last takes of its file's bytes."""

    # ---- requests ------------------------------------------------------------------------------

    def lease(self, skill: Skill) -> Lease:
        """A hold on a skill, to be entered."""
        return Lease(skill, self._enter, self._freed.set)

    def _enter(self, lease: Lease) -> asyncio.Future[None] | None:
        skill = lease.skill
        if skill.usable:
            self.counts.hits += 1
            self.budget.touch(skill)
            skill.using.add(lease)
            return None
        self.counts.misses += 1
        if not skill.waiting:
            self._wanted.pop(skill, None)  # a hint's place in line is not a request's
        skill.waiting.add(lease)
        return self._want(skill)

    def hint(self, skill: Skill) -> None:
        """A request for this skill is likely: load it, when no request waits for another one."""
        if skill.usable:
            self.budget.touch(skill)
        else:
            skill.hinted = True
            self._want(skill)

    def _want(self, skill: Skill) -> asyncio.Future[None]:
        coming = skill.coming
        if coming is None:
            coming = skill.coming = asyncio.get_running_loop().create_future()
            coming.add_done_callback(lambda done: done.exception())  # perhaps nobody else asks
        self._wanted.setdefault(skill)
        if skill.forgotten:
            self._settle(skill, _gone(skill))
        elif self._working is None:
            self._working = asyncio.ensure_future(self._work())
        return coming

    def is_loading(self, skill: Skill) -> bool:
        """Whether a skill is being loaded just now, and cannot be stopped."""
        return self._loading is skill

    # ---- loading -------------------------------------------------------------------------------

    async def _work(self) -> None:
        try:
            while self._wanted:
                skill = next((one for one in self._wanted if one.waiting), None)
                skill = skill or next(iter(self._wanted))
                try:
                    await self._bring(skill)
                except Exception as error:
                    self._settle(skill, error)
                else:
                    self._settle(skill, None)
        finally:
            self._working = None

    def _settle(self, skill: Skill, error: Exception | None) -> None:
        """Tell all who wait for a skill what came of it."""
        self._wanted.pop(skill, None)
        now = time.monotonic()
        for lease in skill.waiting:
            self.counts.count_wait(now - lease.since)
        if error is None:
            # At once, and not when they come to it: before that it might have gone again.
            skill.using |= skill.waiting
        skill.waiting.clear()
        skill.hinted = False
        coming, skill.coming = skill.coming, None
        if coming is None:  # they were told before
            return
        if error is None:
            coming.set_result(None)
        else:
            coming.set_exception(error)

    async def _bring(self, skill: Skill) -> None:
        """Load a skill if anybody still wants it."""
        try:
            while lacking := await self._try(skill):
                await self._wait_for_room(skill, lacking)
        finally:
            for kept in self.budget.all():
                kept.leaving = False

    async def _try(self, skill: Skill) -> int:
        """Load a skill; returns 0, or how many bytes there is no room for."""
        async with self._changing:
            self._freed.clear()
            if skill.forgotten:
                raise _gone(skill)
            if skill.usable or not (skill.waiting or skill.hinted):
                return 0
            if skill.loaded:  # its file is another one
                with contextlib.suppress(SkillInUseError):
                    await self.take_out(skill)
                if skill.loaded:
                    return 0
            found = await self._signature(skill)
            if skill.failure is not None and skill.failure[0] == found:
                raise again(skill.failure[1])  # as before, so it is not read again
            wanted = self._wanted_bytes(skill, found)
            if not await self._make_room(wanted):
                return wanted
            return 0 if await self._load(skill, found) else self._wanted_bytes(skill, found)

    def _wanted_bytes(self, skill: Skill, found: Signature) -> int:
        """What a skill takes, or is thought to."""
        if skill.took is not None and skill.took[0] == found:
            return skill.took[1]
        size = found[0]
        # One whose file would fit is not refused for what another one took.
        return min(math.ceil(size * self._factor), max(size, self.budget.limit))

    async def _signature(self, skill: Skill) -> Signature:
        try:
            return await asyncio.to_thread(signature_of, skill.path)
        except OSError as error:
            self.refuse("load", skill.name, error)
            raise again(error, self._folder) from error

    async def _load(self, skill: Skill, found: Signature) -> bool:
        """Whether it is loaded now, and within the limit."""
        started = time.perf_counter()
        self._loading = skill
        cast = skill.cast
        try:
            if skill.name in self._left:
                await self._take_back(skill)
            loaded = await self._in_thread(
                lambda: self._ranks.load(skill.name, skill.path, cast=cast)
            )
            try:
                await self._scheduler("set", skill.name, loaded.id)
            except BaseException:
                self._left.add(skill.name)
                with contextlib.suppress(Exception):  # else the next load of this name does it
                    await self._take_back(skill)
                raise
        except Exception as error:
            # What is wrong with a file stays so until it is another; the rest may be better later.
            told = again(error, self._folder)
            skill.failure = (found, told) if isinstance(told, ValueError) else None
            self.refuse("load", skill.name, error)
            raise again(told) from error
        finally:
            self._loading = None
        skill.stale, skill.failure = False, None
        skill.digest, skill.entries, skill.nbytes = loaded.id, loaded.nnz, loaded.nbytes
        skill.signature, skill.took = found, (found, loaded.nbytes)
        if found[0]:  # a file may have been empty when it was asked for
            self._factor = loaded.nbytes / found[0]
        self.budget.put(skill, skill.nbytes)
        self._report(
            "load",
            skill=skill.name,
            digest=skill.digest,
            entries=skill.entries,
            bytes=skill.nbytes,
            resident=self.budget.nbytes,
            seconds=round(time.perf_counter() - started, 6),
        )
        skill.loaded = await self._make_room(0, but=skill)  # it can take more than was thought
        if not skill.loaded:
            await self._evict(skill)
        return skill.loaded

    async def _take_back(self, skill: Skill) -> None:
        """Unload from the ranks what the scheduler does not know."""
        with contextlib.suppress(UnknownSkillError):
            await self._in_thread(lambda: self._ranks.unload(skill.name))
        self._left.discard(skill.name)

    async def _make_room(self, wanted: int, but: Skill | None = None) -> bool:
        """Let skills go that nobody uses, until so many bytes are free."""

        def may_go(kept: Skill) -> bool:
            return kept.idle and kept is not but

        for victim in self.budget.candidates(wanted, may_go):
            if self.budget.fits(wanted):
                break
            if may_go(victim):  # still
                with contextlib.suppress(Exception):  # it was reported
                    await self._evict(victim)
        return self.budget.fits(wanted)

    async def _wait_for_room(self, skill: Skill, wanted: int) -> None:
        """Wait until something may have changed.

        Raises:
            LibraryFullError: it was waited for long enough, or waiting is of no use.
        """
        if not (skill.waiting or skill.hinted):
            return
        begun = min((lease.since for lease in skill.waiting), default=-math.inf)
        left = begun + PATIENCE - time.monotonic()
        others = self.budget.candidates(wanted, lambda kept: not kept.pinned)
        if not others or left <= 0:
            error = self._full(skill, wanted)
            self.refuse("load", skill.name, error)
            raise error
        lacking = self.budget.excess(wanted)
        for kept in sorted(others, key=lambda kept: bool(kept.using)):  # by their last use
            kept.leaving = lacking > 0
            lacking -= kept.nbytes
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._freed.wait(), min(left, LOOK_EVERY))

    def _full(self, skill: Skill, wanted: int) -> LibraryFullError:
        about = "" if skill.took is not None and skill.took[1] == wanted else "about "
        if wanted > self.budget.limit:
            return LibraryFullError(
                f"the skill {skill.name!r} takes {about}{wanted:,} bytes, and there are "
                f"{self.budget.limit:,} for all loaded skills: start the server with a larger "
                "--resident"
            )
        pinned = sum(kept.nbytes for kept in self.budget.all() if kept.pinned)
        return LibraryFullError(
            f"there is no room for the skill {skill.name!r}: it takes {about}{wanted:,} bytes, and "
            f"of the {self.budget.limit:,} for loaded skills {self.budget.nbytes:,} are taken by "
            f"others, {pinned:,} by pinned ones and the rest by those in use; try again later, "
            "unpin some, or start the server with a larger --resident"
        )

    # ---- leaving -------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """Nothing else comes or goes in here."""
        async with self._changing:
            yield

    async def take_out(self, skill: Skill, *, abort: bool = False) -> int:
        """Unload a skill, in `changing`; on an error it stays loaded, if the scheduler agrees.

        Args:
            skill: a loaded one.
            abort: finish its requests with an error.

        Returns:
            how many requests were.

        Raises:
            SkillInUseError: requests of it are being answered.
            HotgraftError: a rank or the scheduler failed.
        """
        skill.loaded = False  # from here on requests wait
        known = True
        try:
            aborted = int(await self._scheduler("drop", skill.name, abort))
            known = False
            await self._in_thread(lambda: self._ranks.unload(skill.name))
        except BaseException:
            try:
                if not known:
                    await self._scheduler("set", skill.name, skill.digest)
            except Exception:
                self._left.add(skill.name)
                self._count_out(skill)
            else:
                skill.loaded = True
            raise
        self._count_out(skill)
        return aborted

    def _count_out(self, skill: Skill) -> None:
        self.budget.remove(skill)
        skill.nbytes, skill.stale, skill.leaving = 0, False, False
        self._freed.set()

    def forget(self, skill: Skill) -> None:
        """It is no skill of the server any more: who waits for it is told."""
        skill.forgotten = True
        self._settle(skill, _gone(skill))
        self._freed.set()

    def unpin(self, skill: Skill) -> None:
        """Let it go when room is wanted."""
        skill.pinned = False
        self._freed.set()

    async def _evict(self, skill: Skill) -> None:
        nbytes = skill.nbytes
        try:
            await self.take_out(skill)
        except SkillInUseError:  # the engine is not done with its last request
            raise
        except Exception as error:
            self.refuse("evict", skill.name, error)
            raise
        self.counts.evictions += 1
        self._report("evict", skill=skill.name, bytes=nbytes, resident=self.budget.nbytes)

    def refuse(self, what: str, name: str, error: Exception) -> None:
        """Report what did not succeed."""
        self._report("refusal", what=what, skill=name, kind=type(error).__name__, why=str(error))

    async def _in_thread(self, do: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, do)


def _gone(skill: Skill) -> UnknownSkillError:
    return UnknownSkillError(f"the skill {skill.name!r} was unloaded meanwhile")
