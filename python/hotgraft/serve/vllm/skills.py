"""Skills: what a running server has, as its API process sees it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hotgraft.errors import HotgraftError, SkillInUseError, UnknownSkillError
from hotgraft.serve.ranks import Loaded

SUFFIX = ".graft.safetensors"
"""Of graft files; what stands before it is the skill's name."""
LOOK_EVERY = 2.0
"""Seconds between two looks at a watched folder."""

T = TypeVar("T")
Stamp = tuple[int, int, int]
"""What tells a file from one that replaced it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Skill:
    """A skill that requests can name."""

    name: str
    digest: str
    """The graft's id."""
    path: Path
    entries: int
    nbytes: int
    """What it takes on all ranks together."""


class Ranks(Protocol):
    """What is needed of `hotgraft.serve.ranks.Ranks`."""

    def load(self, name: str, path: str | os.PathLike[str], *, cast: bool = False) -> Loaded:
        """On all ranks, or on none."""
        ...

    def unload(self, name: str) -> None:
        """From all ranks."""
        ...


class Skills(Mapping[str, Skill]):
    """The skills of a server, by name.

    A skill is loaded on all ranks first and then made known to the scheduler, and only then can
    requests name it. It leaves the other way round. All methods are called in the server's event
    loop; ranks are spoken to in a thread of its own, one load at a time, and steps go on.

    Args:
        ranks: the workers.
        scheduler: calls a method of `hotgraft.serve.vllm.core` in the engine.
        folder: where the files are; nothing outside of it is loaded.
        taken: whether a name means something else already, such as the base.
        report: is told of each event, by its name and with what there is to say.
    """

    def __init__(
        self,
        ranks: Ranks,
        scheduler: Callable[..., Awaitable[Any]],
        folder: Path,
        taken: Callable[[str], bool],
        report: Callable[..., None],
    ) -> None:
        self.folder = folder
        self._ranks = ranks
        self._scheduler = scheduler
        self._taken = taken
        self._report = report
        self._table: dict[str, Skill] = {}
        self._busy: set[str] = set()  # names of skills that are coming or going
        self._seen: dict[str, Stamp] = {}  # the files that were loaded, or found to be bad
        self._requests: Counter[Skill] = Counter()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hotgraft-skills")

    def __getitem__(self, name: str) -> Skill:
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def all(self) -> list[Skill]:
        """All of them, in one go, so that other threads may ask."""
        return list(self._table.values())

    # ---- requests ------------------------------------------------------------------------------

    def requests(self, skill: Skill) -> int:
        """How many of a skill's requests are being answered."""
        return self._requests[skill]

    async def serving(
        self, skill: Skill, outputs: AsyncGenerator[T, None]
    ) -> AsyncGenerator[T, None]:
        """A request's outputs; the skill is in use until they end, or nobody reads on.

        Raises:
            UnknownSkillError: the skill was unloaded since the request named it.
        """
        async with contextlib.aclosing(outputs):
            if self._table.get(skill.name) is not skill:
                raise UnknownSkillError(f"the skill {skill.name!r} has just been unloaded")
            self._requests[skill] += 1
            try:
                async for output in outputs:
                    yield output
            finally:
                self._requests[skill] -= 1
                if not self._requests[skill]:
                    del self._requests[skill]

    # ---- coming and going ----------------------------------------------------------------------

    def find(self, name: str, file: str | None = None) -> Path:
        """The file that a skill would be loaded from.

        Args:
            name: of the skill.
            file: relative to the folder; without it, the name with `SUFFIX`.

        Raises:
            HotgraftError: it is outside of the folder.
            FileNotFoundError: it is not there.
        """
        path = self.folder / (f"{name}{SUFFIX}" if file is None else file)
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise HotgraftError(f"{path.name!r} is outside of the folder of skills")
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path.name!r} in the folder of skills")
        return path

    async def load(self, name: str, path: Path, *, cast: bool = False) -> Skill:
        """Load a skill; requests are answered meanwhile.

        Goes on to its end if the caller is cancelled.

        Raises:
            SkillInUseError: there is one of that name, or one is coming or going.
            HotgraftError: the name means something else.
            FormatError, OSError, BaseMismatchError, CoverageError, LayoutError, NonFiniteError: it
                cannot be loaded; nothing has changed.
        """
        return await asyncio.shield(asyncio.ensure_future(self._load(name, path, cast)))

    async def _load(self, name: str, path: Path, cast: bool) -> Skill:
        started = time.perf_counter()
        try:
            self._require_free(name)
            with self._holding(name):
                self._seen[name] = _stamp(path)
                loaded = await self._in_thread(lambda: self._ranks.load(name, path, cast=cast))
                try:
                    await self._scheduler("set", name, loaded.id)
                except BaseException:
                    await self._in_thread(lambda: self._ranks.unload(name))
                    raise
                skill = Skill(name, loaded.id, path, loaded.nnz, loaded.nbytes)
                self._table[name] = skill
        except Exception as error:
            self._refuse("load", name, error)
            raise
        self._report(
            "load",
            skill=name,
            digest=skill.digest,
            entries=skill.entries,
            bytes=skill.nbytes,
            seconds=round(time.perf_counter() - started, 6),
        )
        return skill

    async def unload(self, name: str, *, abort: bool = False) -> None:
        """Forget a skill.

        Goes on to its end if the caller is cancelled.

        Args:
            name: of the skill.
            abort: finish its requests with an error.

        Raises:
            UnknownSkillError: there is none of that name.
            SkillInUseError: requests of it are being answered, or it is coming or going.
        """
        await asyncio.shield(asyncio.ensure_future(self._unload(name, abort)))

    async def _unload(self, name: str, abort: bool) -> None:
        try:
            aborted = await self._take_out(name, abort)
        except Exception as error:
            self._refuse("unload", name, error)
            raise
        self._report("unload", skill=name, aborted=aborted)

    async def _take_out(self, name: str, abort: bool) -> int:
        if name in self._busy:
            raise SkillInUseError(f"the skill {name!r} is just being loaded or unloaded")
        if name not in self._table:
            raise UnknownSkillError(f"no skill {name!r} is loaded")
        skill = self._table[name]
        if self._requests[skill] and not abort:
            raise SkillInUseError(
                f"the skill {name!r} is in use by {self._requests[skill]} requests; wait for them, "
                "or abort them"
            )
        with self._holding(name):
            del self._table[name]  # from here on requests that name it are told that it is unknown
            known = True
            try:
                aborted = int(await self._scheduler("drop", name, abort))
                known = False
                await self._in_thread(lambda: self._ranks.unload(name))
            except BaseException:
                if not known:
                    await self._scheduler("set", name, skill.digest)
                self._table[name] = skill
                raise
        return aborted

    def _require_free(self, name: str) -> None:
        if name in self._busy:
            raise SkillInUseError(f"a skill {name!r} is just being loaded or unloaded")
        if name in self._table:
            raise SkillInUseError(f"a skill {name!r} is loaded already; unload it first")
        if not name or self._taken(name):
            raise HotgraftError(f"no skill can be called {name!r}: that names something else here")

    @contextlib.contextmanager
    def _holding(self, name: str) -> Iterator[None]:
        self._busy.add(name)
        try:
            yield
        finally:
            self._busy.discard(name)

    def _refuse(self, what: str, name: str, error: Exception) -> None:
        self._report("refusal", what=what, skill=name, kind=type(error).__name__, why=str(error))

    async def _in_thread(self, do: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, do)

    # ---- the folder ----------------------------------------------------------------------------

    async def scan(self) -> None:
        """Load what is new in the folder, and unload what is gone from it.

        A file that was replaced counts as both. What cannot be loaded is reported once; what is in
        use, and cannot be unloaded now, is tried again by the next scan. A skill that somebody
        unloaded by request comes back when its file is replaced.
        """
        files = await asyncio.to_thread(_graft_files, self.folder)
        for name, skill in list(self._table.items()):
            found = _stamp_or_none(skill.path)
            if found == self._seen.get(name) or name in self._busy or self._requests[skill]:
                continue
            with contextlib.suppress(Exception):
                await self.unload(name)
                if found is None:
                    del self._seen[name]
        for name, path in files.items():
            stamp = _stamp_or_none(path)
            free = name not in self._table and name not in self._busy
            if stamp is not None and free and stamp != self._seen.get(name):
                with contextlib.suppress(Exception):  # it was reported
                    self._seen[name] = stamp  # also where the name is refused
                    await self.load(name, path)

    async def watch(self) -> None:
        """Scan from time to time, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                await self.scan()
            except OSError as error:  # the folder itself cannot be read now
                self._report("refusal", what="scan", kind=type(error).__name__, why=str(error))


def _graft_files(folder: Path) -> dict[str, Path]:
    found = sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX))
    return {path.name.removesuffix(SUFFIX): path for path in found}


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def _stamp_or_none(path: Path) -> Stamp | None:
    try:
        return _stamp(path)
    except OSError:
        return None
