"""Rank: the weights' side of a server's worker process, which holds a part of the model or all."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from hotgraft import placement
from hotgraft.errors import LayoutError, SkillInUseError, UnknownSkillError
from hotgraft.graft import Graft
from hotgraft.host import Host
from hotgraft.ledger import require_name
from hotgraft.weights import Checkpoint, sample


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a rank has of a skill."""

    name: str
    id: str
    """Of the graft's file."""
    nnz: int
    """Entries of the file."""
    placed: bytes
    """A bit for each of them, eight a byte: whether it has a place on this rank."""
    nbytes: int
    """What it takes here, in host and device memory."""

    @classmethod
    def of(cls, name: str, graft: Graft, placed: placement.Placed, nbytes: int) -> Prepared:
        """Pack the bits."""
        return cls(name, graft.id, graft.nnz, np.packbits(placed).tobytes(), nbytes)


class Rank:
    """A model with a host, and the way from a checkpoint's coordinates to the model's own.

    Loading goes in steps, so that ranks can do it together: `begin` starts it in a thread,
    `prepared` says when it is done and whether it succeeded, and then `keep` makes it a skill like
    the others, or `withdraw` takes it back, because another rank failed. Switching too: `prepare`,
    then `activate`.

    Args:
        model: the rank's part of the model, filled.
        load: the model's own loader, which is traced.
        checkpoint: what the model was loaded from; every traced coordinate is compared with it.

    Raises:
        LayoutError: the loader cannot be traced, or the checkpoint says tied tensors once.
    """

    def __init__(
        self, model: torch.nn.Module, load: placement.Loader, checkpoint: Checkpoint
    ) -> None:
        if checkpoint.ties:
            raise LayoutError(
                f"{sample(dict(checkpoint.ties))} are tied in what was given as the checkpoint; "
                "give the file or folder that the server loads"
            )
        self._model = model
        self.trace = placement.trace(model, load, checkpoint.specs)
        self.trace.verify(checkpoint)
        self.host = Host(model)  # `attach` is for models in the order of their checkpoints
        # Begun, and neither kept nor withdrawn: by whom, and what comes of it.
        self._coming: dict[str, tuple[str, Future[Prepared]]] = {}
        self._kept: dict[str, str] = {}  # who began what is loaded
        self._leaving: set[str] = set()  # withdrawn while they were read; the thread drops them
        # One, so that what is withdrawn is gone before the next one of its name comes.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hotgraft-load")

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()  # a copy of the model has no host, and so no rank

    def begin(
        self, name: str, token: str, path: str | os.PathLike[str], cast: bool = False
    ) -> None:
        """Start to load a skill; steps go on meanwhile.

        Args:
            name: what to call it.
            token: who begins; only they can ask for it, keep it or withdraw it.
            path: the graft's file, which this process can read.
            cast: as in `Host.load`.

        Raises:
            GraftError: the name is no string, or empty.
            SkillInUseError: there is one of that name, loaded or on its way.
        """
        require_name(name)
        there = name not in self._leaving and name in self.host.skills
        if name in self._coming or there:
            raise SkillInUseError(f"a skill {name!r} is loaded already, or just being loaded")
        self._coming[name] = token, self._thread.submit(self._load, name, path, cast)

    def _load(self, name: str, path: str | os.PathLike[str], cast: bool) -> Prepared:
        graft = Graft.load(path)
        here, placed = self.trace.place(graft, self._model)
        skill = self.host.load(here, name=name, cast=cast)
        return Prepared.of(name, graft, placed, skill.nbytes)

    def prepared(self, name: str, token: str) -> Prepared | None:
        """What came of `begin`; None as long as it goes on.

        Raises:
            FormatError, OSError, BaseMismatchError, CoverageError, LayoutError, NonFiniteError: it
                failed; nothing is loaded.
            UnknownSkillError: nothing of that name was begun.
        """
        coming = self._begun(name, token)
        return coming.result() if coming.done() else None

    def keep(self, name: str, token: str) -> None:
        """All ranks have it.

        Raises:
            UnknownSkillError: nothing of that name was begun.
        """
        self._begun(name, token)
        del self._coming[name]
        self._kept[name] = token

    def withdraw(self, name: str, token: str) -> None:
        """Take back what `begin` did, however far it is, `keep` included.

        It does not wait: what is being read is dropped when it has been, and the name is free now.

        Raises:
            SkillInUseError: it is live.
            UnknownSkillError: nothing of that name was begun.
        """
        if self._kept.get(name) == token:
            self.unload(name)
            return
        coming = self._begun(name, token)
        if coming.done():
            self._drop(name, coming)
        elif not coming.cancel():
            self._leaving.add(name)
            self._thread.submit(self._drop, name, coming)
        del self._coming[name]

    def _drop(self, name: str, coming: Future[Prepared]) -> None:
        try:
            if coming.exception() is None:
                self.host.unload(name)
        finally:
            self._leaving.discard(name)

    def _begun(self, name: str, token: str) -> Future[Prepared]:
        who, coming = self._coming.get(name, (None, None))
        if coming is None or who != token:
            raise UnknownSkillError(f"no loading of {name!r} was begun")
        return coming

    def release(self, name: str) -> None:
        """Do all of `unload` that may fail, and forget nothing. Raises as `unload`."""
        if name in self._coming:
            raise SkillInUseError(f"{name!r} is being loaded")
        if self.host.in_use(name):
            raise SkillInUseError(f"{name!r} is live; activate another one first")
        if name not in self.host.skills:
            raise UnknownSkillError(f"there is no skill {name!r} to unload")

    def unload(self, name: str) -> None:
        """Forget a skill.

        Raises:
            SkillInUseError: it is live, or just being loaded.
            UnknownSkillError: there is none of that name.
        """
        self.release(name)
        self.host.unload(name)
        self._kept.pop(name, None)

    def prepare(self, names: Sequence[str], policy: str, weights: Sequence[float] | None) -> None:
        """Compose a set, so that `activate` has only to write. Raises as `Host.activate` does."""
        self.host.prepare(*names, policy=policy, weights=weights)

    def activate(self, names: Sequence[str], policy: str, weights: Sequence[float] | None) -> None:
        """Make exactly this set live. Raises as `Host.activate` does."""
        self.host.activate(*names, policy=policy, weights=weights)

    def verify(self) -> int:
        """Check every entry of every skill; as `Host.verify`."""
        return self.host.verify()

    def close(self) -> None:
        """Put the base's bits back and let go of the model.

        Raises:
            HotgraftError: the way back failed.
        """
        self._thread.shutdown(cancel_futures=True)
        self.host.detach(force=True)


def _nothing() -> None:
    return None
