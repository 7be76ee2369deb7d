"""Taking samples: everything that is compared takes turns, so that it meets the same machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from bench import floor

Call = Callable[[], object]

SETTLE_S = 0.003
"""A pause before each turn, in which the threads of whoever ran before go to sleep."""


@dataclasses.dataclass
class Contender:
    """One way to do something: steps that lead back to where they began, each timed by itself.

    Args:
        name: what one would run.
        body: what runs: backend, instruction set, threads.
        steps: operations by name, in order.
        every: takes part in one round of so many; for slow ones.
        awake: whether the floor's helper threads wait awake.
        slack: whether an untimed pass may be left out before a warm one.
    """

    name: str
    body: str
    steps: dict[str, Call]
    every: int = 1
    awake: bool = False
    slack: bool = False
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    correct: bool | None = None

    def sample(self, cold: bool) -> None:
        """Time each step once: with the caches emptied before, or after an untimed pass."""
        time.sleep(SETTLE_S)
        floor.spin(self.awake)
        try:
            if not cold and not self.slack:
                for step in self.steps.values():
                    step()
            for name, step in self.steps.items():
                if cold:
                    floor.evict()
                begin = time.perf_counter_ns()
                step()
                end = time.perf_counter_ns()
                self.samples.setdefault(name, []).append((end - begin) / 1000)
        finally:
            floor.spin(False)


def take_turns(contenders: Sequence[Contender], rounds: int, cold: bool) -> None:
    """Sample every contender `rounds` times, a different one first each time."""
    for contender in contenders:
        contender.samples = {}
    for turn in range(rounds):
        first = turn % len(contenders)
        for contender in (*contenders[first:], *contenders[:first]):
            if turn % contender.every == 0:
                contender.sample(cold)
