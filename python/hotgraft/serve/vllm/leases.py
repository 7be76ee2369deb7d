"""Leases: who uses a skill of a server, and who waits for it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hotgraft.library.shelf import Signature


@dataclasses.dataclass(eq=False)
class Skill:
    """A skill that requests can name, loaded or not. The server's event loop guards it."""

    name: str
    path: Path
    digest: str
    """The graft's id: what its file states, and what was verified where it is loaded."""
    signature: Signature
    """Of its file, as it was read last."""
    cast: bool = False
    """As in `Host.load`."""
    loaded: bool = False
    entries: int | None = None
    """None if it was never loaded."""
    nbytes: int = 0
    """What it takes on all ranks together now."""
    took: tuple[Signature, int] | None = None
    """What it took when it was loaded before, and of which file."""
    stale: bool = False
    """Its file is another than the one that it was loaded from."""
    pinned: bool = False
    hinted: bool = False
    """To be loaded though nobody waits."""
    leaving: bool = False
    """It makes room for another one as soon as its requests have ended; new ones wait."""
    forgotten: bool = False
    """No skill of the server any more."""
    failure: tuple[Signature, Exception] | None = None
    """Why it could not be loaded, and from which file; to be raised `again`."""
    using: set[Lease] = dataclasses.field(default_factory=set, repr=False)
    waiting: set[Lease] = dataclasses.field(default_factory=set, repr=False)
    coming: asyncio.Future[None] | None = dataclasses.field(default=None, repr=False)
    """Done when it is loaded, or was found not to be loadable."""

    @property
    def usable(self) -> bool:
        """Whether a request can use it now. What is in use stays what it is, file or no file."""
        return self.loaded and not self.leaving and not (self.stale and not self.using)

    @property
    def idle(self) -> bool:
        """Whether it may go where room is wanted."""
        return not self.using and not self.pinned

    @property
    def requests(self) -> int:
        """How many use it, or wait for it."""
        return len(self.using) + len(self.waiting)


class Lease:
    """A request's hold on a skill: once it is `ready`, the skill stays as it is until the end.

    A context manager that can be entered again while it is: it ends with the outermost block.

    Args:
        skill: what is wanted.
        want: notes that the skill is used, or else returns what says when it can be.
        ended: is told of the end.
    """

    def __init__(
        self,
        skill: Skill,
        want: Callable[[Lease], asyncio.Future[None] | None],
        ended: Callable[[], None],
    ) -> None:
        self.skill = skill
        self.since = 0.0
        """When it began."""
        self._want, self._ended = want, ended
        self._depth = 0
        self._coming: asyncio.Future[None] | None = None

    def __enter__(self) -> Lease:
        self._depth += 1
        if self._depth == 1:
            self.since = time.monotonic()
            self._coming = self._want(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.skill.using.discard(self)
            self.skill.waiting.discard(self)
            self._ended()

    async def ready(self) -> Skill:
        """Wait until the skill is loaded, and return it. Raises what made that impossible."""
        coming = self._coming
        if coming is not None:
            if not coming.done():
                await asyncio.wait([coming])  # which others wait for too
            if (error := coming.exception()) is not None:
                raise again(error)
        return self.skill


def again(error: BaseException, folder: Path | None = None) -> BaseException:
    """The same error, not raised yet; it names the files of a folder by their paths in there.

    One that is kept, or told to several, is not raised itself: each time its traceback would grow,
    and hold what the requests of those frames hold.
    """
    hidden = "" if folder is None else f"{folder}{os.sep}"

    def told(values: Iterable[object]) -> tuple[object, ...]:
        return tuple(v.replace(hidden, "") if hidden and isinstance(v, str) else v for v in values)

    made: BaseException = type(error).__new__(type(error), *told(error.__reduce__()[1]))
    made.args = told(error.args)
    made.__dict__.update(vars(error))
    return made
