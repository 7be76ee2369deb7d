"""Skills: what a running server has, as its API process sees it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hotgraft.errors import HotgraftError, SkillInUseError, UnknownSkillError
from hotgraft.library.folder import ENDING, described
from hotgraft.library.shelf import Signature
from hotgraft.serve.vllm.compositions import write_composition
from hotgraft.serve.vllm.folder import Seen, look
from hotgraft.serve.vllm.leases import Lease, Skill, again
from hotgraft.serve.vllm.resident import Ranks, Resident

LOOK_EVERY = 2.0
"""Seconds between two looks at a watched folder."""

T = TypeVar("T")


class Skills(Mapping[str, Skill]):
    """The skills of a server, by name: those that requests can name, loaded or not.

    A skill is loaded when a request wants it (`hotgraft.serve.vllm.resident`). All methods are
    called in the server's event loop.

    Args:
        ranks: the workers.
        scheduler: calls a method of `hotgraft.serve.vllm.core` in the engine.
        folder: where the files are; nothing outside of it is loaded.
        limit: bytes that loaded skills may take on all ranks together.
        taken: whether a name means something else already, such as the base.
        report: is told of each event, by its name and with what there is to say.
    """

    def __init__(
        self,
        ranks: Ranks,
        scheduler: Callable[..., Awaitable[Any]],
        folder: Path,
        limit: int,
        taken: Callable[[str], bool],
        report: Callable[..., None],
    ) -> None:
        self.folder = folder
        self.resident = Resident(ranks, scheduler, limit, report, folder)
        self._taken = taken
        self._report = report
        self._table: dict[str, Skill] = {}
        self._busy: set[str] = set()  # names of skills that somebody adds or takes away
        # Files that are not to become skills: bad ones, and those that somebody unloaded.
        self._passed: dict[str, Signature | None] = {}

    def __getitem__(self, name: str) -> Skill:
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def known(self, name: str) -> Skill:
        """A skill.

        Raises:
            UnknownSkillError: there is none of that name.
        """
        if name not in self._table:
            raise UnknownSkillError(f"there is no skill {name!r}")
        return self._table[name]

    # ---- requests ------------------------------------------------------------------------------

    def lease(self, skill: Skill) -> Lease:
        """A hold on a skill; once entered it is loaded, and stays so."""
        return self.resident.lease(skill)

    async def serving(
        self, lease: Lease, outputs: AsyncGenerator[T, None]
    ) -> AsyncGenerator[T, None]:
        """A request's outputs; the skill is in use until they end, or nobody reads on.

        Raises:
            UnknownSkillError: the skill was unloaded since the request named it.
            Exception: it cannot be loaded.
        """
        async with contextlib.aclosing(outputs):
            with lease:
                skill = await lease.ready()
                if skill.forgotten or not skill.loaded:
                    raise UnknownSkillError(f"the skill {skill.name!r} has just been unloaded")
                async for output in outputs:
                    yield output

    # ---- coming and going ----------------------------------------------------------------------

    def find(self, name: str, file: str | None = None) -> Path:
        """The file that a skill would be loaded from.

        Args:
            name: of the skill.
            file: relative to the folder; without it, the name with the usual ending.

        Raises:
            HotgraftError: it is outside of the folder, or called what no file is.
            FileNotFoundError: it is not there.
        """
        file = f"{name}{ENDING}" if file is None else file
        if not _is_text(file):
            raise HotgraftError(f"{file!r} is no name for a file: give UTF-8 without NUL")
        if Path(file).is_absolute():
            raise HotgraftError(
                f"{file!r} is outside of the folder of skills; give the path in the folder"
            )
        path = self.folder / file
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder)):
            raise HotgraftError(f"{path.name!r} is outside of the folder of skills")
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path.name!r} in the folder of skills")
        return path

    async def load(self, name: str, path: Path, *, cast: bool = False) -> Skill:
        """Load a skill, and add it where it is not known; requests are answered meanwhile.

        Goes on to its end if the caller is cancelled.

        Raises:
            SkillInUseError: it is loaded, or on its way, or its name is that of another file.
            HotgraftError: the name means something else.
            LibraryFullError: what is in use and pinned leaves no room.
            FormatError, OSError, BaseMismatchError, CoverageError, LayoutError, NonFiniteError: it
                cannot be loaded; nothing has changed.
        """
        return await asyncio.shield(asyncio.ensure_future(self._load(name, path, cast)))

    async def _load(self, name: str, path: Path, cast: bool) -> Skill:
        try:
            with self._holding(name):
                skill, undo = await self._enlist(name, path, cast)
        except Exception as error:
            self.resident.refuse("load", name, error)
            raise again(error, self.folder) from error
        return await self._ready(skill, undo)

    async def _enlist(
        self, name: str, path: Path, cast: bool = False
    ) -> tuple[Skill, Callable[[], None]]:
        """A skill that is to be loaded, and what to do if it cannot be; with its name held."""
        self._require_free(name, path)
        volume = await asyncio.to_thread(described, path)
        assert volume.signature is not None
        self._require_free(name, path)  # still
        if name not in self._table:
            made = self._table[name] = Skill(name, path, volume.id, volume.signature, cast)
            return made, lambda: self._strike(made)
        skill = self._table[name]
        before = skill.cast, skill.failure
        if cast == skill.cast:
            return skill, lambda: None
        skill.cast, skill.failure = cast, None  # what failed may succeed

        def undo() -> None:
            skill.cast, skill.failure = before

        return skill, undo

    def _strike(self, skill: Skill) -> None:
        if self._table.get(skill.name) is skill:
            del self._table[skill.name]
            self.resident.forget(skill)

    async def _ready(self, skill: Skill, undo: Callable[[], None]) -> Skill:
        try:
            with self.lease(skill) as lease:
                return await lease.ready()
        except Exception:  # it was reported
            undo()
            raise

    async def compose(
        self,
        name: str,
        parts: Sequence[str],
        *,
        policy: str = "refuse",
        weights: Sequence[float] | None = None,
    ) -> Skill:
        """Make a skill of several: a file of its own in the folder, and loaded as any other.

        It stays what it is when its parts are replaced or leave.

        Args:
            name: what to call it, and its file.
            parts: names of skills; each once.
            policy, weights: as in `hotgraft.compose`.

        Raises:
            FileExistsError: there is a file for that name.
            OverlapError, BaseMismatchError, NonFiniteError, GraftError: they cannot be composed.
            Exception: as `load`; after an error there is no such file.
        """
        making = self._compose(name, parts, policy, weights)
        return await asyncio.shield(asyncio.ensure_future(making))

    async def _compose(
        self, name: str, parts: Sequence[str], policy: str, weights: Sequence[float] | None
    ) -> Skill:
        path = self.folder / f"{name}{ENDING}"
        try:
            if "/" in name or name.startswith("."):
                raise HotgraftError(f"{name!r} is no name for a file of the folder of skills")
            if len(set(parts)) < len(parts):
                raise HotgraftError(f"a skill is named twice in {', '.join(map(repr, parts))}")
            named = {part: self.known(part) for part in parts}
            with self._holding(name):
                self._require_free(name, path)
                await asyncio.to_thread(write_composition, path, named, policy, weights)
                try:  # nobody else knows the file yet
                    cast = any(part.cast for part in named.values())
                    skill, undo = await self._enlist(name, path, cast)
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise
        except Exception as error:
            self.resident.refuse("compose", name, error)
            raise again(error, self.folder) from error
        try:
            return await self._ready(skill, undo)
        except Exception:  # it was reported
            if name not in self._table:
                path.unlink(missing_ok=True)
                self._passed[str(path)] = skill.signature  # a scan may have seen it
            raise

    def _require_free(self, name: str, path: Path) -> None:
        if not _is_text(name):
            raise HotgraftError(f"no skill can be called {name!r}: give UTF-8 without NUL")
        if not name or self._taken(name):
            raise HotgraftError(f"no skill can be called {name!r}: that names something else here")
        skill = self._table.get(name)
        if skill is not None and skill.path != path:
            raise SkillInUseError(
                f"there is a skill {name!r} already, from {skill.path.name!r}; unload it first"
            )
        if skill is not None and skill.loaded:
            raise SkillInUseError(f"a skill {name!r} is loaded already; unload it first")
        if skill is not None and skill.coming is not None:
            raise SkillInUseError(f"a skill {name!r} is just being loaded")

    async def unload(self, name: str, *, abort: bool = False) -> None:
        """Forget a skill, also a pinned one.

        Goes on to its end if the caller is cancelled.

        Args:
            name: of the skill.
            abort: finish its requests with an error.

        Raises:
            UnknownSkillError: there is none of that name.
            SkillInUseError: requests use it or wait for it, or it is just being loaded.
        """
        await asyncio.shield(asyncio.ensure_future(self._unload(name, abort)))

    async def _unload(self, name: str, abort: bool) -> None:
        try:
            with self._holding(name):
                skill = self.known(name)
                self._require_idle(skill, abort)
                async with self.resident.changing():
                    await self._remove(skill, abort)
        except Exception as error:
            self.resident.refuse("unload", name, error)
            raise

    async def _remove(self, skill: Skill, abort: bool = False) -> None:
        """Forget a skill, in `changing` and with its name held."""
        self._require_idle(skill, abort)
        del self._table[skill.name]  # from here on who names it is told that it is unknown
        try:
            aborted = await self.resident.take_out(skill, abort=abort) if skill.loaded else 0
        except BaseException:
            self._table[skill.name] = skill
            raise
        self.resident.forget(skill)
        self._passed[str(skill.path)] = skill.signature  # until it is replaced
        self._report("unload", skill=skill.name, aborted=aborted)

    def _require_idle(self, skill: Skill, abort: bool) -> None:
        if self.resident.is_loading(skill):
            raise SkillInUseError(f"the skill {skill.name!r} is just being loaded")
        if skill.requests and not abort:
            raise SkillInUseError(
                f"the skill {skill.name!r} is in use by {skill.requests} requests; wait for them, "
                "or abort them"
            )

    def fetch(self, name: str) -> Skill:
        """A request for this skill is likely: load it, when no request waits for another one.

        Raises:
            UnknownSkillError: there is none of that name.
        """
        skill = self.known(name)
        self.resident.hint(skill)
        return skill

    async def pin(self, name: str) -> Skill:
        """Load a skill, and keep it loaded until it is unpinned. Raises as a lease does."""
        with self.lease(self.known(name)) as lease:
            skill = await lease.ready()
            skill.pinned = True
        return skill

    def unpin(self, name: str) -> Skill:
        """Let a skill go when room is wanted. Raises `UnknownSkillError`."""
        skill = self.known(name)
        self.resident.unpin(skill)
        return skill

    @contextlib.contextmanager
    def _holding(self, name: str) -> Iterator[None]:
        if name in self._busy:
            raise SkillInUseError(f"the skill {name!r} is just being loaded or unloaded")
        self._busy.add(name)
        try:
            yield
        finally:
            self._busy.discard(name)

    # ---- the folder ----------------------------------------------------------------------------

    async def scan(self) -> None:
        """Learn what is new in the folder, what was replaced, and what is gone.

        Only headers are read. A file that is no skill is reported once. A skill that is in use goes
        on as it is: what has become of its file counts when it is not. One that somebody unloaded
        comes back when its file is replaced.
        """
        known: dict[str, Signature | tuple[()]] = {
            path: found for path, found in self._passed.items() if found is not None
        }
        for skill in self._table.values():
            path = str(skill.path)
            # Two of one file may have it of different times.
            same = known.get(path, skill.signature) == skill.signature
            known[path] = skill.signature if same else ()
        # What becomes of these meanwhile is newer than what is seen.
        before = {skill: skill.signature for skill in self._table.values()}
        seen = await asyncio.to_thread(look, self.folder, known)
        changes = {"added": 0, "replaced": 0, "removed": 0}
        for skill, signature in before.items() if seen else ():
            found = seen.get(str(skill.path))
            if found and (what := await self._follow(skill, signature, found)):
                changes[what] += 1
        paths = {str(skill.path) for skill in (*before, *self._table.values())} if seen else ()
        for path, found in seen.items():
            if found == Seen():
                self._passed.pop(path, None)
            elif path not in paths and found.signature != self._passed.get(path, ()):
                changes["added"] += self._add(Path(path), found)
        if any(changes.values()):
            self._report("scan", known=len(self), **changes)

    async def _follow(self, skill: Skill, before: Signature, found: Seen) -> str | None:
        """Keep up with a skill's file, as far as its requests allow; which change it is."""
        if skill.name in self._busy or found.signature == before:
            return None
        # One that is just leaving may stay after all, with the bits that it has.
        async with self.resident.changing():
            gone = self._table.get(skill.name) is not skill or skill.name in self._busy
            if gone or skill.signature != before:
                return None  # it was loaded, or unloaded, meanwhile
            skill.stale = skill.loaded
            if skill.requests:
                return None
            if found.digest is None:
                return await self._lose(skill, found)
            if skill.loaded:
                with contextlib.suppress(HotgraftError):  # it is tried again
                    await self.resident.take_out(skill)
            if skill.loaded or skill.requests:
                return None
            assert found.signature is not None
            skill.digest, skill.signature, skill.failure = found.digest, found.signature, None
        if skill.pinned:
            self.resident.hint(skill)
        return "replaced"

    async def _lose(self, skill: Skill, found: Seen) -> str | None:
        """Forget a skill whose file is none any more, in `changing`."""
        try:
            with self._holding(skill.name):
                await self._remove(skill)
        except Exception as error:  # it is tried again
            self.resident.refuse("unload", skill.name, error)
            return None
        if found.error is not None:
            self._pass(skill.name, skill.path, found, found.error)
        return "removed"

    def _add(self, path: Path, found: Seen) -> bool:
        """Whether it is a skill now."""
        name = path.name.removesuffix(ENDING)
        if name in self._busy:
            return False
        try:
            if found.error is not None:
                raise found.error
            self._require_free(name, path)
        except (HotgraftError, OSError) as error:
            self._pass(name, path, found, error)
            return False
        assert found.digest is not None
        assert found.signature is not None
        self._table[name] = Skill(name, path, found.digest, found.signature)
        return True

    def _pass(self, name: str, path: Path, found: Seen, error: Exception) -> None:
        self.resident.refuse("load", name, error)
        self._passed[str(path)] = found.signature

    async def watch(self) -> None:
        """Scan from time to time, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            try:
                await self.scan()
            except Exception as error:  # such as: the folder itself cannot be read now
                self._report("refusal", what="scan", kind=type(error).__name__, why=str(error))


def _is_text(name: str) -> bool:
    """Whether it can be part of an answer (file names may not be), and of a path."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in name
