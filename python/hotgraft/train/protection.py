"""protect: positions that no step of an optimizer changes, whatever it does."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Any

import torch
from torch import nn

from hotgraft import kernels
from hotgraft.errors import BaseMismatchError, CoverageError, GraftError, HostChangedError
from hotgraft.gate import untraced
from hotgraft.graft import Graft, Mask
from hotgraft.placement import Slot, compile_plan, find_slots, fit, resolve_backends
from hotgraft.placement.names import resolve_names
from hotgraft.train import parameters
from hotgraft.weights import sample


def protect(optimizer: torch.optim.Optimizer, model: nn.Module, mask: Mask | Graft) -> Protection:
    """Make positions untouchable: after every step they hold the very bits that they hold now.

    Gradient, momentum, weight decay, a pull: whatever moved them, they are written back after the
    step, through the engine's scatter, in time proportional to the mask. This is how a second task
    is learnt around a first one's graft.

    Args:
        optimizer: any of torch's, as it is used in a loop of one's own, in `finetune` or in
            `transformers.Trainer(optimizers=(optimizer, None))`.
        model: what it trains.
        mask: the positions, or a graft that has them. Names may differ from the model's by a
            prefix, as in `host.load`.

    The gradient at protected positions is not touched, so it counts in the norm that is clipped.
    Inside a step (an optimizer that calls a closure again and again) they may move. Tensors that
    the optimizer does not train are not written, so frozen ones may be in the mask, and may thaw.
    What others write there (`load_state_dict`, a host's switch) lasts until the next step, which
    brings the old bits back: protect again after it.
    The model may move to another device meanwhile; an optimizer's copy, a pickled one, or one whose
    state was loaded into a new object has no protection: protect again.

    Returns:
        a handle: `remove()` ends it, and so does leaving it as a context manager.

    Raises:
        CoverageError: the model lacks a tensor, or the optimizer trains nothing of this model.
        BaseMismatchError: a tensor has another shape.
        ParameterError: a tensor cannot be written in place (sharded, quantised, ...).
        BackendError: there is no backend for the model's device.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> before = model.weight.detach().clone()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> with protect(optimizer, model, Mask({"weight": ((1, 3), [0, 2])})):
        ...     model.weight.grad = torch.ones(1, 3)
        ...     optimizer.step()
        >>> (model.weight == before).tolist()
        [[True, False, True]]
    """
    return Protection(optimizer, model, mask.mask if isinstance(mask, Graft) else mask)


class Protection:
    """Positions that an optimizer leaves alone. Make one with `protect`."""

    mask: Mask
    """The positions, in the model's names."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, mask: Mask) -> None:
        if not isinstance(mask, Mask):
            raise GraftError(f"{mask!r} is not a Mask; Mask({{name: (shape, indices)}}) makes one")
        parameters.require_common(optimizer, model)
        self._optimizer, self._model = optimizer, model
        self.mask = _in_names_of(model, mask)
        # New and old bits are the same: what is there now.
        self._held = Graft.from_mask(model, model, self.mask) if self.mask else None
        self._stepping = False
        self._place()
        self._before = optimizer.register_step_pre_hook(self._begin)
        self._after = optimizer.register_step_post_hook(self._end)

    def remove(self) -> None:
        """Let the positions be trained again. A second call does nothing.

        If the last step ended in an exception, they are written back first.
        """
        try:
            if self._stepping:
                self._write()
        finally:
            self._stepping = False
            self._before.remove()
            self._after.remove()

    def __enter__(self) -> Protection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Protection({self.mask.nnz} entries in {len(self.mask)} tensors)"

    @untraced
    def _begin(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        # Hooks run in the order of their registration, and this one has to be the last.
        self._after.remove()
        self._after = optimizer.register_step_post_hook(self._end)
        self._stepping = True

    @untraced
    def _end(self, _optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self._write()
        self._stepping = False

    def _write(self) -> None:
        if self._trained != len(parameters.of_optimizer(self._optimizer)) or self._moved():
            self._place()
        if self._plan is None:
            return
        for launch in self._plan.launches:
            self._backends[launch.device].scatter(launch.table, launch.new)
        torch.autograd.graph.increment_version(self._written)

    def _moved(self) -> bool:
        """Whether a tensor lies elsewhere than it did (`model.to(...)`)."""
        try:
            if self._plan is not None:
                self._plan.watch.check_in_place()
        except HostChangedError:
            return True
        return False

    def _place(self) -> None:
        """Compile the plan that writes to what the optimizer trains, where it is now."""
        every = parameters.of_optimizer(self._optimizer)
        trained = {id(tensor): tensor for tensor in every}
        slots = find_slots(self._model)
        held, plan = self._held, None
        names = [n for n in held.names if _tensors(slots.get(n), trained)] if held else []
        if held is not None and names:
            for name in names:
                now, then = slots[name].dtype.name, _dtype(held, name)
                if now != then:
                    raise BaseMismatchError(
                        f"{name!r} was {then} when its positions were protected and is {now} now, "
                        "so it cannot hold the same bits; convert the model first, then protect"
                    )
            if names != list(held.names):
                held = Graft.from_entries({name: held[name] for name in names})
            self._backends = resolve_backends({name: slots[name] for name in names}, None, None)
            fitted = fit(held, slots, self._model, kernels.resolve(), allow_nonfinite=True)
            plan = compile_plan(fitted, slots, self._backends)
        # Only now: where this raised, the next step finds what the last one found, and raises too.
        self._plan = plan
        self._trained = len(every)
        self._written = [tensor for name in names for tensor in _tensors(slots[name], trained)]


def _tensors(slot: Slot | None, trained: dict[int, torch.Tensor]) -> list[torch.Tensor]:
    """Those of an optimizer's tensors that share a slot's memory."""
    found = {id(place.tensor): place.tensor for place in slot.family} if slot is not None else {}
    return [tensor for key, tensor in found.items() if key in trained]


def _dtype(graft: Graft, name: str) -> str:
    return next(row.dtype for row in graft.rows if row.name == name)


def _in_names_of(model: nn.Module, mask: Mask) -> Mask:
    """The mask in the model's names.

    Raises:
        CoverageError: a tensor has no counterpart.
        BaseMismatchError: it has another shape.
    """
    slots = find_slots(model)
    found, missing = resolve_names(mask, slots, model)
    if missing:
        raise CoverageError(
            f"the model lacks {sample(missing)}, which the mask names; the model has "
            f"{sample(list(slots))}. Protect with a mask made for this model, or for one whose "
            "names differ by a prefix"
        )
    for name, target in found.items():
        if mask.shape(name) != slots[target].shape:
            raise BaseMismatchError(
                f"{name!r} has shape {list(mask.shape(name))} in the mask and "
                f"{list(slots[target].shape)} in the model ({target!r}): it was made for another "
                "model"
            )
    doubled = {target for target, uses in Counter(found.values()).items() if uses > 1}
    if doubled:
        raise CoverageError(f"several of the mask's tensors map to {sample(doubled)}")
    return Mask({target: (mask.shape(name), mask[name]) for name, target in found.items()})
