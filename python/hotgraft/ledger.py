"""The ledger: which bits a host's memory holds, and the one way in which they change.

Live = f(base bits, the active set, the policy). The ledger knows the live plan, writes the next one
as a transaction, and detects what others write, as far as torch lets it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from hotgraft.errors import BaseMismatchError, GraftError, HostChangedError
from hotgraft.gate import untraced
from hotgraft.placement import (
    Backends,
    Launch,
    Plan,
    Slot,
    Watch,
    Wiring,
    expected_bits,
    share_cells,
)
from hotgraft.streams import Streams
from hotgraft.weights import fingerprint


def require_name(name: object) -> None:
    """Raises `GraftError` for what no skill can be called."""
    if not isinstance(name, str) or not name:
        raise GraftError(f"a skill is called {name!r}; its name is a string, and not empty")


@dataclasses.dataclass(frozen=True, eq=False)
class Skill:
    """A graft under a name, loaded and compiled for a host."""

    name: str
    id: str
    """The id of the graft it was loaded from."""
    plan: Plan

    @functools.cached_property
    def alone(self) -> LiveSet:
        """This skill as it is, and no other."""
        return LiveSet((self,), (1.0,), "", self.plan)

    def forget_alone(self) -> None:
        """Break the cycle that `alone` is, so that an unloaded skill's memory is free at once."""
        vars(self).pop("alone", None)

    @property
    def nnz(self) -> int:
        """Entries that it writes."""
        return self.plan.graft.nnz

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return self.plan.nbytes


@dataclasses.dataclass(frozen=True, eq=False)
class LiveSet:
    """What is live: some skills under a policy, and the plan that puts them there."""

    skills: tuple[Skill, ...] = ()
    weights: tuple[float, ...] = ()
    policy: str = ""
    """Empty unless there is more than one skill."""
    plan: Plan | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(skill.name for skill in self.skills)

    @functools.cached_property
    def key(self) -> Hashable:
        """Equal for sets that give the same bits; the order counts only under `priority`."""
        pairs = tuple(zip(self.skills, self.weights, strict=True))
        return self.policy, pairs if self.policy == "priority" else frozenset(pairs)

    def digest(self, base_id: str) -> str:
        """SHA-256 (hex) of a base's id and this set."""
        # The id of what is written here: after names=, cast= or partial= that is not the file's.
        ids = [skill.plan.graft.id for skill in self.skills]
        pairs = list(zip(ids, self.weights, strict=True))
        if self.policy != "priority":
            pairs.sort()
        text = json.dumps([base_id, pairs, self.policy])
        return hashlib.sha256(b"hotgraft live 1\n" + text.encode()).hexdigest()


NOTHING = LiveSet()


class Ledger:
    """The memory of one host. Not thread-safe: the host's gate and lock stand in front.

    Args:
        slots: the host's parameters and buffers by name.
        backends: what carries out the writes, on each device.
        streams: the order of the devices' streams.
    """

    def __init__(self, slots: Mapping[str, Slot], backends: Backends, streams: Streams) -> None:
        self._slots = slots
        self._backends = backends
        self._streams = streams
        self._apart: WeakKeyDictionary[Plan, WeakKeyDictionary[Plan, bool]] = WeakKeyDictionary()
        self.live = NOTHING
        self._pending: LiveSet | None = None  # set while a commit writes
        self._versions = np.zeros(len(slots), np.int64)  # the counters as they should be
        self._watchers = np.zeros(len(slots), np.int64)  # skills that watch each counter

    # ---- writing -------------------------------------------------------------------------------

    @property
    @untraced
    def settled(self) -> bool:
        """False after a commit that was interrupted and not undone yet."""
        return self._pending is None

    def prefetch(self, target: LiveSet) -> None:
        """Begin to bring near what committing the target will look at and write."""
        first = None
        for plan in (target.plan, self.live.plan):
            if plan is not None and plan.launches:
                plan.watch.prefetch()
                launch = plan.launches[0]
                first = launch, launch.old if plan is self.live.plan else launch.new
        if first is not None:
            launch, values = first
            self._backends[launch.device].prefetch(launch.table, values)
        self._find_apart(self.live.plan, target.plan)

    def commit(self, target: LiveSet) -> None:
        """Make the target live; on any exception what was live before is live still.

        Raises:
            HostChangedError: somebody else moved or wrote the weights; nothing was written.
        """
        self.settle()
        changes = target is not self.live and target.key != self.live.key
        watches = _watches(self.live, target)
        for watch in watches:
            watch.check_in_place()
            watch.check_unwritten(self._versions)
        if not changes:
            self.live = target  # the same bits, though the names may come in another order
            return
        self._streams.order_write()
        # An interrupt may come between any two lines.
        self._pending = target
        try:
            for watch in watches:
                watch.bump(self._versions)  # first, while the checks have its counters near
            self._write(self.live.plan, target.plan)
            self.live = target
        finally:
            self.settle()

    def settle(self) -> None:
        """Undo a commit that was interrupted. Writing is idempotent, so it may start over."""
        if self._pending is None:
            return
        if self._pending is not self.live:
            self._streams.order_write()
            self._write(self._pending.plan, self.live.plan)
            for watch in _watches(self._pending, self.live):
                watch.bump(self._versions)
                watch.record(self._versions)  # the interrupted commit may have bumped half of them
        self._pending = None

    def forget(self) -> None:
        """Take what is in memory for the base, with nothing live."""
        self.live, self._pending = NOTHING, None

    def _write(self, leaving: Plan | None, entering: Plan | None) -> None:
        for old, new in _paired(leaving, entering):
            if old is not None and new is not None and self._known_apart(leaving, entering):
                self._backends[old.device].exchange((old.table, old.old), (new.table, new.new))
                continue
            if old is not None:
                self._backends[old.device].scatter(old.table, old.old)
            if new is not None:
                self._backends[new.device].scatter(new.table, new.new)
        self._streams.note_commit()

    def _find_apart(self, leaving: Plan | None, entering: Plan | None) -> None:
        """Find out whether two plans share a cell, where one launch can then write both."""
        if leaving is None or entering is None or not (leaving.at_hand and entering.at_hand):
            return
        if any(self._backends[launch.device].exchanges for launch in entering.launches):
            known = self._apart.setdefault(leaving, WeakKeyDictionary())
            if entering not in known:
                apart = known[entering] = not share_cells(leaving, entering)
                self._apart.setdefault(entering, WeakKeyDictionary())[leaving] = apart

    def _known_apart(self, leaving: Plan | None, entering: Plan | None) -> bool:
        if leaving is None or entering is None or leaving not in self._apart:
            return False
        return self._apart[leaving].get(entering, False)

    # ---- watching ------------------------------------------------------------------------------

    def start_watching(self, watch: Watch) -> None:
        """Expect what the counters are now, but for those that another skill watches already."""
        fresh = self._watchers[watch.cells] == 0
        self._versions[watch.cells[fresh]] = watch.versions()[fresh]
        self._watchers[watch.cells] += 1

    def stop_watching(self, watch: Watch) -> None:
        """Undo one `start_watching`."""
        self._watchers[watch.cells] -= 1

    def trust(self, plans: Iterable[Plan]) -> None:
        """Expect what the counters are now."""
        for plan in plans:
            plan.watch.record(self._versions)

    # ---- checking ------------------------------------------------------------------------------

    def verify(self, plans: Mapping[str, Plan], base_id: str | None) -> int:
        """Check the live set, every plan's base bits and, where its id is known, the whole base.

        Args:
            plans: for each label (for messages) the plan of a skill.
            base_id: the base's id, where it is known.

        Raises:
            HostChangedError: naming what differs.
        """
        self.settle()
        live = self.live.plan
        try:
            if live is not None:
                live.watch.check_in_place()
                self._compare(live, [launch.new for launch in live.launches], "the live set")
            for label, plan in plans.items():
                self.check_base(plan, label)
        except BaseMismatchError as error:
            raise HostChangedError(f"somebody wrote to the weights: {error}") from error
        if base_id is not None:
            self._check_whole_base(base_id)
        self.trust(plans.values())
        return sum(plan.nnz for plan in (live, *plans.values()) if plan is not None)

    def check_base(self, plan: Plan, label: str) -> None:
        """Raises `BaseMismatchError` unless the base, without what is live, holds the old bits."""
        plan.watch.check_in_place()
        expected = expected_bits(plan, self.live.plan, label)
        wanted = [
            launch.old if bits is None else self._backends[launch.device].values(bits)
            for launch, bits in zip(plan.launches, expected, strict=True)
        ]
        self._compare(plan, wanted, label)

    def fits_memory(self, plan: Plan) -> bool:
        """Whether memory as it is now holds the plan's old bits.

        Raises:
            HostChangedError: a tensor was moved.
        """
        plan.watch.check_in_place()
        self._streams.order_write("a check")
        return not any(self._backends[x.device].compare(x.table, x.old)[0] for x in plan.launches)

    def _check_whole_base(self, base_id: str) -> None:
        Wiring(dict.fromkeys(self._slots.values())).check()
        found = fingerprint(_Base(self._slots, self.live.plan))
        if found != base_id:
            raise HostChangedError(
                f"the base's id is now {found}, not {base_id}: weights outside the skills were "
                "written; host.adopt() takes them for the new base"
            )

    def _compare(self, plan: Plan, wanted: Sequence[Any], label: str) -> None:
        """Raises `BaseMismatchError` unless the cells of each launch hold the wanted values."""
        self._streams.order_write("a check")
        for launch, values in zip(plan.launches, wanted, strict=True):
            backend = self._backends[launch.device]
            count, first = backend.compare(launch.table, values)
            if count:
                name, position = plan.locate(launch, first)
                bits = np.dtype(f"u{launch.table.item_size}")
                sought = backend.read(values, bits)
                held = backend.values(np.zeros_like(sought))
                backend.gather(launch.table, held)
                raise BaseMismatchError(
                    f"{label} does not fit: {count} of {len(sought)} entries differ, first "
                    f"{name!r}, position {position}: found bits "
                    f"{int(backend.read(held, bits)[first]):#x}, wanted {int(sought[first]):#x}"
                )


class _Base(dict[str, torch.Tensor]):
    """A host's tensors by name; read one by one, they hold the base's bits instead of live ones."""

    def __init__(self, slots: Mapping[str, Slot], live: Plan | None) -> None:
        super().__init__({slot.name: slot.tensor.detach() for slot in slots.values()})
        self._slots = slots
        self._live = live

    def __getitem__(self, name: str) -> torch.Tensor:
        slot = self._slots[name]
        if self._live is None or slot.home.name not in self._live.graft.names:
            return super().__getitem__(name)
        home, entries = slot.home.tensor.detach(), self._live.graft[slot.home.name]
        copy = home.clone(memory_format=torch.contiguous_format)
        copy.view(-1)[entries.indices.to(home.device)] = entries.old.to(home.device)
        if slot.home is slot:
            return copy
        offset = (slot.tensor.data_ptr() - home.data_ptr()) // copy.element_size()
        return copy.as_strided(slot.shape, slot.tensor.stride(), offset)


def _paired(
    leaving: Plan | None, entering: Plan | None
) -> list[tuple[Launch | None, Launch | None]]:
    """The launches of each device and item size, of both plans."""
    if leaving is None or entering is None:
        return [(launch, None) for launch in (leaving.launches if leaving else ())] + [
            (None, launch) for launch in (entering.launches if entering else ())
        ]
    pairs: dict[tuple[torch.device, int], list[Launch | None]] = {}
    for at, plan in enumerate((leaving, entering)):
        for launch in plan.launches:
            key = launch.device, launch.table.item_size
            pairs.setdefault(key, [None, None])[at] = launch
    return [(old, new) for old, new in pairs.values()]


def _watches(*states: LiveSet) -> list[Watch]:
    return list(dict.fromkeys(s.plan.watch for s in states if s.plan is not None))
