"""The ledger: which bits a host's memory holds, and the one way in which they change.

Live = f(base bits, the active set, the policy). The ledger knows the live plan, writes the next one
as a transaction, and detects what others write, as far as torch lets it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from hotgraft.errors import BaseMismatchError, HostChangedError
from hotgraft.format import Bits
from hotgraft.kernels import Backend
from hotgraft.placement import Plan, Slot, expected_bits
from hotgraft.weights import fingerprint


@dataclasses.dataclass(frozen=True, eq=False)
class LiveSet:
    """What is live: some skills under a policy, and the plan that puts them there."""

    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    policy: str = ""
    """Empty unless there is more than one skill."""
    plan: Plan | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for sets that give the same bits; the order counts only under `priority`."""
        pairs = tuple(zip(self.names, self.weights, strict=True))
        return self.policy, pairs if self.policy == "priority" else tuple(sorted(pairs))


NOTHING = LiveSet()


class Ledger:
    """The memory of one host. Not thread-safe: the host's gate and lock stand in front.

    Args:
        slots: the host's parameters and buffers by name.
        backend: what carries out the writes.
    """

    def __init__(self, slots: Mapping[str, Slot], backend: Backend) -> None:
        self._slots = slots
        self._backend = backend
        self.live = NOTHING
        self._pending: LiveSet | None = None  # set while a commit writes
        self._versions = np.zeros(len(slots), np.int64)  # the counters as last seen, a cell a slot
        self._watched = np.zeros(len(slots), bool)

    # ---- writing -------------------------------------------------------------------------------

    def commit(self, target: LiveSet) -> None:
        """Make the target live; on any exception what was live before is live still.

        Raises:
            HostChangedError: somebody else moved or wrote the weights; nothing was written.
        """
        self.settle()
        for plan in (self.live.plan, target.plan):
            if plan is not None:
                plan.watch.check_in_place()
                plan.watch.check_unwritten(self._versions)
        if target.key == self.live.key:
            return
        # An interrupt may come between any two lines.
        self._pending = target
        try:
            self._write(self.live.plan, target.plan)
            self.live = target
        finally:
            self.settle()

    def settle(self) -> None:
        """Undo a commit that was interrupted. Writing is idempotent, so it may start over."""
        if self._pending is not None:
            if self._pending is not self.live:
                self._write(self._pending.plan, self.live.plan)
            self._pending = None

    def forget(self) -> None:
        """Take what is in memory for the base, with nothing live."""
        self.live, self._pending = NOTHING, None

    def _write(self, leaving: Plan | None, entering: Plan | None) -> None:
        if leaving is not None:
            for launch in leaving.launches:
                self._backend.scatter(launch.table, launch.old)
            leaving.watch.bump(self._versions)
        if entering is not None:
            for launch in entering.launches:
                self._backend.scatter(launch.table, launch.new)
            entering.watch.bump(self._versions)

    # ---- watching ------------------------------------------------------------------------------

    def start_watching(self, plan: Plan) -> None:
        """Take the counters of tensors that no plan touched before for what is expected."""
        fresh = plan.watch.indices[~self._watched[plan.watch.indices]]
        before = self._versions.copy()
        plan.watch.record(self._versions)
        before[fresh] = self._versions[fresh]
        self._versions = before
        self._watched[plan.watch.indices] = True

    def was_written(self, plan: Plan) -> bool:
        """Whether somebody else wrote to a tensor of the plan, by its version counters."""
        try:
            plan.watch.check_unwritten(self._versions)
        except HostChangedError:
            return True
        return False

    def record(self, plan: Plan) -> None:
        """Take the counters as they are for what is expected."""
        plan.watch.record(self._versions)

    # ---- checking ------------------------------------------------------------------------------

    def check_live(self) -> int:
        """Raises `BaseMismatchError` unless the live plan's bits are there; returns its entries."""
        plan = self.live.plan
        if plan is None:
            return 0
        plan.watch.check_in_place()
        self._compare(plan, [launch.new for launch in plan.launches], "the live set")
        return plan.graft.nnz

    def check_base(self, plan: Plan, label: str) -> int:
        """Raises `BaseMismatchError` unless the base, without what is live, holds the old bits."""
        plan.watch.check_in_place()
        self._compare(plan, expected_bits(plan, self.live.plan, label), label)
        return plan.graft.nnz

    def check_whole_base(self, base_id: str) -> None:
        """Raises `HostChangedError` unless the whole base still has the id `base_id`."""
        state = {name: slot.tensor.detach() for name, slot in self._slots.items()}
        live = self.live.plan
        if live is not None:
            for name in live.graft.names:
                entries = live.graft[name]
                copy = state[name].clone()
                copy.view(-1)[entries.indices] = entries.old
                state[name] = copy
        found = fingerprint(state)
        if found != base_id:
            raise HostChangedError(
                f"the base's id is now {found}, not {base_id}: weights outside the skills were "
                "written; host.adopt() takes them for the new base"
            )

    def _compare(self, plan: Plan, wanted: Sequence[Bits], label: str) -> None:
        for launch, values in zip(plan.launches, wanted, strict=True):
            count, first = self._backend.compare(launch.table, values)
            if count:
                name, position = plan.locate(launch, first)
                held = np.empty_like(values)
                self._backend.gather(launch.table, held)
                raise BaseMismatchError(
                    f"{label} does not fit: {count} of {len(values)} entries differ, first "
                    f"{name!r}, position {position}: found bits {int(held[first]):#x}, wanted "
                    f"{int(values[first]):#x}"
                )
