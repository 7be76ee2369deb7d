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
from typing import Any, TypeVar, cast

import torch

from hotgraft.errors import GateError

Result = TypeVar("Result")
Function = TypeVar("Function", bound=Callable[..., Any])

_PATIENCE = 0.05
"""Seconds after which a waiting commit looks by itself: an interrupt may have eaten its wake-up."""


def untraced(function: Function) -> Function:
    """Keep torch.compile out of a function, though not out of what it calls.

    What `torch.compiler.disable(function, recursive=False)` does, without its import of two seconds
    where this torch has the means.
    """
    plain: Any = function
    frames: Any = torch._C._dynamo.eval_frame
    try:
        actions = frames._FrameAction
        skip = frames._FrameExecStrategy(actions.SKIP, actions.DEFAULT)
        frames.set_code_exec_strategy(plain.__code__, skip)
    except AttributeError:
        disable: Any = torch.compiler.disable
        plain = disable(function, recursive=False)
    plain._torchdynamo_disable = True
    plain._torchdynamo_disable_msg = "hotgraft's gate: attach(torch.compile(model)) instead"
    return cast(Function, plain)


class Gate:
    """A lock with shared and exclusive entry, re-entrant for passes, fair to commits.

    A waiting commit first holds back new holds and waits for those that are open, then holds back
    new passes and waits for those inside. What is nested (in the same thread) always goes in, and
    so does any thread's pass while a hold is open: who holds may hand work to other threads.

    KeyboardInterrupt may come after any call, and on the way into any Python function. What must
    happen at an exit is therefore a plain lock in a `with` statement, an assignment, or one call of
    a C function; `threading.Condition` and context managers written in Python are not safe.

    Args:
        before_pass: called as a pass enters, while no commit runs; not where one is nested.
        on_entry: called as any pass or hold enters.

    Example:
        >>> gate = Gate()
        >>> with gate.holding():
        ...     gate.passes
        1
    """

    def __init__(
        self,
        before_pass: Callable[[], object] = lambda: None,
        on_entry: Callable[[], object] = lambda: None,
    ) -> None:
        self._before_pass = before_pass
        self._on_entry = on_entry
        self._front = threading.Lock()  # new holds go through; a commit keeps it
        self._turnstile = threading.Lock()  # new passes go through; a commit keeps it, taken second
        self._mutex = threading.RLock()  # the garbage collector may close a hold inside it
        # A token a pass or hold -> its thread: the object, for numbers are given out again.
        self._inside: dict[object, threading.Thread] = {}
        self._holds: dict[object, threading.Thread] = {}
        self._committing: threading.Thread | None = None  # it has the turnstile to commit
        self._emptied = threading.Lock()  # released to wake the commit
        self._emptied.acquire()
        self._forget = self._inside.pop  # the shared exits: one C function each
        self._let_go = self._holds.pop

    @property
    def passes(self) -> int:
        """Passes and holds that are inside now."""
        return len(self._inside) + len(self._holds)

    @untraced
    def share(self, work: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Do some work as a pass: waits for a commit that runs or waits, unless it may go in."""
        token = object()
        # Entering is inside the try: an interrupt between the two would otherwise leave it entered.
        try:
            self._enter(token)
            self._on_entry()
            return work(*args, **kwargs)
        finally:
            if self._forget(token, None) is not None:
                self._wake(self._inside)

    @contextlib.contextmanager
    def holding(self, after: Callable[[], object] | None = None) -> Iterator[None]:
        """Keep commits out for a block, which another thread may leave than entered it.

        Args:
            after: a commit to begin with; no other one comes between it and the block.
        """
        token = object()
        try:
            if after is None:
                self._enter_hold(token)
            else:
                self.commit(after, token)
            self._on_entry()
            yield
        finally:
            if self._let_go(token, None) is not None:
                self._wake(self._holds)

    def commit(self, work: Callable[[], Result], hold: object = None) -> Result:
        """Do some work alone: waits until no hold is open and no pass inside.

        Args:
            work: what to do.
            hold: for `holding`: the token of a hold that is open when it is done.

        Raises:
            GateError: this thread is itself inside a pass, a hold or a commit, so it would wait for
                ever.
        """
        me = threading.current_thread()
        with self._mutex:
            if self._is_mine(me):
                raise GateError(
                    "the weights cannot be switched inside a forward pass or a hold of the same "
                    "thread; switch before or after it"
                )
        with self._front:
            self._wait_for(self._holds)
            with self._turnstile:
                try:
                    self._committing = me
                    self._wait_for(self._inside, self._holds)  # a pass inside may open a hold
                    result = work()
                    if hold is not None:
                        self._holds[hold] = me
                    return result
                finally:
                    self._committing = None

    @untraced
    def _enter(self, token: object) -> None:
        me = threading.current_thread()
        with self._mutex:
            if self._holds or self._is_mine(me):
                self._inside[token] = me
                return
        with self._turnstile:
            self._before_pass()
            with self._mutex:
                self._inside[token] = me

    def _enter_hold(self, token: object) -> None:
        me = threading.current_thread()
        with self._mutex:
            if self._is_mine(me):
                self._holds[token] = me
                return
        with self._front:
            self._before_pass()
            with self._mutex:
                self._holds[token] = me

    def _wait_for(self, *occupied: dict[object, threading.Thread]) -> None:
        while True:
            with self._mutex:
                if not any(occupied):
                    return
            self._emptied.acquire(timeout=_PATIENCE)

    @untraced
    def _wake(self, left: dict[object, threading.Thread]) -> None:
        """Wake the commit that waits for the last to leave."""
        with self._mutex:
            if not left and self._emptied.locked():
                self._emptied.release()

    @untraced
    def _is_mine(self, me: threading.Thread) -> bool:
        return me is self._committing or me in self._inside.values() or me in self._holds.values()


class GatedForward:
    """Stands in for a module's `forward`: the same call, inside the gate.

    It is put into the instance's `__dict__`, so the class and other instances are untouched. A copy
    of the module (deep copy or pickle) gets the plain `forward` back: it has no gate.
    """

    def __init__(self, module: torch.nn.Module, gate: Gate) -> None:
        self._gate = gate
        self._forward: Callable[..., Any] = module.forward
        functools.update_wrapper(self, self._forward)  # name, docstring and signature

    @untraced
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._gate.share(self._forward, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return copy.deepcopy(self._forward, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._forward,)


class InnerForward(GatedForward):
    """The same in a module that another gated one calls: it does not get in the compiler's way."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        return self._gate.share(self._forward, *args, **kwargs)


def _itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def install(module: torch.nn.Module, gate: Gate, *, inner: bool = False) -> Callable[[], None]:
    """Put the gate in front of a module's forward; returns what takes it away.

    Args:
        module: the module.
        gate: its gate.
        inner: whether it lies in a compiled module that has the gate too.

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
    gated = (InnerForward if inner else GatedForward)(module, gate)
    module.__dict__["forward"] = gated

    def remove() -> None:
        if module.__dict__.get("forward") is not gated:
            return  # somebody wrapped it since; an idle gate in there does no harm
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before

    return remove


def gate_of(module: torch.nn.Module) -> Gate | None:
    """The gate in front of a module, if a host is attached to it."""
    forward = getattr(module, "forward", None)
    return forward._gate if isinstance(forward, GatedForward) else None


@contextlib.contextmanager
def holding(model: object) -> Iterator[None]:
    """Keep out the commits of every host that is attached to a model or to a part of it.

    A host of a module around the model is not found: nothing leads from a module to its owners.
    What is no module has no host.
    """
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    with contextlib.ExitStack() as stack:
        for gate in dict.fromkeys(map(gate_of, modules)):
            if gate is not None:
                stack.enter_context(gate.holding())
        yield
