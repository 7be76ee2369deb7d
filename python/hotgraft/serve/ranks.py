"""Ranks: the worker processes of a server as one: all of them do a thing, or none."""

from __future__ import annotations

import builtins
import dataclasses
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hotgraft import errors
from hotgraft.errors import (
    CoverageError,
    FormatError,
    GraftError,
    HotgraftError,
    SkillInUseError,
    UnknownSkillError,
)
from hotgraft.ledger import require_name
from hotgraft.serve.rank import Prepared

Call = Callable[[str, tuple[Any, ...]], Sequence[Any]]
"""Calls a method of `Rank` by its name on every rank; what each returned or raised, in order."""
POLL = 0.002
"""Seconds between two looks at whether all ranks have loaded."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A skill that every rank has."""

    name: str
    id: str
    nnz: int
    nbytes: int
    """Of all ranks together."""


@dataclasses.dataclass(frozen=True)
class Live:
    """A set of skills, as `Host.activate` takes it."""

    names: tuple[str, ...] = ()
    policy: str = "refuse"
    weights: tuple[float, ...] | None = None


class Ranks:
    """The skills of a server's ranks.

    A skill is loaded on all ranks or on none, and a switch happens on all or on none: what can fail
    is done everywhere first, and undone where it succeeded if it fails on one. The server goes on
    with what it had. One thread at a time.

    Args:
        call: reaches the ranks.
        sleep: waits some seconds between two looks.

    Example:
        >>> ranks = Ranks(lambda method, args: [getattr(rank, method)(*args) for rank in ()])
        >>> ranks.skills
        {}
    """

    def __init__(self, call: Call, sleep: Callable[[float], None] = time.sleep) -> None:
        self._call = call
        self._sleep = sleep
        self._skills: dict[str, Loaded] = {}
        self._begun: dict[str, str] = {}  # tokens of loads that ranks may have a part of
        self.live = Live()
        """What is in the weights now."""

    @property
    def skills(self) -> Mapping[str, Loaded]:
        """The loaded skills by name."""
        return dict(self._skills)

    def load(self, name: str, path: str | os.PathLike[str], *, cast: bool = False) -> Loaded:
        """Load a skill on every rank; requests are answered meanwhile.

        Args:
            name: what to call it.
            path: the graft's file, which every rank can read.
            cast: as in `Host.load`.

        Raises:
            GraftError: the name is no string, or empty.
            SkillInUseError: there is one of that name.
            FormatError, OSError, BaseMismatchError, LayoutError, NonFiniteError: it failed on a
                rank, which is named; no rank has it now.
            CoverageError: an entry has no place on any rank.
            Exception: the ranks could not be reached. What they have of it is taken back, by the
                next load of this name if it cannot be now.
        """
        require_name(name)
        if not isinstance(path, str | os.PathLike):
            raise FormatError(f"{path!r} is no path; wanted that of a graft file")
        if name in self._skills:
            raise SkillInUseError(f"a skill {name!r} is loaded already; unload it first")
        if name in self._begun:
            self._withdraw(name)
        token = self._begun[name] = uuid.uuid4().hex
        try:
            _raise(self._all("begin", name, token, os.fspath(path), cast))
            parts = self._wait(name, token)
            _require_same(name, parts)
            _require_no_gap(name, parts)
            _raise(self._all("keep", name, token))
        except BaseException as error:
            try:
                self._withdraw(name)
            except Exception as failure:
                error.add_note(
                    f"it could not be taken back on all ranks ({failure}): load {name!r} again, "
                    "which tries that first, or restart the server"
                )
            raise
        del self._begun[name]
        nbytes = sum(part.nbytes for part in parts)
        loaded = self._skills[name] = Loaded(name, parts[0].id, parts[0].nnz, nbytes)
        return loaded

    def unload(self, name: str) -> None:
        """Forget a skill on every rank.

        Raises:
            SkillInUseError: it is live.
            UnknownSkillError: there is none of that name.
        """
        self._require(name)
        for step in ("release", "unload"):  # no rank forgets it before all can
            results = self._all(step, name)
            # A rank that lacks it has done its part, perhaps when another one failed before.
            _raise([result for result in results if not isinstance(result, UnknownSkillError)])
        del self._skills[name]

    def activate(
        self, *names: str, policy: str = "refuse", weights: Sequence[float] | None = None
    ) -> None:
        """Make exactly this set live on every rank, between two steps.

        Raises:
            UnknownSkillError: a name is not loaded.
            OverlapError, NonFiniteError, GraftError: the set cannot be composed.
            HostChangedError: somebody wrote the weights of a rank. All ranks have what was live.
            Exception: the ranks could not be reached. They may differ until the next switch.
        """
        for name in names:
            self._require(name)
        if weights is not None and not isinstance(weights, Sequence):
            raise GraftError(f"weights {weights!r}: give a list with a number a skill")
        target = Live(names, policy, None if weights is None else tuple(weights))
        _raise(self._all("prepare", *dataclasses.astuple(target)))
        results = self._all("activate", *dataclasses.astuple(target))
        failure = _failure(results)
        if failure is not None:
            self._undo("activate", results, *dataclasses.astuple(self.live))
            raise failure
        self.live = target

    def deactivate(self) -> None:
        """Put the base's bits back on every rank. Raises as `activate` does."""
        self.activate()

    def verify(self) -> int:
        """Check every entry of every skill on every rank; returns how many were checked.

        Raises:
            HostChangedError: naming the rank, the tensor and the position.
        """
        return int(sum(_raise(self._all("verify"))))

    def _require(self, name: str) -> None:
        if not isinstance(name, str) or name not in self._skills:
            known = ", ".join(self._skills) or "none yet"
            raise UnknownSkillError(f"no skill {name!r} is loaded; loaded are: {known}")

    def _all(self, method: str, *args: Any) -> list[Any]:
        return [_named(result, rank) for rank, result in enumerate(self._call(method, args))]

    def _wait(self, name: str, token: str) -> list[Prepared]:
        """What came of loading on each rank, when all have ended; raises when one failed."""
        while True:
            found = _raise(self._all("prepared", name, token))
            if all(part is not None for part in found):
                return list(found)
            self._sleep(POLL)

    def _withdraw(self, name: str) -> None:
        results = self._all("withdraw", name, self._begun[name])
        # Those that did not begin have nothing to take back.
        _raise([result for result in results if not isinstance(result, UnknownSkillError)])
        del self._begun[name]

    def _undo(self, method: str, done: Sequence[Any], *args: Any) -> None:
        """Call a method that takes back what was done on some ranks.

        What the others answer, which did nothing, is no news.
        """
        for before, result in zip(done, self._all(method, *args), strict=True):
            if isinstance(result, BaseException) and not isinstance(before, BaseException):
                raise HotgraftError(
                    f"ranks differ now: {method} failed on one and could not be taken back on "
                    f"another ({result}); restart the server"
                ) from result


def _named(result: Any, rank: int) -> Any:
    """An error says which rank it is from."""
    if isinstance(result, BaseException):
        return error_of(type(result).__name__, f"rank {rank}: {result}")
    return result


def _failure(results: Sequence[Any]) -> BaseException | None:
    return next((result for result in results if isinstance(result, BaseException)), None)


def _raise(results: Sequence[Any]) -> Sequence[Any]:
    failure = _failure(results)
    if failure is not None:
        raise failure
    return results


def _require_same(name: str, parts: Sequence[Prepared]) -> None:
    """All ranks have read the same graft."""
    if len({part.id for part in parts}) != 1:
        raise HotgraftError(
            f"ranks read different files as {name!r}: it was replaced meanwhile, or is not the "
            "same on all machines"
        )


def _require_no_gap(name: str, parts: Sequence[Prepared]) -> None:
    """Every entry has a place on some rank."""
    bits = np.bitwise_or.reduce([np.frombuffer(part.placed, np.uint8) for part in parts])
    placed = int(np.unpackbits(bits, count=parts[0].nnz).sum())
    if placed < parts[0].nnz:
        raise CoverageError(
            f"{parts[0].nnz - placed} of {parts[0].nnz} entries of {name!r} have no place on any "
            "rank: the server does not load that part of the checkpoint"
        )


def error_of(kind: str, message: str) -> Exception:
    """An error that came as text from another process.

    Example:
        >>> error_of("LayoutError", "repacked")
        LayoutError('repacked')
    """
    known = getattr(errors, kind, None) or getattr(builtins, kind, None)
    if not (isinstance(known, type) and issubclass(known, HotgraftError | OSError | MemoryError)):
        return HotgraftError(f"{kind}: {message}")
    return known(message)
