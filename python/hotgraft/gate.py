"""The gate: forward passes enter shared, commits exclusively.

So no output is ever computed from half-old, half-new weights. The gate stands in front of the root
module's `forward`, which both `model(x)` and `model.forward(x)` go through; hooks are not used,
because they leak when a pass is interrupted and miss direct calls.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hotgraft.errors import GateError

_PATIENCE = 0.05
"""Seconds after which a waiting commit looks by itself: an interrupt may have eaten its wake-up."""


class Gate:
    """A lock with shared and exclusive entry, re-entrant for passes, fair to commits.

    A waiting commit holds back new passes, but not passes nested in one that runs.

    KeyboardInterrupt may come after any call, also on the way into a Python function. Plain locks
    in `with` statements and single calls of C functions are safe from that; `threading.Condition`
    is not (an interrupt inside its `__enter__` leaves it locked), so there is none here.

    Args:
        before_pass: called as a pass enters, while no commit runs.

    Example:
        >>> gate = Gate()
        >>> with gate.passing():
        ...     gate.passes
        1
    """

    def __init__(self, before_pass: Callable[[], object] = lambda: None) -> None:
        self._before_pass = before_pass
        self._turnstile = threading.Lock()  # new passes go through; a commit keeps it
        self._mutex = threading.RLock()  # the garbage collector may close a hold inside it
        self._inside: dict[object, int] = {}  # a token a pass -> its thread
        self._committing: int | None = None  # the thread that has the turnstile to commit
        self._emptied = threading.Lock()  # released to wake the commit
        self._emptied.acquire()
        self.forget = self._inside.pop
        """`forget(token, None)` is the shared exit: one C function, so that nothing comes between.

        Call `wake()` when it returns something."""

    @property
    def passes(self) -> int:
        """Passes (and holds) that are inside now."""
        return len(self._inside)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Shared entry: waits for a commit that runs or waits, unless nested."""
        token = object()
        try:
            self.enter(token)
            yield
        finally:
            if self.forget(token, None) is not None:
                self.wake()

    def enter(self, token: object) -> None:
        """Shared entry under a token of the caller's, who forgets it in a `finally`."""
        me = threading.get_ident()
        with self._mutex:
            if me in self._inside.values() or me == self._committing:
                self._inside[token] = me
                return
        with self._turnstile:
            self._before_pass()
            with self._mutex:
                self._inside[token] = me

    def wake(self) -> None:
        """Wake the commit that waits for the last pass."""
        with self._mutex:
            if not self._inside and self._emptied.locked():
                self._emptied.release()

    @contextlib.contextmanager
    def committing(self) -> Iterator[None]:
        """Exclusive entry: waits until no pass is inside.

        Raises:
            GateError: this thread is itself inside a pass, a hold or a commit, so it would wait for
                ever.
        """
        me = threading.get_ident()
        with self._mutex:
            if me in self._inside.values() or me == self._committing:
                raise GateError(
                    "the weights cannot be switched inside a forward pass or a hold of the same "
                    "thread; switch before or after it"
                )
        with self._turnstile:
            try:
                self._committing = me
                while self._is_occupied():
                    self._emptied.acquire(timeout=_PATIENCE)
                yield
            finally:
                self._committing = None

    def _is_occupied(self) -> bool:
        with self._mutex:
            return bool(self._inside)


class GatedForward:
    """Stands in for a module's `forward`: the same call, inside the gate.

    It is put into the instance's `__dict__`, so the class and other instances are untouched. A copy
    of the module (deep copy or pickle) gets the plain `forward` back: it has no gate.
    """

    def __init__(self, module: torch.nn.Module, gate: Gate) -> None:
        self._gate = gate
        self._forward: Callable[..., Any] = module.forward
        functools.update_wrapper(self, self._forward)  # name, docstring and signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = object()
        # Entering is inside the try: an interrupt between the two would otherwise leave it entered.
        try:
            self._gate.enter(token)
            return self._forward(*args, **kwargs)
        finally:
            if self._gate.forget(token, None) is not None:
                self._gate.wake()

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._forward,)


def _itself(forward: Callable[..., Any]) -> Callable[..., Any]:
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
