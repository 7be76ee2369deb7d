"""The gate: no output is a mixture of old and new weights, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hosts import contents, holds, single
from hotgraft import Host, attach
from hotgraft.errors import GateError, HostChangedError
from torch import nn

PATIENCE = 20.0


class Slow(nn.Module):
    """Reads its weight several times, with pauses in which another thread may run."""

    def __init__(self, pause: float = 0.0005, reads: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.pause, self.reads = pause, reads
        self.inside = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def forward(
        self, scale: float = 1.0, *, error: type[BaseException] | None = None
    ) -> set[float]:
        """What the weight holds, read again and again."""
        self.inside.set()
        assert self.go.wait(PATIENCE)
        seen: set[float] = set()
        for _ in range(self.reads):
            seen.update((self.weight.detach() * scale).tolist())
            time.sleep(self.pause)
        if error is not None:
            raise error
        return seen


def with_skills(model: Slow) -> Host:
    host = attach(model)
    for name, value in (("ones", 1.0), ("twos", 2.0)):
        host.load(single("weight", model.weight, list(range(8)), [value] * 8), name=name)
    return host


class Worker(threading.Thread):
    """A thread whose result or exception `result` gives back, within the patience."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._error: BaseException | None = None
        self._result: object = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error

    def result(self) -> object:
        self.join(PATIENCE)
        assert not self.is_alive(), "it waits for ever"
        if self._error is not None:
            raise self._error
        return self._result


def until_locked(lock: threading.Lock) -> None:
    end = time.monotonic() + PATIENCE
    while not lock.locked():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def slow() -> Iterator[tuple[Slow, Host]]:
    model = Slow()
    host = with_skills(model)
    yield model, host
    model.go.set()
    assert host._gate.passes == 0
    Worker(lambda: host.detach(force=True)).result()
    assert not model.weight.any()


def test_no_output_is_a_mixture(slow: tuple[Slow, Host]) -> None:
    model, host = slow
    stop = threading.Event()

    def passes() -> list[set[float]]:
        outputs = []
        while not stop.is_set():
            outputs.append(model())
        return outputs

    readers = [Worker(passes) for _ in range(4)]
    switches = 0
    until = time.monotonic() + 2
    while time.monotonic() < until:
        host.activate("ones" if switches % 2 else "twos")
        switches += 1
        time.sleep(0.001)
    stop.set()
    outputs = [output for reader in readers for output in reader.result()]
    assert all(len(output) == 1 for output in outputs)
    assert {frozenset(output) for output in outputs} >= {frozenset({1.0}), frozenset({2.0})}
    assert len(outputs) > 50
    assert switches > 50


def test_a_waiting_commit_is_not_starved_by_a_stream_of_passes(slow: tuple[Slow, Host]) -> None:
    model, host = slow
    stop = threading.Event()

    def stream() -> None:
        while not stop.is_set():
            model()

    readers = [Worker(stream) for _ in range(3)]  # at any time one of them is inside
    begin = time.monotonic()
    for i in range(50):
        Worker(functools.partial(host.activate, ("ones", "twos")[i % 2])).result()
    assert time.monotonic() - begin < PATIENCE
    stop.set()
    for reader in readers:
        reader.result()


def test_passes_are_not_starved_by_a_stream_of_commits(slow: tuple[Slow, Host]) -> None:
    model, host = slow
    stop = threading.Event()

    def switch() -> None:
        while not stop.is_set():
            host.activate("ones")
            host.activate("twos")

    switcher = Worker(switch)
    for _ in range(20):
        assert len(Worker(model).result()) == 1
    stop.set()
    switcher.result()


def test_a_commit_waits_for_the_pass_and_holds_new_ones_back(slow: tuple[Slow, Host]) -> None:
    model, host = slow
    model.go.clear()
    first = Worker(model)
    assert model.inside.wait(PATIENCE)
    commit = Worker(lambda: host.activate("ones"))
    until_locked(host._gate._turnstile)
    model.inside.clear()
    second = Worker(model)
    assert not model.inside.wait(0.1)
    assert host.active == ()
    model.go.set()
    assert first.result() == {0.0}
    commit.result()
    assert second.result() == {1.0}


def test_passes_nest_also_while_a_commit_waits() -> None:
    class Nested(Slow):
        depth = 0

        def forward(self) -> set[float]:
            self.depth += 1
            try:
                return self() if self.depth < 3 else super().forward()
            finally:
                self.depth -= 1

    model = Nested()
    host = with_skills(model)
    model.go.clear()
    run = Worker(model)
    assert model.inside.wait(PATIENCE)
    assert host._gate.passes == 3
    commit = Worker(lambda: host.activate("ones"))
    time.sleep(0.02)
    model.go.set()
    assert run.result() == {0.0}
    commit.result()
    with host.hold(), host.hold():
        assert model() == {1.0}
    assert host._gate.passes == 0


def test_a_submodule_can_be_the_root() -> None:
    inner = Slow(reads=1)
    outer = nn.Sequential(nn.Identity(), inner)
    host = with_skills(inner)
    host.activate("ones")
    assert outer(2.0) == {2.0}
    both = attach(outer)  # another root over the same weights has its own gate
    assert outer(1.0) == {1.0}
    both.detach()
    host.detach(force=True)


def test_a_commit_inside_a_pass_of_the_same_thread_is_an_error() -> None:
    class Switching(nn.Linear):
        host: Host

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.host.activate("a")
            return super().forward(x)

    model = Switching(2, 2)
    base = contents(model)
    model.host = attach(model)
    model.host.load(single("weight", model.weight, [0], [5.0]), name="a")
    with pytest.raises(GateError, match="inside a forward pass or a hold of the same thread"):
        model(torch.ones(2))
    assert holds(model, base)
    assert model.host.active == ()
    for call in (model.host.deactivate, model.host.adopt, lambda: model.host.detach(force=True)):
        with model.host.hold(), pytest.raises(GateError):
            call()
    model.host.activate("a")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_exceptions_leave_the_gate_open(slow: tuple[Slow, Host], error: type) -> None:
    model, host = slow
    for call in (model, model.forward):
        with pytest.raises(error):
            call(error=error)
        assert host._gate.passes == 0
    with pytest.raises(error), host.hold():
        raise error
    assert host._gate.passes == 0
    Worker(lambda: host.activate("ones")).result()


def test_hold_keeps_commits_out_and_may_end_in_another_thread(slow: tuple[Slow, Host]) -> None:
    model, host = slow
    hold = host.hold()
    hold.__enter__()
    commit = Worker(lambda: host.activate("ones"))
    for _ in range(3):
        assert model() == {0.0}
    assert commit.is_alive()
    Worker(lambda: hold.__exit__(None, None, None)).result()
    commit.result()
    assert model() == {1.0}


def test_a_hold_may_use_a_thread_pool_while_a_commit_waits(slow: tuple[Slow, Host]) -> None:
    model, host = slow
    ready, waiting = threading.Event(), threading.Event()

    def evaluate() -> set[float]:
        with host.hold():
            ready.set()
            assert waiting.wait(PATIENCE)
            with ThreadPoolExecutor(3) as pool:
                return set().union(*pool.map(model, [1.0] * 6))

    evaluation = Worker(evaluate)
    assert ready.wait(PATIENCE)
    commit = Worker(lambda: host.activate("ones"))
    until_locked(host._gate._front)
    waiting.set()
    assert evaluation.result() == {0.0}
    commit.result()
    assert model() == {1.0}


def test_a_generator_that_holds_may_go_from_thread_to_thread(slow: tuple[Slow, Host]) -> None:
    model, host = slow

    def stream(steps: int) -> Iterator[set[float]]:
        with host.hold():
            for _ in range(steps):
                yield model()

    tokens = stream(3)
    pools = [ThreadPoolExecutor(1) for _ in range(2)]
    assert pools[0].submit(next, tokens).result(PATIENCE) == {0.0}
    commit = Worker(lambda: host.activate("ones"))
    until_locked(host._gate._front)
    for i in (1, 0):
        assert pools[i].submit(next, tokens).result(PATIENCE) == {0.0}
    assert commit.is_alive()
    assert pools[1].submit(next, tokens, None).result(PATIENCE) is None
    commit.result()
    for pool in pools:
        assert pool.submit(model).result(PATIENCE) == {1.0}
        pool.shutdown()


def test_a_waiting_commit_lets_no_new_hold_in_but_nested_ones(slow: tuple[Slow, Host]) -> None:
    model, host = slow

    def held() -> set[float]:
        with host.hold():
            return model()

    with host.hold():
        commit = Worker(lambda: host.activate("ones"))
        until_locked(host._gate._front)
        other = Worker(held)
        assert held() == {0.0}
        time.sleep(0.05)
        assert host._gate.passes == 1
        assert commit.is_alive()
    commit.result()
    assert other.result() == {1.0}


def test_a_switch_and_its_hold_are_one(slow: tuple[Slow, Host]) -> None:
    _, host = slow
    commit = host._ledger.commit
    others: list[Worker] = []

    def interrupted(target: Any) -> None:
        """Another thread wants to switch while this one does."""
        commit(target)
        if not others:
            others.append(Worker(lambda: host.activate("twos")))
            time.sleep(0.05)

    host._ledger.commit = interrupted  # type: ignore[method-assign]
    with host.using("ones", hold=True):
        for _ in range(20):
            assert host.active == ("ones",)
            time.sleep(0.005)
        with pytest.raises(GateError):
            host.deactivate()
        assert others[0].is_alive()
    others[0].result()
    host.deactivate()


def test_threads_that_switch_and_hold_see_their_own(slow: tuple[Slow, Host]) -> None:
    model, host = slow

    def work(name: str, value: float) -> set[float]:
        seen = set()
        for _ in range(15):
            with host.using(name, hold=True):
                seen |= model() | model() | {float(host.active != (name,))}
        return seen - {0.0, value}

    workers = [Worker(functools.partial(work, *one)) for one in (("ones", 1.0), ("twos", 2.0)) * 2]
    assert [worker.result() for worker in workers] == [set()] * 4
    assert host.active == ()


def test_a_switch_that_fails_holds_nothing(slow: tuple[Slow, Host]) -> None:
    model, host = slow
    host.activate("ones")
    with torch.no_grad():
        model.weight.add_(0)
    with pytest.raises(HostChangedError), host.using("twos", hold=True):
        pass
    host.verify()
    with pytest.raises(ValueError, match="mine"), host.using("twos", hold=True):
        raise ValueError("mine")
    assert host.active == ("ones",)


def test_the_hold_of_a_thread_that_ended_is_nobody_elses(slow: tuple[Slow, Host]) -> None:
    _, host = slow
    hold = host.hold()
    ended = threading.Thread(target=hold.__enter__)
    ended.start()
    ended.join()
    commits = [Worker(lambda: host.activate("ones"))]
    while commits[-1].ident != ended.ident and len(commits) < 20:  # numbers are given out again
        commits.append(Worker(lambda: host.activate("ones")))
    time.sleep(0.05)
    assert all(commit.is_alive() for commit in commits)
    assert host.active == ()
    hold.__exit__(None, None, None)
    for commit in commits:
        commit.result()


def test_forward_itself_is_gated(slow: tuple[Slow, Host]) -> None:
    model, host = slow
    for call in (model, model.forward, functools.partial(model.__call__, 1.0)):
        model.inside.clear()
        model.go.clear()
        run = Worker(call)
        assert model.inside.wait(PATIENCE)
        assert host._gate.passes == 1
        model.go.set()
        run.result()


# ---- asyncio ------------------------------------------------------------------------------------


def test_tasks_hold_while_others_run(slow: tuple[Slow, Host]) -> None:
    model, host = slow

    async def generation() -> set[float]:
        seen: set[float] = set()
        with host.hold():
            for _ in range(3):
                seen |= model()
                await asyncio.sleep(0.001)
        return seen

    async def switcher() -> None:
        for name in ("ones", "twos", "ones"):
            await asyncio.to_thread(host.activate, name)
            await asyncio.sleep(0.002)

    async def serve() -> list[set[float]]:
        tasks = [asyncio.create_task(generation()) for _ in range(4)]
        switching = asyncio.create_task(switcher())
        await asyncio.sleep(0)
        with pytest.raises(GateError):  # waiting here would stop the loop for ever
            host.activate("ones")
        outputs = await asyncio.gather(*tasks)
        await switching
        return [*outputs, await generation()]

    outputs = asyncio.run(asyncio.wait_for(serve(), PATIENCE))
    assert all(len(output) == 1 for output in outputs)
    assert outputs[-1] == {1.0}
