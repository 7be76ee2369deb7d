"""Watching for writes and moves by others: detected before a commit, as far as torch tells."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from hotgraft import _native
from hotgraft.errors import HostChangedError
from hotgraft.placement.slots import Place, Slot

Counters = npt.NDArray[np.int64]
"""Autograd version counters, a cell a place of the host."""


class Wiring:
    """The objects that should hang in the model: some slots' tensors, and the modules above them.

    Args:
        slots: the parameters and buffers.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = tuple(slots)
        hung = self._hung()  # none, where a shard holds nothing of a graft
        self.owners = tuple(owner for _, owner, _, _ in hung)
        self._keys = tuple(key for _, _, key, _ in hung)
        self._objects = tuple(thing for _, _, _, thing in hung)

    def check(self) -> None:
        """Raises `HostChangedError` if one was replaced."""
        at = _native.first_replaced(self.owners, self._keys, self._objects)
        if at >= 0:
            raise HostChangedError(
                f"the {self._hung()[at][0]} was replaced by another object since the host was "
                "attached; detach(force=True) and attach again"
            )

    def _hung(self) -> list[tuple[str, dict[str, Any], str, object]]:
        """What hangs there, its owner, its key, and the object itself."""
        places = [(slot, place) for slot in self._slots for place in slot.places]
        ways = {(id(e.owner), e.key): e for _, place in places for e in place.path}
        return [(f"parameter {s.name!r}", p.owner, p.key, p.tensor) for s, p in places] + [
            (f"module {e.name!r}", e.owner, e.key, e.module) for e in ways.values()
        ]


class Watch:
    """The tensors that a plan writes. A check costs some 150 ns a tensor.

    Args:
        slots: the parameters and buffers.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._views = tuple(view for slot in slots for view in slot.views)
        self._wiring = Wiring(self._views)
        self._tensors = tuple(place.tensor for _, place in self._places())
        self._addresses = np.array([t.data_ptr() for t in self._tensors], np.int64)
        # As long as it is held, memory is not given to another tensor: equal addresses prove that
        # nothing moved.
        self._storages = tuple(tensor.untyped_storage() for tensor in self._tensors)
        bodies = [t._cdata for t in self._tensors] + [s._cdata for s in self._storages]
        self._bodies = np.array(bodies, np.int64)
        # Inference tensors have no version counter: what is written to them, only verify() sees.
        family = [place for view in self._views for place in view.family]
        counted = {id(p.tensor): p for p in family if not p.tensor.is_inference()}
        self._counted = tuple(place.tensor for place in counted.values())
        self.cells = np.array([place.cell for place in counted.values()], np.int64)
        """The host's counters that are this watch's."""
        self._alone = len(family) == len(slots)  # each counter is one tensor's

    def _places(self) -> Iterator[tuple[Slot, Place]]:
        return ((view, place) for view in self._views for place in view.places)

    def prefetch(self) -> None:
        """Begin to bring near what the checks look at."""
        _native.prefetch_objects(self._wiring.owners, self._tensors, self._bodies)

    def check_in_place(self) -> None:
        """Raises `HostChangedError` if a tensor or module was replaced or a storage moved."""
        self._wiring.check()
        at = _native.first_moved(self._tensors, self._addresses)
        if at >= 0:
            slot, _ = next(itertools.islice(self._places(), at, None))
            raise HostChangedError(
                f"the storage of {slot.name!r} was moved since the host was attached "
                "(model.to(...), .data = ...); detach(force=True) and attach again"
            )

    def check_unwritten(self, expected: Counters) -> None:
        """Raises `HostChangedError` if a counter is not the expected one."""
        at = _native.first_written(self._counted, expected, self.cells)
        if at < 0:
            return
        writer, wanted = self._counted[at], int(expected[self.cells[at]])
        name = next(s.name for s, _ in self._places() if any(p.tensor is writer for p in s.family))
        raise HostChangedError(
            f"somebody wrote to {name!r} (its version went from {wanted} to {writer._version}): "
            "an optimiser step, load_state_dict, ...? host.verify() looks "
            "whether the entries still hold what they should and then goes on; host.adopt() takes "
            "the weights as they are for the new base"
        )

    def record(self, expected: Counters) -> None:
        """Take the counters as they are for what is expected; `expected` has a cell a place."""
        expected[self.cells] = self.versions()

    def bump(self, expected: Counters) -> None:
        """Count a write in the tensors' version counters, as torch's own in-place writes do."""
        torch.autograd.graph.increment_version(self._counted)
        if self._alone:
            _native.count_writes(expected, self.cells)
        else:
            self.record(expected)

    def versions(self) -> Counters:
        """The counters as they are."""
        return _native.versions(self._counted)


_watches: WeakValueDictionary[tuple[Slot, ...], Watch] = WeakValueDictionary()


def watch(slots: tuple[Slot, ...]) -> Watch:
    """The watch over these slots; plans that write the same tensors share one."""
    found = _watches.get(slots)
    if found is None:
        found = _watches[slots] = Watch(slots)
    return found
