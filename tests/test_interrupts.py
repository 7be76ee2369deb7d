"""A commit that is interrupted, anywhere, leaves weights and state as they were before it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import factories
import numpy as np
import pytest
import torch
from hosts import Workshop, use, versions
from hotgraft import kernels
from hotgraft.errors import HostChangedError, OverlapError


class Failing:
    """A backend whose scatter writes half of its entries and raises, when told to."""

    name = "cpu"

    def __init__(self, fail_at: int, error: type[BaseException]) -> None:
        self._real = kernels.resolve("cpu")
        self._countdown = fail_at
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def scatter(self, table: Any, values: np.ndarray) -> None:
        self._countdown -= 1
        if self._countdown:
            self._real.scatter(table, values)
            return
        half = values.copy()
        self._real.gather(table, half)
        half[::2] = values[::2]
        self._real.scatter(table, half)
        raise self._error("broken off")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("fail_at", range(1, 7))
def test_a_scatter_that_breaks_off_in_the_middle(fail_at: int, error: type[BaseException]) -> None:
    shop = Workshop()
    shop.host.activate("a")
    assert len(shop.host.skills["a"].plan.launches) == 3  # item sizes 2, 4 and 8
    real = shop.host._backend
    use(shop.host, Failing(fail_at, error))
    with pytest.raises(error, match="broken off"):
        shop.host.activate("b")
    use(shop.host, real)
    assert shop.is_a()
    assert shop.host.active == ("a",)
    shop.host.verify()
    shop.host.activate("b")
    assert shop.is_b()
    shop.host.deactivate()
    assert shop.is_base()


def test_a_backend_that_stays_broken_lets_no_pass_in_until_it_works() -> None:
    shop = Workshop()
    real = shop.host._backend
    broken = Failing(1, RuntimeError)
    use(shop.host, broken)
    broken.scatter = lambda *_: broken_off()
    with pytest.raises(RuntimeError):
        shop.host.activate("a")
    with pytest.raises(RuntimeError):
        shop.model(torch.ones(6))
    assert shop.host._gate.passes == 0
    use(shop.host, real)
    shop.model(torch.ones(6))
    assert shop.is_base()


def broken_off() -> None:
    raise RuntimeError("broken off")


def interrupted_everywhere(step: Callable[[], None], stride: int = 1) -> Iterator[int]:
    """Run a step again and again, interrupted at the n-th point where that can happen, for every n
    (or every few).

    CPython handles signals on the way into a Python function and after a call of a C function.
    """
    for n in range(1, 10_000, stride):
        left = n

        def count(frame: FrameType, event: str, _: Any) -> None:
            nonlocal left
            file = frame.f_code.co_filename
            if event in {"call", "c_return"} and ("/hotgraft/" in file or "contextlib" in file):
                left -= 1
                if left == 0:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        finished = False
        sys.setprofile(count)
        try:
            step()
            finished = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        if finished:
            return
        yield n


def check(shop: Workshop) -> None:
    """Memory is what the host says, nobody is inside, and the host goes on."""
    wanted = {(): shop.base, ("a",): shop.with_a, ("b",): shop.with_b}[shop.host.active]
    held = {name: tensor.detach() for name, tensor in shop.model.state_dict().items()}
    if shop.host._ledger.settled:
        assert factories.same_bits(held, wanted)
    shop.model(torch.ones(6))  # entering settles what an interrupt of the undoing left
    assert factories.same_bits(held, wanted)
    assert shop.host._gate.passes == 0
    shop.host.verify()


def test_an_interrupt_anywhere_in_a_commit() -> None:
    shop = Workshop()
    shop.host.activate("a")
    seen = 0
    for n in interrupted_everywhere(lambda: shop.host.activate("b")):
        check(shop)
        shop.host.activate("a")
        seen = n
    assert seen > 50
    shop.host.deactivate()
    assert shop.is_base()


def test_an_interrupt_anywhere_in_a_using_block() -> None:
    shop = Workshop()

    def block() -> None:
        with shop.host.using("a"):
            shop.model(torch.ones(6))

    seen = 0
    for n in interrupted_everywhere(block):
        check(shop)
        shop.host.deactivate()
        seen = n
    assert seen > 100


def test_an_interrupt_anywhere_in_load_and_unload() -> None:
    shop = Workshop()
    shop.host.activate("a")
    graft = factories.graft_on(shop.base, seed=7, share=0.1)
    before = versions(shop.model)

    def reload() -> None:
        shop.host.load(graft, name="c")
        shop.host.unload("c")

    seen = 0
    for n in interrupted_everywhere(reload, stride=7):
        assert shop.is_a()
        shop.host.verify()
        if "c" in shop.host.skills:
            shop.host.unload("c")
        seen = n
    assert seen > 200
    assert versions(shop.model) == before


def test_a_storm_of_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where an interrupt hits a weak reference's callback, Python reports it and goes on; a C
    # function takes the report, for one in Python would be hit too.
    monkeypatch.setattr(sys, "unraisablehook", id)
    shop = Workshop()
    strikes = hits = 0

    def strike(*_: object) -> None:
        nonlocal strikes, hits
        if strikes:
            strikes -= 1
            hits += 1
            raise KeyboardInterrupt

    rng = np.random.default_rng(0)
    before = signal.signal(signal.SIGALRM, strike)
    try:
        for _ in range(250):
            first = float(rng.uniform(5e-5, 2e-3))
            try:
                strikes = 3  # later ones hit the undoing of what the first one broke off
                signal.setitimer(signal.ITIMER_REAL, first, 5e-5)
                for _ in range(100):
                    shop.host.activate("a")
                    shop.model(torch.ones(6))
                    shop.host.activate("b")
            except KeyboardInterrupt:
                pass
            strikes = 0
            signal.setitimer(signal.ITIMER_REAL, 0)
            check(shop)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 200
    shop.host.deactivate()
    assert shop.is_base()


def test_failed_loads_leave_everything_as_it_was() -> None:
    shop = Workshop()
    shop.host.activate("a")
    before = versions(shop.model)
    with pytest.raises(OverlapError):
        shop.host.activate("a", "b")
    real = shop.host._backend
    for verb in ("prepare", "compare"):
        broken = Failing(-1, RuntimeError)
        setattr(broken, verb, lambda *_: broken_off())
        use(shop.host, broken)
        with pytest.raises(RuntimeError, match="broken off"):
            shop.host.load(shop.b, name="c")
        with pytest.raises(RuntimeError, match="broken off"):
            shop.host.load(shop.a, name="b", replace=True)
        use(shop.host, real)
    assert list(shop.host.skills) == ["a", "b"]
    assert shop.host.skills["b"].id == shop.b.id
    assert versions(shop.model) == before
    assert shop.is_a()


def test_a_skill_that_leaves_between_preparing_and_committing() -> None:
    shop = Workshop()
    ready, prepare = threading.Event(), shop.host._prepare

    def slowly(*arguments: Any) -> Any:
        prepared = prepare(*arguments)
        shop.host.unload("b")
        ready.set()
        return prepared

    shop.host._prepare = slowly
    with pytest.raises(KeyError, match="'b' was unloaded or replaced meanwhile"):
        shop.host.activate("b")
    assert ready.is_set()
    assert shop.is_base()
    del shop.host._prepare


def test_a_write_by_others_is_not_mistaken_for_an_interrupt() -> None:
    shop = Workshop()
    use(shop.host, Failing(2, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shop.host.activate("a")
    with torch.no_grad():
        shop.model.first.weight.mul_(1)
    with pytest.raises(HostChangedError):
        shop.host.activate("a")
    shop.host.verify()
    shop.host.activate("a")
    assert shop.is_a()
