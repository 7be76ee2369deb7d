"""What of a library is loaded, and what is in memory, within two budgets."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from hotgraft.errors import LibraryFullError, SkillInUseError, UnknownSkillError
from hotgraft.graft import Graft
from hotgraft.host import Host, Skill
from hotgraft.library.budget import Budget

Signature = tuple[int, int, int]
"""What changes when a file is replaced."""
A_TENSOR = 256
"""Bytes that a loaded skill takes for each tensor, beside its arrays: an estimate."""


@dataclass(eq=False)
class Volume:
    """A skill of a library. The library's lock guards it."""

    name: str
    path: Path | None
    """None for one that was added as a graft, which stays in memory."""
    id: str
    file_nbytes: int
    signature: Signature | None = None
    """Of its file, as it was when it was added."""
    graft: Graft | None = None
    loaded: Skill | None = None
    nbytes: int = 0
    """Of the budget."""
    stale: bool = False
    """Its file is another than the one that it was loaded from."""
    leases: int = 0
    pinned: bool = False
    coming: Future[None] | None = field(default=None, repr=False)
    """Done when it is loaded. Nobody outside the library may have it: it cannot be cancelled."""
    begun: bool = False
    """Whether a thread is at work on `coming`."""
    removed: bool = False


class Shelf:
    """Loads skills into a host, and takes those out that were not used for longest.

    Not thread-safe but for `load`: the library's lock stands in front.

    Args:
        host: where skills are loaded to.
        budget: bytes of loaded skills.
        memory_budget: bytes of grafts that are kept when they are unloaded.
        lock: held by the callers of everything but `load`, which takes it where it must.
        load: `host.load`, with the library's options.
    """

    def __init__(
        self,
        host: Host,
        budget: int,
        memory_budget: int,
        lock: contextlib.AbstractContextManager[object],
        load: Callable[..., Skill],
    ) -> None:
        self._host = host
        self._budget: Budget[Volume] = Budget(budget)  # of what is loaded
        self._memory_budget = memory_budget
        self._lock = lock
        self._load_into_host = load
        self._warm: OrderedDict[Volume, None] = OrderedDict()  # in memory; the last used come last
        self.memory_nbytes = 0
        self.evictions = 0
        self._factor = 1.0
        """What a loaded skill takes of its graft's bytes: on a GPU it has them twice."""

    def __len__(self) -> int:
        return len(self._budget)

    @property
    def nbytes(self) -> int:
        """Of what is loaded or being loaded."""
        return self._budget.nbytes

    def touch(self, volume: Volume) -> bool:
        """It is used now, if it is loaded. The host may have unloaded it: `adopt`, `detach`."""
        if volume.loaded is not None and not self._host.has(volume.loaded):
            self.forget(volume)
        if volume.loaded is None:
            return False
        self._budget.touch(volume)
        return True

    def load(self, volume: Volume, graft: Graft) -> None:
        """Load a skill, in place of an earlier one of its own where there is one.

        Raises:
            LibraryFullError: there is no room.
            SkillInUseError: the earlier one is live; it stays loaded.
            Exception: as `host.load`.
        """
        tensors = A_TENSOR * len(graft.names)
        wanted = int(graft.nbytes * self._factor) + tensors
        with self._lock:
            self.forget(volume)
            self._make_room(volume, wanted)
            self._budget.nbytes += wanted  # so that nobody else takes it meanwhile
        try:
            loaded = self._load_into_host(graft, name=volume.name)
        except BaseException:
            with self._lock:
                self._budget.nbytes -= wanted
            raise
        with self._lock:
            volume.loaded, volume.id = loaded, graft.id
            volume.nbytes = max(loaded.nbytes, graft.nbytes + tensors)
            self._budget.nbytes -= wanted
            self._factor = max(1.0, (loaded.nbytes - tensors) / graft.nbytes)
            volume.coming, volume.begun = None, False
            if volume.path is None or self._memory_budget:
                volume.graft = graft
            try:
                self._make_room(volume, volume.nbytes)  # it can take more than was thought
            finally:
                self._budget.put(volume, volume.nbytes)
                if not self._budget.fits(0):
                    self.forget(volume)

    def forget(self, volume: Volume) -> None:
        """Unload a skill if it is loaded, and do not keep it in memory.

        Raises:
            SkillInUseError: it is live.
        """
        if volume.loaded is not None:
            self._take_out(volume)
        self._cool(volume)
        self._drop(volume)

    def clear(self) -> None:
        """Unload all that is neither live nor leased."""
        for volume in self._budget.all():
            if not volume.leases:
                with contextlib.suppress(SkillInUseError):
                    self.forget(volume)
        for volume in tuple(self._warm):
            self.forget(volume)

    # ---- inside ----------------------------------------------------------------------------------

    def _make_room(self, volume: Volume, wanted: int) -> None:
        def may_go(kept: Volume) -> bool:
            return not (kept.leases or kept.pinned or self._host.in_use(kept.name))

        for victim in self._budget.candidates(wanted, may_go):
            if self._budget.fits(wanted):
                return
            with contextlib.suppress(SkillInUseError):  # live by now
                self._take_out(victim)
                self.evictions += 1
                self._keep_warm(victim)
        if not self._budget.fits(wanted):
            raise LibraryFullError(
                f"{volume.name!r} takes {wanted:,} bytes, and of the {self._budget.limit:,} for "
                "loaded skills too many are taken by those that are live, leased, pinned or being "
                "loaded: unpin some, or give the library more"
            )

    def _take_out(self, volume: Volume) -> None:
        assert volume.loaded is not None
        if self._host.has(volume.loaded):
            with contextlib.suppress(UnknownSkillError):  # gone just now
                self._host.unload(volume.name)
        self._budget.remove(volume)
        volume.loaded, volume.nbytes = None, 0

    def _keep_warm(self, volume: Volume) -> None:
        """Keep an evicted skill's graft, as far as that may be."""
        if volume.path is None or volume.graft is None:
            return
        if volume.graft.nbytes > self._memory_budget:
            self._drop(volume)
        else:
            self._warm[volume] = None
            self.memory_nbytes += volume.graft.nbytes
            while self.memory_nbytes > self._memory_budget:
                oldest = next(iter(self._warm))
                self._cool(oldest)
                self._drop(oldest)

    def _cool(self, volume: Volume) -> None:
        """It does not count as kept any more."""
        if volume in self._warm:
            assert volume.graft is not None
            del self._warm[volume]
            self.memory_nbytes -= volume.graft.nbytes

    def _drop(self, volume: Volume) -> None:
        if volume.path is not None:
            volume.graft = None
