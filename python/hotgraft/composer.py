"""The composer: makes and keeps the plans of sets of skills, for one host."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.composition import Meeting, check_merged, meet
from hotgraft.errors import DeviceMemoryError
from hotgraft.format import DTYPES, Group, Provenance, Row
from hotgraft.graft import Graft
from hotgraft.kernels.device import DeviceBackend, DeviceMerged, DeviceSource
from hotgraft.ledger import LiveSet, Skill
from hotgraft.placement import Backends, Launch, Plan, Slot, compile_plan, watch

COMPOSED_PLANS = 16
"""Plans of composed sets that a host keeps for the next time."""


class Composer:
    """Plans of sets of skills. Any thread may call it.

    Where all of a set is on devices, it is merged there: the entries do not travel, only what the
    merge has to report, for it may have to be refused.

    Args:
        slots: the host's parameters and buffers.
        backends: the backend of each device.
    """

    def __init__(self, slots: Mapping[str, Slot], backends: Backends) -> None:
        self._slots = slots
        self._backends = backends
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, LiveSet] = OrderedDict()
        self._gone: WeakSet[Skill] = WeakSet()  # a set may be composed while one of it is unloaded

    def __len__(self) -> int:
        return len(self._kept)

    def prepare(self, wanted: LiveSet) -> LiveSet:
        """The set with its plan: the one that was kept, or a new one. Raises as `compose` does."""
        known = self._kept.get(wanted.key)
        plan = known.plan if known is not None else self._composed(wanted)
        prepared = dataclasses.replace(wanted, plan=plan)
        with self._lock:
            if self._gone.isdisjoint(wanted.skills):
                self._kept[prepared.key] = prepared
                self._kept.move_to_end(prepared.key)
                if len(self._kept) > COMPOSED_PLANS:
                    self._kept.popitem(last=False)
        return prepared

    def forget(self, *skills: Skill) -> None:
        """Drop the sets that any of these skills is in, for good; without any, all sets."""
        with self._lock:
            self._gone.update(skills)
            for key, state in list(self._kept.items()):
                if not skills or not set(skills).isdisjoint(state.skills):
                    del self._kept[key]

    def _composed(self, wanted: LiveSet) -> Plan:
        try:
            return self._compose(wanted)
        except DeviceMemoryError:
            self.forget()  # what is kept only saves time
            return self._compose(wanted)

    def _compose(self, wanted: LiveSet) -> Plan:
        policy = wanted.policy or "refuse"
        skills = wanted.skills
        plans = [skill.plan for skill in skills]
        meeting = Meeting.arrange(
            [plan.graft for plan in plans], policy, wanted.weights,
            [skill.name for skill in skills], [skill.id for skill in skills],
        )  # fmt: skip
        if _can_meet_there(plans, self._backends):
            return self._merge_there([plans[i] for i in meeting.order], meeting, policy)
        backend = next(iter(self._backends.values()))
        return compile_plan(meeting.merged(policy, backend), self._slots, self._backends)

    def _merge_there(self, plans: Sequence[Plan], meeting: Meeting, policy: str) -> Plan:
        unions = [
            _unite(key, plans, meeting, policy, self._backends)
            for key in sorted(_tables(plans), key=lambda key: (str(key[0]), key[1]))
        ]
        check_merged([(union.merged, union.places) for union in unions], meeting.labels)
        launches = [self._launch(union, meeting) for union in unions]
        names = sorted({row.name for launch in launches for row in launch.rows})
        entries = sum(row.count for launch in launches for row in launch.rows)
        fetch = functools.partial(_fetch, launches, self._backends, meeting.provenance(entries))
        return Plan(fetch, launches, watch(tuple(self._slots[name] for name in names)))

    def _launch(self, union: _Union, meeting: Meeting) -> Launch:
        merged, size = union.merged, DTYPES[union.dtype].item_size
        rows = meeting.rows(union.dtype, union.places, merged.counts)
        firsts = np.cumsum(merged.counts) - merged.counts
        segments = np.stack([union.addresses, firsts, merged.counts], 1)
        backend = self._backends[union.device]
        assert isinstance(backend, DeviceBackend)
        table = backend.assemble(segments, merged.positions, size)
        return Launch(union.device, table, merged.new, merged.old, None, tuple(rows), segments)


class _Union(NamedTuple):
    """What several plans write to one device, as entries of one dtype."""

    device: torch.device
    dtype: str
    places: list[tuple[str, int]]
    addresses: npt.NDArray[np.int64]
    merged: DeviceMerged


_Key = tuple[torch.device, int]
"""A device and an item size."""


def _tables(plans: Sequence[Plan]) -> dict[_Key, list[Launch]]:
    found: dict[_Key, list[Launch]] = {}
    for plan in plans:
        for launch in plan.launches:
            found.setdefault((launch.device, launch.table.item_size), []).append(launch)
    return found


def _can_meet_there(plans: Sequence[Plan], backends: Backends) -> bool:
    """Whether tables can be merged as they are: on devices, in C-order, of one dtype each."""
    return all(
        isinstance(backends[device], DeviceBackend)
        and all(launch.origin is None for launch in launches)
        and len({row.dtype for launch in launches for row in launch.rows}) == 1
        for (device, _), launches in _tables(plans).items()
    )


def _unite(
    key: _Key, plans: Sequence[Plan], meeting: Meeting, policy: str, backends: Backends
) -> _Union:
    device, _ = key
    backend = backends[device]
    assert isinstance(backend, DeviceBackend)
    spans: list[dict[tuple[str, int], tuple[int, int]]] = []
    addresses: dict[tuple[str, int], int] = {}
    sources, dtype = [], ""
    for plan, weight in zip(plans, meeting.weights, strict=True):
        mine = [x for x in plan.launches if (x.device, x.table.item_size) == key]
        spans.append({})
        for launch in mine:  # one at most
            dtype = launch.rows[0].dtype
            for row, (address, first, count) in zip(
                launch.rows, launch.segments.tolist(), strict=True
            ):
                spans[-1][row.name, row.block] = first, count
                addresses[row.name, row.block] = address
            sources.append(DeviceSource(launch.table.positions, launch.new, launch.old, weight))
        if not mine:
            sources.append(DeviceSource(*backend.nothing(), weight))
    places, ranges = meet(spans)
    merged = backend.merge_there(sources, ranges, DTYPES[dtype], policy, meeting.order)
    starts = np.array([addresses[place] for place in places], np.int64)
    return _Union(device, dtype, places, starts, merged)


def _fetch(launches: Sequence[Launch], backends: Backends, provenance: Provenance) -> Graft:
    """The graft that launches write, from their devices."""
    parts: list[tuple[Row, Group]] = []
    for launch in launches:
        backend, bits = backends[launch.device], DTYPES[launch.rows[0].dtype].bits
        group = Group(
            backend.read(launch.table.positions, np.dtype(np.uint32)).view(np.int32),
            backend.read(launch.new, bits),
            backend.read(launch.old, bits),
        )
        for row in launch.rows:
            parts.append((row, Group(*(a[row.first : row.first + row.count] for a in group))))
    parts.sort(key=lambda part: (part[0].name, part[0].block))
    rows, columns = [], dict[str, list[Group]]()
    filled: dict[str, int] = {}
    for row, group in parts:
        first = filled.get(row.dtype, 0)
        filled[row.dtype] = first + row.count
        rows.append(row._replace(first=first))
        columns.setdefault(row.dtype, []).append(group)
    groups = {
        dtype: Group(*(np.concatenate(column) for column in zip(*mine, strict=True)))
        for dtype, mine in columns.items()
    }
    return Graft(rows, groups, provenance, owned=True)
