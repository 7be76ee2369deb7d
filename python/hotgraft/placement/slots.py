"""Slots: the parameters and buffers of a live module, and which of them may be written in place."""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hotgraft.errors import ParameterError
from hotgraft.format import DType, dtype_of
from hotgraft.placement.memory import Taken, extent
from hotgraft.weights import plain_name

Regions = list[tuple[int, int, bool]]
"""(begin, end, writable) of the mappings of a process's memory, ascending."""


class Edge(NamedTuple):
    """Where in a model a module hangs."""

    owner: dict[str, Any]
    """The parent's `_modules`."""
    key: str
    module: torch.nn.Module
    name: str


class Place(NamedTuple):
    """Where in a model a tensor hangs."""

    owner: dict[str, Any]
    """The owning module's `_parameters` or `_buffers`."""
    key: str
    tensor: torch.Tensor
    """What should go on hanging there."""
    cell: int
    """Its number among the host's places."""
    path: tuple[Edge, ...]
    """How the root leads to the owning module."""


@dataclasses.dataclass(eq=False)
class Slot:
    """One parameter or buffer. Tied ones are one slot with several places.

    Slots that share memory through different views (a transposed tie, a slice) meet in one of them,
    their home: what a graft says of any is rewritten to positions in the home.
    """

    name: str
    """The first of its names."""
    tensor: torch.Tensor
    places: list[Place]
    family: list[Place]
    """Every place of the same storage: their tensors may share a version counter."""
    home: Slot = dataclasses.field(init=False)
    """Itself, or the contiguous slot that covers its memory and that of all that it overlaps."""
    views: list[Slot] = dataclasses.field(init=False)
    """The slots it is home to, itself first."""
    rival: Slot | None = None
    """A slot that it overlaps, where none can be home to both."""
    writable: bool = False
    """Whether `check_writable` was passed."""

    def __post_init__(self) -> None:
        self.home, self.views = self, [self]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """One object for as long as the slot lives, which the rows of every skill share."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> DType:
        """Raises `GraftError` for a type that grafts cannot hold."""
        return dtype_of(self.tensor.dtype, self.name)


def find_slots(model: torch.nn.Module) -> dict[str, Slot]:
    """Every parameter and persistent buffer by its checkpoint name; tied ones share a slot."""
    slots: dict[str, Slot] = {}
    first: dict[object, Slot] = {}
    families: dict[object, list[Place]] = {}
    for prefix, module, path in _modules(model):
        transient = module._non_persistent_buffers_set
        for owner, skipped in ((module._parameters, set()), (module._buffers, transient)):
            for key, tensor in owner.items():
                if tensor is None or key in skipped:
                    continue
                name = plain_name(prefix + key)
                storage, view = _identity(tensor)
                family = families.setdefault(storage, [])
                slot = first.setdefault((storage, view), Slot(name, tensor, [], family))
                slot.places.append(Place(owner, key, tensor, len(slots), path))
                family.append(slot.places[-1])
                slots[name] = slot
    _find_homes([slot for slot in first.values() if _is_dense(slot.tensor)])
    return slots


def _modules(
    module: torch.nn.Module, prefix: str = "", path: tuple[Edge, ...] = ()
) -> Iterator[tuple[str, torch.nn.Module, tuple[Edge, ...]]]:
    """Every module below one, under every name, and the way there."""
    yield prefix, module, path
    for key, child in module._modules.items():
        if child is not None:
            edge = Edge(module._modules, key, child, prefix + key)
            yield from _modules(child, f"{prefix}{key}.", (*path, edge))


def _find_homes(slots: list[Slot]) -> None:
    """Give slots that overlap one home, or note that there is none."""
    reached, near = 0, list[Slot]()  # slots whose extents overlap, at least in a chain
    for begin, end, slot in sorted(((*extent(s.tensor), s) for s in slots), key=lambda e: e[:2]):
        if begin >= reached:
            _settle(near)
            near = []
        near.append(slot)
        reached = max(reached, end)
    _settle(near)


def _settle(near: list[Slot]) -> None:
    if len(near) < 2:
        return
    taken = Taken(near[0].tensor.data_ptr())
    groups: list[list[int]] = []  # of each: the numbers of those that it overlaps, in a chain
    for number, slot in enumerate(near):
        groups.append([number])
        for other in taken.touching(slot.tensor):
            slot.rival, near[other].rival = near[other], slot
            large, small = sorted((groups[other], groups[number]), key=len, reverse=True)
            if large is not small:
                large += small
                for member in small:
                    groups[member] = large
        taken.add(slot.tensor, number)
    for members in {id(group): group for group in groups}.values():
        group = [near[number] for number in sorted(members)]
        home = next((slot for slot in group if _covers(slot, group)), None)
        if home is not None:
            home.views = [home, *(slot for slot in group if slot is not home)]
            for slot in group:
                slot.home, slot.rival = home, None


def _covers(home: Slot, group: list[Slot]) -> bool:
    """Whether a position in the home can say every element of every slot."""
    begin, end = extent(home.tensor)
    return home.tensor.is_contiguous() and all(
        slot.tensor.dtype == home.tensor.dtype
        and begin <= (at := extent(slot.tensor))[0]
        and at[1] <= end
        and (at[0] - begin) % home.tensor.element_size() == 0
        for slot in group
    )


def _identity(tensor: torch.Tensor) -> tuple[object, object]:
    """Of its storage, and of its place in there: both equal for tensors that are tied."""
    if not _is_dense(tensor):
        return id(tensor), None
    view = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
    return (tensor.device, tensor.untyped_storage().data_ptr()), view


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie in memory, by strides."""
    hidden = _is_opaque(tensor) or tensor.is_meta or tensor.layout != torch.strided
    return not hidden and tensor.numel() > 0


def _is_opaque(tensor: torch.Tensor) -> bool:
    """Whether the object has no memory of its own that holds its values."""
    return torch.nn.parameter.is_lazy(tensor) or is_traceable_wrapper_subclass(tensor)


def check_writable(slot: Slot, regions: Regions) -> None:
    """Refuse a parameter whose memory cannot be written in place, element by element.

    Args:
        slot: the parameter.
        regions: what `memory_regions` returned lately.

    Raises:
        ParameterError: it is meta, offloaded, quantised, sparse, a lazy view, read-only memory, or
            overlaps itself or another in a way that cannot be resolved.
    """
    tensor, name = slot.tensor, slot.name
    kind = type(tensor).__name__
    if slot.rival is not None:
        raise ParameterError(
            f"{name!r} and {slot.rival.name!r} share memory, and no contiguous tensor of the same "
            "type covers both, so what they hold cannot be told apart: clone one of them"
        )
    if torch.nn.parameter.is_lazy(tensor):
        raise ParameterError(f"{name!r} is not initialised yet: run the model once first")
    if _is_opaque(tensor) or any(
        hasattr(tensor, mark) for mark in ("quant_state", "SCB", "compress_statistics")
    ):
        raise ParameterError(
            f"{name!r} is a {kind}, which stores other bits than its values (quantised or "
            "sharded): load the model with plain tensors"
        )
    if tensor.is_meta:
        raise ParameterError(
            f"{name!r} is on the meta device, so it has no data here (offloaded, or not loaded "
            "yet): load it, or turn offloading off"
        )
    if tensor.is_quantized or tensor.layout != torch.strided:
        raise ParameterError(f"{name!r} is quantised or {tensor.layout}; wanted a strided tensor")
    if tensor.is_conj() or tensor.is_neg():
        raise ParameterError(f"{name!r} is a lazy view: call resolve_conj() or resolve_neg()")
    if overlaps_itself(tuple(tensor.shape), tensor.stride()):
        raise ParameterError(
            f"{name!r} has shape {list(tensor.shape)} and strides {list(tensor.stride())}: several "
            "elements may share memory (an expanded view?); make it contiguous"
        )
    if not _memory_is_writable(tensor, regions):
        raise ParameterError(
            f"{name!r} lies in read-only memory (a file mapped without write access?): clone it"
        )


def overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two elements of a strided tensor may share memory; True when in doubt.

    Example:
        >>> overlaps_itself((3, 4), (4, 1)), overlaps_itself((3, 4), (0, 1))
        (False, True)
    """
    reach = 0  # the furthest offset that the dimensions seen so far can make
    for stride, size in sorted((st, sz) for st, sz in zip(strides, shape, strict=True) if sz > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _memory_is_writable(tensor: torch.Tensor, regions: Regions) -> bool:
    if not tensor.numel() or not regions or tensor.device.type != "cpu":
        return True
    begin, end = extent(tensor)
    at = max(bisect.bisect_right(regions, (begin, 2**64, False)) - 1, 0)
    while at < len(regions) and regions[at][0] < end:
        _, stop, writable = regions[at]
        if stop > begin and not writable:
            return False
        at += 1
    return True


def memory_regions() -> Regions:
    """How the kernel maps this process's memory (Linux; empty elsewhere)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    regions: Regions = []
    for line in maps.read_text().splitlines():
        span, access = line.split(maxsplit=2)[:2]
        begin, end = (int(part, 16) for part in span.split("-"))
        regions.append((begin, end, "w" in access))
    return regions
