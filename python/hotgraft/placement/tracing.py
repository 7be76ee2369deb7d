"""Tracing: watch a model's own loader once, to learn where it puts which slice of a checkpoint.

The loader is fed tensors on the meta device, which have shapes but no values. What it slices,
transposes and reshapes is still a view of them, and where it copies such a view into a parameter,
both views are recorded and nothing is copied: the weights stay as they are, and a model of any size
takes milliseconds.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hotgraft.errors import LayoutError
from hotgraft.placement.memory import Taken, extent
from hotgraft.placement.regions import Region, View
from hotgraft.placement.slots import Slot, find_slots, overlaps_itself
from hotgraft.placement.traced import Trace
from hotgraft.weights import Spec

Loader = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
"""A model's way to take a checkpoint: names with tensors, one by one (vLLM's `load_weights`)."""

_CONSTANTS = ("aten::fill_", "aten::zero_")
_READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal")


def trace(model: torch.nn.Module, load: Loader, specs: Mapping[str, Spec]) -> Trace:
    """Learn where a loader puts a checkpoint's tensors.

    The loader must copy in this thread and through torch: copies by other threads, or through
    numpy, are not seen.

    Args:
        model: what the loader fills. Its weights are neither read nor written here.
        load: the loader, which may be called once more.
        specs: the checkpoint's tensors, in the order in which they are to be loaded.

    Raises:
        LayoutError: the loader fails on tensors that have no values.

    Example:
        >>> from hotgraft.format import dtype_of
        >>> fused = torch.nn.Linear(2, 4, bias=False)
        >>> def load(weights):
        ...     for name, tensor in weights:
        ...         fused.weight.data[:2 if name == "q" else 4][-2:].copy_(tensor)
        >>> half = Spec((2, 2), dtype_of(torch.float32, "q"))
        >>> found = trace(fused, load, {"q": half, "k": half})
        >>> found.regions["k"][0].target.offset
        4
    """
    recorder = _Recorder(find_slots(model), specs)
    before = {id(p): p.data for p in _tensors(model)}
    hung = [(owner, dict(owner)) for owner in _owners(model)]
    # Nothing is written, so nobody (a host that is attached) may take it for a write.
    unwritten = contextlib.ExitStack()
    for tensor in _tensors(model):
        if not tensor.is_inference():  # which has no version
            unwritten.enter_context(_unsafe_preserve_version_counter(tensor))
    try:
        with recorder:
            load(recorder.feed(specs))
    except LayoutError:
        raise
    except Exception as error:
        raise LayoutError(
            f"the loader of {type(model).__name__} cannot be traced: at {recorder.current!r} it "
            f"failed on a tensor without values ({error})"
        ) from error
    finally:
        for owner, kept_there in hung:
            if any(owner.get(key) is not tensor for key, tensor in kept_there.items()):
                owner.clear()
                owner.update(kept_there)
        for tensor in _tensors(model):
            kept = before.get(id(tensor))
            if kept is not None and tensor.data_ptr() != kept.data_ptr():
                recorder.refuse(tensor, "its storage is replaced when it is loaded")
                tensor.data = kept
        unwritten.close()
    return Trace(recorder.slots, specs, recorder.regions, recorder.refused, recorder.overwritten)


def _owners(model: torch.nn.Module) -> Iterator[dict[str, Any]]:
    for module in model.modules():
        yield module._parameters
        yield module._buffers


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records copies of a checkpoint's views into slots, and lets nothing write to a slot."""

    def __init__(self, slots: Mapping[str, Slot], specs: Mapping[str, Spec]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots = slots
        self.regions: dict[str, list[Region]] = {}
        self.refused: dict[str, str] = {}
        self.current = ""
        """The tensor that the loader was given last."""
        homes = {id(s.home): s.home for s in slots.values()}.values()
        self._homes: dict[torch.device, _Map] = {}
        for slot in homes:
            if not slot.tensor.is_meta and slot.tensor.numel():
                self._homes.setdefault(slot.tensor.device, _Map()).add(slot)
        for found in self._homes.values():
            found.close()
        self._specs = specs
        self.overwritten: dict[str, set[str]] = {}
        """Tensors whose place is taken by others', which are loaded later."""
        self._written: dict[str, Taken] = {}  # by home: which parts, by what tensor
        self._sources: dict[int, tuple[str, Any]] = {}  # a checkpoint's tensor by its storage
        self._made: dict[int, tuple[set[str], Any]] = {}  # from which ones a storage was computed

    def feed(self, specs: Mapping[str, Spec]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors without values."""
        for name, (shape, dtype) in specs.items():
            tensor = torch.empty(shape, dtype=dtype.torch, device="meta")
            storage = tensor.untyped_storage()
            self._sources[storage._cdata] = name, storage
            self.current = name
            yield name, tensor

    def refuse(self, tensor: torch.Tensor, why: str) -> None:
        """Nothing of what was put into this tensor may be grafted."""
        for name, regions in self.regions.items():
            if any(self.slots[r.slot].tensor is tensor for r in regions):
                self.refused.setdefault(name, why)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        names = self._names(tree_leaves((args, kwargs)))
        if schema.name in _READS and names:
            self._refuse(names, "its values decide how it is loaded")
            if schema.name == _READS[0]:
                return 0.0
        written = [
            args[at] if at < len(args) else kwargs.get(argument.name)
            for at, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        skipped = False
        for target in filter(torch.is_tensor, tree_leaves(written)):
            home = self._home(target)
            if home is not None:
                self._record(schema.name, target, home, args, names)
            else:
                self._note_elsewhere(target, names)
            # Weights stay as they are, and to others there are no values to write.
            skipped |= home is not None or (bool(names) and not target.is_meta)
        if skipped and not schema.returns:
            return None
        if skipped:
            return written[0] if len(written) == 1 else tuple(written)
        result = func(*args, **kwargs)
        for made in filter(torch.is_tensor, tree_leaves(result)):
            if made.untyped_storage()._cdata not in self._sources:
                self._mark(made, names)
        return result

    def _record(
        self, name: str, target: torch.Tensor, home: Slot, args: tuple[Any, ...], names: set[str]
    ) -> None:
        copied = name == "aten::copy_" and len(args) > 1
        lost = self._overwrite(target, home, names if copied else set())
        source = args[1] if copied else None
        known = self._sources.get(source.untyped_storage()._cdata) if source is not None else None
        if known is None:
            if name not in _CONSTANTS:
                self._refuse(
                    names or lost or {self.current}, f"it is computed when it is loaded ({name})"
                )
            return
        assert source is not None
        sizes = (home.tensor.element_size(), self._specs[known[0]].dtype.item_size)
        if (target.element_size(), source.element_size()) != sizes:
            self._refuse({known[0]}, "it is copied as elements of another size")
            return
        if source.shape != target.shape:
            source = source.expand(target.shape)
        if overlaps_itself(tuple(source.shape), source.stride()):
            self._refuse({known[0]}, "one of its elements goes to many places")
            return
        offset = (target.data_ptr() - home.tensor.data_ptr()) // target.element_size()
        region = Region(home.name, View.of(source), View.of(target)._replace(offset=offset))
        self.regions.setdefault(known[0], []).append(region)
        taken = self._written.setdefault(home.name, Taken(home.tensor.data_ptr()))
        taken.add(target.detach(), known[0])

    def _overwrite(self, target: torch.Tensor, home: Slot, by: set[str]) -> set[str]:
        """What was put there before is gone: for another tensor's values, or for good."""
        lost = set()
        written = self._written.get(home.name)
        for name in written.touching(target) if written is not None else ():
            if by != {name}:
                lost.add(name)
                if by:
                    self.overwritten.setdefault(name, set()).update(by)
                else:
                    self._refuse({name}, "a part of it is overwritten when it is loaded")
        return lost

    def _note_elsewhere(self, target: torch.Tensor, names: set[str]) -> None:
        """A write to memory that is no slot's: of the loader, or of the checkpoint's tensor."""
        storage = target.untyped_storage()._cdata
        if storage in self._sources:
            self._refuse({self._sources[storage][0]}, "it is changed before it is copied")
        elif names and not target.is_meta:
            self._refuse(names, "it is also copied into memory that is no parameter's")
        self._mark(target, names)

    def _home(self, target: torch.Tensor) -> Slot | None:
        """The slot that this is a part of."""
        if target.is_meta or not target.numel():
            return None
        there = self._homes.get(target.device)
        return there.find(*extent(target)) if there is not None else None

    def _names(self, values: Iterable[Any]) -> set[str]:
        """The checkpoint's tensors that some values come from."""
        found: set[str] = set()
        for value in values:
            if torch.is_tensor(value):
                storage = value.untyped_storage()._cdata
                if storage in self._sources:
                    found.add(self._sources[storage][0])
                found |= self._made.get(storage, (set(), None))[0]
        return found

    def _mark(self, tensor: torch.Tensor, names: set[str]) -> None:
        if names:
            storage = tensor.untyped_storage()
            before = self._made.get(storage._cdata, (set(), None))[0]
            self._made[storage._cdata] = names | before, storage

    def _refuse(self, names: Iterable[str], why: str) -> None:
        for name in names:
            self.refused.setdefault(name, why)


class _Map:
    """The slots of a device by address."""

    def __init__(self) -> None:
        self._found: list[tuple[int, int, Slot]] = []
        self._reach: list[int] = []

    def add(self, slot: Slot) -> None:
        self._found.append((*extent(slot.tensor), slot))

    def close(self) -> None:
        self._found.sort(key=lambda entry: entry[:2])
        self._reach = list(itertools.accumulate((end for _, end, _ in self._found), max))

    def find(self, begin: int, end: int) -> Slot | None:
        """The slot that contains these bytes."""
        at = bisect.bisect_right(self._found, begin, key=lambda entry: entry[0]) - 1
        while at >= 0 and self._reach[at] > begin:
            if end <= self._found[at][1]:
                return self._found[at][2]
            at -= 1
        return None
