"""The gate: forward passes enter shared, commits exclusively.

So no output is ever computed from half-old, half-new weights. The gate stands in front of the root
module's `forward`, which both `model(x)` and `model.forward(x)` go through; hooks are not used,
because they leak when a pass is interrupted and miss direct calls.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hotgraft.errors import GateError


class Gate:
    """A lock with shared and exclusive entry, re-entrant for passes, fair to commits.

    A waiting commit holds back new passes, but not passes nested in one that runs.

    Example:
        >>> gate = Gate()
        >>> with gate.passing():
        ...     gate.passes
        1
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._inside: dict[object, int] = {}  # a token a pass -> its thread
        self._commits_waiting = 0
        self._committing: int | None = None  # the thread

    @property
    def passes(self) -> int:
        """Passes (and holds) that are inside now."""
        return len(self._inside)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Shared entry: waits for a commit that runs or waits, unless nested."""
        token = object()
        # Entering is inside the try: an interrupt between the two would otherwise leave it entered.
        try:
            self.enter(token)
            yield
        finally:
            self.leave(token)

    def enter(self, token: object) -> None:
        """Shared entry under a token of the caller's; `leave` it in a `finally`."""
        me = threading.get_ident()
        with self._changed:
            if self._committing != me and me not in self._inside.values():
                while self._committing is not None or self._commits_waiting:
                    self._changed.wait()
            self._inside[token] = me

    def leave(self, token: object) -> None:
        """Shared exit; nothing happens if the token never entered."""
        with self._changed:
            if self._inside.pop(token, None) is not None and not self._inside:
                self._changed.notify_all()

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """Exclusive entry: waits until no pass is inside.

        Raises:
            GateError: this thread is itself inside a pass or a hold, so it would wait for ever.
        """
        me = threading.get_ident()
        entered = False
        with self._changed:
            if me in self._inside.values():
                raise GateError(
                    "the weights cannot be switched inside a forward pass or a hold of the same "
                    "thread; switch before or after it"
                )
            self._commits_waiting += 1
            try:
                while self._inside or self._committing is not None:
                    self._changed.wait()
                self._committing = me
                entered = True
            finally:
                self._commits_waiting -= 1
                if not entered:
                    self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._committing = None
                self._changed.notify_all()


class GatedForward:
    """Stands in for a module's `forward`: the same call, inside the gate.

    It is put into the instance's `__dict__`, so the class and other instances are untouched. A copy
    of the module (deep copy or pickle) gets the plain `forward` back: it has no gate.
    """

    def __init__(self, module: torch.nn.Module, gate: Gate) -> None:
        self._module = module
        self._gate = gate
        self._forward: Callable[..., Any] = module.forward
        functools.update_wrapper(self, self._forward)  # name, docstring and signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = object()
        try:
            self._gate.enter(token)
            return self._forward(*args, **kwargs)
        finally:
            self._gate.leave(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _plain_forward(memo[id(self._module)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain_forward, (self._module,)


def _plain_forward(module: torch.nn.Module) -> Callable[..., Any]:
    forward: Callable[..., Any] = type(module).forward.__get__(module)
    return forward


def install(module: torch.nn.Module, gate: Gate) -> Callable[[], None]:
    """Put the gate in front of a module's forward; returns what takes it away.

    Raises:
        GateError: the module has a gate already, or takes no new attributes (TorchScript).

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> remove = install(model, Gate())
        >>> isinstance(model.forward, GatedForward), remove()
        (True, None)
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise GateError("a TorchScript module cannot be gated; attach the module it was made from")
    if isinstance(module.forward, GatedForward):
        raise GateError("a host is attached to this model already; use it, or detach it first")
    before = module.__dict__.get("forward")
    gated = GatedForward(module, gate)
    module.__dict__["forward"] = gated

    def remove() -> None:
        if module.__dict__.get("forward") is not gated:
            return  # somebody wrapped it since; an idle gate in there does no harm
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before

    return remove
