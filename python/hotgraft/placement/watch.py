"""Watching for writes and moves by others: detected before a commit, as far as torch tells."""

from __future__ import annotations

from operator import attrgetter, getitem, is_
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.errors import HostChangedError
from hotgraft.placement.slots import Slot

_watches: WeakValueDictionary[tuple[Slot, ...], Watch] = WeakValueDictionary()


def watch(slots: tuple[Slot, ...]) -> Watch:
    """The watch over these slots; skills that write the same tensors share one."""
    found = _watches.get(slots)
    if found is None:
        found = _watches[slots] = Watch(slots)
    return found


_version = attrgetter("_version")
_address = torch.Tensor.data_ptr


class Watch:
    """The parameters that a plan writes.

    A check costs some 150 ns a parameter: everything is a map over C functions.

    Args:
        slots: the parameters.
    """

    def __init__(self, slots: tuple[Slot, ...]) -> None:
        self.slots = slots
        self.indices = np.array([slot.index for slot in slots], np.int64)
        self._tensors = tuple(slot.tensor for slot in slots)
        self._owners = tuple(slot.owner for slot in slots)
        self._keys = tuple(slot.key for slot in slots)
        self._addresses = list(map(_address, self._tensors))
        # Inference tensors have no version counter: what is written to them, only verify() sees.
        self._counted = tuple(t for t in self._tensors if not t.is_inference())
        self._counted_indices = np.array(
            [slot.index for slot in slots if not slot.tensor.is_inference()], np.int64
        )

    def check_in_place(self) -> None:
        """Raises `HostChangedError` if a parameter was replaced or its storage moved."""
        if not all(map(is_, map(getitem, self._owners, self._keys), self._tensors)):
            slot = next(s for s in self.slots if s.owner.get(s.key) is not s.tensor)
            raise HostChangedError(
                f"the parameter {slot.name!r} was replaced by another object since the host was "
                "attached; detach(force=True) and attach again"
            )
        if list(map(_address, self._tensors)) != self._addresses:
            moved = zip(self.slots, self._addresses, strict=True)
            slot = next(s for s, address in moved if s.tensor.data_ptr() != address)
            raise HostChangedError(
                f"the storage of {slot.name!r} was moved since the host was attached "
                "(model.to(...), .data = ...); detach(force=True) and attach again"
            )

    def versions(self) -> npt.NDArray[np.int64]:
        """The autograd version counters of the parameters that have one."""
        return np.fromiter(map(_version, self._counted), np.int64, len(self._counted))

    def record(self, expected: npt.NDArray[np.int64]) -> None:
        """Take the counters as they are for what is expected; `expected` has a cell a host slot."""
        expected[self._counted_indices] = self.versions()

    def check_unwritten(self, expected: npt.NDArray[np.int64]) -> None:
        """Raises `HostChangedError` if a counter is not the expected one."""
        found = self.versions()
        if np.array_equal(found, expected[self._counted_indices]):
            return
        at = int(np.flatnonzero(found != expected[self._counted_indices])[0])
        index = int(self._counted_indices[at])
        slot = next(s for s in self.slots if s.index == index)
        raise HostChangedError(
            f"somebody wrote to {slot.name!r} (its version went from {int(expected[index])} to "
            f"{int(found[at])}): an optimiser step, load_state_dict, ...? host.verify() looks "
            "whether the entries still hold what they should and then goes on; host.adopt() takes "
            "the weights as they are for the new base"
        )

    def bump(self, expected: npt.NDArray[np.int64]) -> None:
        """Count a write in the parameters' version counters, as torch's own in-place writes do."""
        torch.autograd.graph.increment_version(self._counted)
        expected[self._counted_indices] += 1
