"""Candidates: the entries that a search chooses from, between two checkpoints, on the live model.

A gate in 0 .. 1 says how far an entry has gone from the base's value to the fine-tuned one. Gates
are written with the engine's scatter. Their derivatives are read with its gather, tensor by tensor
in the backward pass, and each dense gradient is freed at once. So a search needs memory in
proportion to its candidates, and neither checkpoint a second time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hotgraft import _native, kernels
from hotgraft.batches import Loss, scalar
from hotgraft.errors import (
    BaseMismatchError,
    DataError,
    HostChangedError,
    NonFiniteError,
    ParameterError,
)
from hotgraft.format import DTYPES, Bits, Group, Row, dtype_of
from hotgraft.gate import holding
from hotgraft.graft import Graft, bit_view
from hotgraft.kernels import Backend
from hotgraft.placement import compile_plan, find_slots, fit, resolve_backends
from hotgraft.placement.plain import Launch
from hotgraft.placement.slots import Slot

PIECE = 1 << 15
"""Candidates that are computed at once."""


class _Part(NamedTuple):
    """The candidates of one row: of a tensor, within a block."""

    row: Row
    entries: slice
    """Of the candidates' vectors."""
    old: torch.Tensor
    new: torch.Tensor


class _Write(NamedTuple):
    """A launch that writes candidates of one dtype."""

    backend: Backend
    launch: Launch
    order: npt.NDArray[np.int64] | None
    """Which of the dtype's candidates, where it is not all of them in order."""


class _Kind(NamedTuple):
    """The candidates of one dtype."""

    entries: slice
    old: torch.Tensor
    new: torch.Tensor
    soft: torch.Tensor
    """What was written last."""
    writes: tuple[_Write, ...]


class Candidates:
    """The entries of a graft as gates on a model that holds the graft's base.

    A context manager: meanwhile the model is in evaluation mode and only the parameters with
    candidates require a gradient; at the end the weights are the base's again, bit for bit. Where a
    host is attached to the model or a part of it, its commits wait until then, and one from inside
    is a GateError. Other writes meanwhile, by a host of a module around the model or by the loss,
    are a HostChangedError at the next write or at the end: the candidates hold the base's values
    then, and what else was written stays. (Writes through `.data` are not seen.)

    Args:
        model: holds the base.
        graft: the candidates, between the base and the fine-tuned model.

    Raises:
        BaseMismatchError, CoverageError: the graft is not one for this model; on entering, the
            model does not hold its base's bits.
        ParameterError: a candidate is in something that has no gradient: a frozen parameter, a
            buffer, an integer tensor; or in a tensor that cannot be written.
        NonFiniteError: a change is infinite, or not a number.

    Example:
        >>> import hotgraft
        >>> model, tuned = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> with Candidates(model, hotgraft.diff(model, tuned)) as candidates:
        ...     candidates.write(torch.ones(candidates.count))
        ...     torch.equal(model.weight, tuned.weight)
        True
    """

    graft: Graft
    slopes: torch.Tensor
    """fp32 `[count]`: the derivatives of the last loss with respect to the gates."""

    def __init__(self, model: nn.Module, graft: Graft) -> None:
        slots = find_slots(model)
        fitted = fit(graft, slots, model, kernels.resolve(), allow_nonfinite=True)
        for slot in (slots[name] for name in fitted.names):
            if len(slot.views) > 1:
                first, second = sorted(view.name for view in slot.views)[:2]
                raise ParameterError(
                    f"{first!r} and {second!r} share memory as different views, so one gate would "
                    "move both: choose a scope without them"
                )
        self.graft = graft
        self.slopes = torch.zeros(graft.nnz)
        self._model = model
        self._kinds: list[_Kind] = []
        self._watches = []  # they hold the memory that is written
        self._arrived = False  # whether the last loss had a gradient for any candidate
        self._reached: set[str] = set()  # the tensors for which any loss had one
        places = [
            (slots[name].name, place.tensor) for name in graft.names for place in slots[name].places
        ]
        counted = [(name, tensor) for name, tensor in places if not tensor.is_inference()]
        self._names = tuple(name for name, _ in counted)
        self._tensors = tuple(tensor for _, tensor in counted)  # with a version counter
        self._parts: dict[nn.Parameter, list[_Part]] = {}
        backends = resolve_backends({name: slots[name] for name in graft.names}, None, None)
        filled = 0
        for dtype, group in graft.groups.items():  # the vectors hold dtype after dtype
            rows = [row for row in graft.rows if row.dtype == dtype]
            old, new = (_values(_lent(array), dtype) for array in (group.old, group.new))
            for row in rows:
                mine = slice(row.first, row.first + row.count)
                entries = slice(filled + mine.start, filled + mine.stop)
                part = _Part(row, entries, old[mine], new[mine])
                self._check_changes(part)
                for parameter in _trainable(slots[row.name]):
                    self._parts.setdefault(parameter, []).append(part)
            same = Graft(rows, {dtype: group}, graft.provenance, checked=True)
            plan = compile_plan(same, slots, backends)
            self._watches.append(plan.watch)
            writes = (_Write(backends[at.device], at, _order(at, len(old))) for at in plan.launches)
            entries = slice(filled, filled := filled + len(old))
            self._kinds.append(_Kind(entries, old, new, torch.empty_like(old), tuple(writes)))

    def _check_changes(self, part: _Part) -> None:
        wrong = torch.isfinite(_change(part).float()).logical_not_().nonzero()
        if len(wrong):
            row, at = part.row, int(wrong[0])
            position = row.block + int(self.graft.arrays(row).positions[at])
            raise NonFiniteError(
                f"{row.name!r}, position {position}: the change from {part.old[at].item():g} to "
                f"{part.new[at].item():g} is not finite in fp32, so there is nothing between: mend "
                "the checkpoint, or choose a scope without it"
            )

    @property
    def count(self) -> int:
        """How many candidates there are."""
        return self.graft.nnz

    def changes(self) -> torch.Tensor:
        """fp32 `[count]`: fine-tuned minus base."""
        found = torch.empty(self.count)
        for kind in self._kinds:
            for part, here in _pieces(kind, found):
                here.copy_(_change(part))
        return found

    def __enter__(self) -> Candidates:
        with contextlib.ExitStack() as stack:
            stack.enter_context(holding(self._model))  # a commit's writes would be lost at the end
            self._versions = _native.versions(self._tensors)  # what the engine writes they miss
            self._check_base()
            stack.enter_context(_evaluating(self._model))
            stack.enter_context(_only_required(self._model, self._parts))
            stack.callback(self._restore)
            for parameter in self._parts:
                watch: Any = parameter.register_post_accumulate_grad_hook  # without types
                handle = watch(self._take)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, gates: torch.Tensor) -> None:
        """Set every candidate to base + gate x change, rounded once to its type.

        A gate of 0 writes the base's value, a gate of 1 the fine-tuned one, exactly.

        Args:
            gates: fp32 `[count]`, in 0 .. 1.

        Raises:
            HostChangedError: the model's weights were moved, replaced or written meanwhile.
        """
        self._check_in_place()
        self._check_unwritten()
        for kind in self._kinds:
            for part, mine in _pieces(kind, gates):
                old, new = _wide(part.old), _wide(part.new)
                part.soft.copy_(torch.lerp(old, new, mine.to(old.dtype)))  # exact at both ends
            bits = bit_view(kind.soft)
            for backend, launch, order in kind.writes:
                values = bits if order is None else bits[order]
                backend.scatter(launch.table, backend.values(values))
        torch.clear_autocast_cache()  # which keeps weights as they were, in low precision

    def _restore(self) -> None:
        for kind in self._kinds:
            for backend, launch, _ in kind.writes:
                backend.scatter(launch.table, launch.old)
        torch.clear_autocast_cache()
        self._check_in_place()
        try:
            self._check_unwritten()
        except HostChangedError:
            # So that a host whose live entries lay here finds out, before it writes again.
            torch.autograd.graph.increment_version(self._tensors)
            raise

    def _check_base(self) -> None:
        """Raises `BaseMismatchError` unless the candidates hold the base's bits."""
        self._check_in_place()
        for kind in self._kinds:
            for backend, launch, _ in kind.writes:
                count, _first = backend.compare(launch.table, launch.old)
                if count:
                    raise BaseMismatchError(
                        f"{count} of {self.count} candidates do not hold the base's values: the "
                        "weights were written since the base was read; search again, while "
                        "nobody writes them"
                    )

    def _check_unwritten(self) -> None:
        wrong = np.flatnonzero(_native.versions(self._tensors) != self._versions)
        if len(wrong):
            raise HostChangedError(
                f"during the search somebody wrote to {self._names[wrong[0]]!r} (the commit of a "
                "host around the model, load_state_dict or an optimizer's step in the loss?), so "
                "there is no graft. The candidates were given the base's values back, and what "
                "else was written stays: the weights are not what they were. Load the base again"
            )

    def _check_in_place(self) -> None:
        try:
            for watch in self._watches:
                watch.check_in_place()
        except HostChangedError as error:
            raise HostChangedError(
                "during the search a weight was moved or replaced (model.to(...), .data = ... in "
                "the loss?), so the model does not hold the base any more: load it again, and move "
                "it before the search"
            ) from error

    def measure(self, loss: Loss, batch: Any, place: str) -> float:
        """The loss on a batch.

        Args:
            place: where in the search this is, for messages.

        Raises:
            DataError, NonFiniteError: it is not a finite scalar.
        """
        with torch.no_grad():
            return scalar(loss(self._model, batch), place, differentiable=False)

    def differentiate(self, loss: Loss, batch: Any, place: str) -> float:
        """The loss on a batch; `slopes` holds its derivatives then.

        Raises:
            DataError: the loss is not a scalar that depends on a parameter with candidates.
            NonFiniteError: the loss or a derivative is a NaN or infinity.
        """
        self.slopes.zero_()
        self._arrived = False
        torch.clear_autocast_cache()  # what it keeps from under no_grad has no gradient
        with torch.enable_grad():
            value = loss(self._model, batch)
            number = scalar(value, place)
            torch.autograd.backward(value)
        if not self._arrived:
            raise DataError(
                f"the loss at {place} depends on no tensor with candidates: does it run the model "
                "it is given, and does the scope hold what it uses?"
            )
        if not all(map(math.isfinite, torch.aminmax(self.slopes))):
            raise NonFiniteError(
                f"the gradient at {place} has a NaN or infinity, where the loss is {number:g}: "
                "look at the loss function at this batch, and at its scale if the model is in fp16"
            )
        return number

    def unreached(self) -> list[str]:
        """The tensors with candidates for which no loss had a gradient, if any tensor had one."""
        return [name for name in self.graft.names if self._reached and name not in self._reached]

    def _take(self, parameter: torch.Tensor) -> None:
        """Read what is wanted of a parameter's gradient, and free it."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        assert isinstance(parameter, nn.Parameter)
        self._arrived = True
        self._reached.update(part.row.name for part in self._parts[parameter])
        flat = gradient.to_dense().contiguous().view(-1)
        dtype = dtype_of(flat.dtype, "a gradient")
        backend = kernels.resolve(None, flat.device)
        for part in self._parts[parameter]:
            row = part.row
            address = flat.data_ptr() + row.block * dtype.item_size
            segment = np.array([[address, 0, row.count]], np.int64)
            table = backend.table(segment, self.graft.arrays(row).positions, dtype.item_size)
            values = backend.values(np.empty(row.count, dtype.bits))
            backend.gather(table, values)
            slopes = _values(backend.read(values, dtype.bits), dtype.name)
            self.slopes[part.entries] += (slopes * _change(part)).float()

    def choose(self, chosen: npt.NDArray[np.bool_]) -> Graft:
        """The graft of some of the candidates.

        Args:
            chosen: bool `[count]`, true for at least one.
        """
        groups = {}
        for kind, (dtype, group) in zip(self._kinds, self.graft.groups.items(), strict=True):
            mine = chosen[kind.entries]
            if mine.any():
                groups[dtype] = Group(*(array[mine] for array in group))
        rows, filled = [], dict.fromkeys(groups, 0)
        begins = {part.row: part.entries for parts in self._parts.values() for part in parts}
        for row in self.graft.rows:
            count = int(np.count_nonzero(chosen[begins[row]]))
            if count:
                rows.append(row._replace(first=filled[row.dtype], count=count))
                filled[row.dtype] += count
        return Graft(rows, groups, self.graft.provenance, owned=True)


def _values(bits: Bits, dtype: str) -> torch.Tensor:
    """Bits that numpy lets be written, as what they stand for; they share memory."""
    return torch.from_numpy(bits).view(DTYPES[dtype].torch)


class _Lent:
    """A frozen array's memory, not said to be frozen. It lives as long as who looks at it."""

    def __init__(self, array: Bits) -> None:
        self._array = array
        data = array.__array_interface__["data"][0], False
        self.__array_interface__ = {**array.__array_interface__, "data": data}


def _lent(array: Bits) -> Bits:
    """A graft's array for torch to read, which warns of frozen ones as it may write to tensors."""
    return np.asarray(_Lent(array))


def _pieces(kind: _Kind, vector: torch.Tensor) -> Iterator[tuple[_Kind, torch.Tensor]]:
    """The candidates of a dtype, and what a vector of all candidates has for them, bit by bit:
    what is computed on the way has no more than a bit's size."""
    mine = vector[kind.entries]
    for first in range(0, len(mine), PIECE):
        here = slice(first, first + PIECE)
        piece = kind._replace(old=kind.old[here], new=kind.new[here], soft=kind.soft[here])
        yield piece, mine[here]


def _wide(values: torch.Tensor) -> torch.Tensor:
    """At least fp32."""
    return values if values.dtype.itemsize >= 4 else values.float()


def _change(part: _Part | _Kind) -> torch.Tensor:
    """Fine-tuned minus base, in at least fp32."""
    return _wide(part.new) - _wide(part.old)


def _trainable(slot: Slot) -> list[nn.Parameter]:
    """The parameters on a slot's memory (several may be tied), if all have gradients."""
    parameters = []
    for tensor in {id(place.tensor): place.tensor for place in slot.places}.values():
        found = None
        if not isinstance(tensor, nn.Parameter):
            found = "a buffer"
        elif not slot.dtype.has_arithmetic:
            found = f"of dtype {slot.dtype.name}"
        elif not tensor.requires_grad:
            found = "frozen (requires_grad is False)"
        elif not tensor.is_leaf:
            found = "computed from other tensors"
        if found is not None:
            raise ParameterError(
                f"{slot.name!r} is {found}, so the search has no gradient there: let it require "
                "one, or choose a scope without it"
            )
        assert isinstance(tensor, nn.Parameter)
        parameters.append(tensor)
    return parameters


def _order(launch: Launch, count: int) -> npt.NDArray[np.int64] | None:
    """Which of a dtype's entries a launch writes; None for all, as they are."""
    if launch.origin is None and sum(row.count for row in launch.rows) == count:
        return None
    every = [np.arange(row.first, row.first + row.count) for row in launch.rows]
    order = np.concatenate(every)
    return order if launch.origin is None else order[launch.origin]


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode: without dropout a gate's derivative is that of the model as served."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _only_required(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """These require a gradient, the others do not, and gradients held by anyone are kept."""
    chosen = set(chosen)
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    try:
        for p in before:
            p.grad = None
            p.requires_grad_(p in chosen)
        yield
    finally:
        for p, (flag, gradient) in before.items():
            p.requires_grad_(flag)
            p.grad = gradient
