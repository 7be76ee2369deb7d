"""Mixed traffic: 16 clients, up to eight skills, each step with the requests of one.

Run in vLLM's environment, from any folder but the repository's root:

    python .../bench/serving/traffic.py --out .../bench/serving/results/DATE-traffic.jsonl

Each client sends its next request when it has the answer to the one before. The requests are the
same in all runs; what differs is whom they name:

- burst: so many requests in a row name one skill, the next ones the next skill.
- shuffled: a skill each, by chance.

A burst's run and that of one skill are made at once, in turns, a step each.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lab
from hotgraft.serve.vllm.turns import Rules

CLIENTS = 16
SKILLS = [f"s{i}" for i in range(8)]
DENSITY = 1e-3
PROMPTS = (4, 24)
ANSWERS = (3, 9)
QUANTA = (1, 4, 8, 16, 32)
COUNTS = (1, 2, 4, 8)
BURSTS = (16, 32, 128)
SHUFFLED = 2 * CLIENTS
Row = dict[str, Any]
Engines = Sequence[lab.Engine]
LONG = 3600.0
"""A `max_wait` that plays no part."""


def main() -> None:
    """Measure, print a line for each run, and append rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cases", nargs="+", default=["burst", "shuffled", "waits"])
    given = parser.parse_args()
    lab.append(given.out, [lab.environment()])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = lab.checkpoint(folder / "base", given.dtype)
        for name in SKILLS:
            lab.skill(base, DENSITY).save(folder / f"{name}.graft.safetensors")
        engines = [lab.Engine(folder / "base", dtype=given.dtype, **lab.OURS) for _ in range(2)]
        for engine in engines:
            lab.load(engine, folder)
        together([Run(e, SKILLS[:2] * CLIENTS, Rules()) for e in engines])  # the first are slower
        for number in range(given.rounds):
            for case in given.cases:
                for row in CASES[case](engines):
                    about = {"case": case, "dtype": given.dtype, "round": number}
                    lab.append(given.out, [about | row])


def bursts(engines: Engines) -> Iterator[Row]:
    """Bursts of eight skills, beside as many requests of one skill."""
    for size in BURSTS:
        wanted = [name for name in SKILLS for _ in range(size)]
        runs = [
            Run(engines[0], wanted, Rules()),
            Run(engines[1], SKILLS[:1] * len(wanted), Rules()),
        ]
        for row in together(runs):
            yield {"burst": size, **row}


def shuffled(engines: Engines) -> Iterator[Row]:
    """The curve over live skills and quanta."""
    for skills in COUNTS:
        for quantum in QUANTA if skills > 1 else QUANTA[:1]:
            rules = Rules(quantum=quantum, max_wait=LONG)
            yield from together([Run(engines[0], chance(SKILLS[:skills], SHUFFLED), rules)])


def waits(engines: Engines) -> Iterator[Row]:
    """Waiting, where the bound in seconds cuts turns short."""
    for max_wait in (0.25, 1.0):
        rules = Rules(max_wait=max_wait)
        yield from together([Run(engines[0], chance(SKILLS, 2 * SHUFFLED), rules)])


CASES = {"burst": bursts, "shuffled": shuffled, "waits": waits}


def chance(names: Sequence[str], count: int) -> list[str]:
    """As many of each, in the order of chance."""
    wanted = [names[i % len(names)] for i in range(count)]
    random.Random(count).shuffle(wanted)
    return wanted


class Run:
    """A request for each of these skills, in this order, step by step."""

    def __init__(self, engine: lab.Engine, wanted: Sequence[str], rules: Rules) -> None:
        rng = random.Random(0)
        asked = [
            (f"r{i}", lab.tokens(rng, rng.randint(*PROMPTS)), rng.randint(*ANSWERS), skill)
            for i, skill in enumerate(wanted)
        ]
        self.skills, self.rules = len({*wanted}), rules
        self.tokens = sum(tokens for _, _, tokens, _ in asked)
        self.answered = 0
        self.steps: list[float] = []
        self.seconds = 0.0
        self._began: float | None = None
        self.waited: list[float] = []
        self.switching: list[float] = []
        self._engine = engine
        scheduler, worker = engine.scheduler, engine.worker
        scheduler._turns.rules = rules
        scheduler._clock = self.clock  # the time that other engines take is not its own
        self.counters = scheduler.counters = type(scheduler.counters)()
        count_wait = self.counters.count_wait
        self.counters.count_wait = lambda wait: (self.waited.append(wait), count_wait(wait))
        switch = type(worker).hotgraft_switch.__get__(worker)
        worker.hotgraft_switch = lab.timing(switch, self.switching)
        self._coming = iter(asked)
        for request in itertools.islice(self._coming, CLIENTS):
            engine.add(*request)

    @property
    def done(self) -> bool:
        """Whether all are answered."""
        return not self._engine.engine.has_unfinished_requests()

    def step(self) -> None:
        """One step; a client that has its answer sends its next request."""
        self._began = time.perf_counter()
        answers = self._engine.step()[1]
        for _ in answers:
            if (request := next(self._coming, None)) is not None:
                self._engine.add(*request)
        self.answered += len(answers)
        self.steps.append(time.perf_counter() - self._began)
        self.seconds += self.steps[-1]
        self._began = None

    def clock(self) -> float:
        """The seconds of its own steps so far."""
        current = 0.0 if self._began is None else time.perf_counter() - self._began
        return self.seconds + current

    def row(self) -> Row:
        """What was measured."""
        seconds, bound = self.seconds, wait_bound(self.rules, self.skills, max(self.steps))
        print(
            f"{self.skills} skills, {self.rules}: {self.tokens / seconds:.1f} tokens/s, "
            f"{len(self.steps)} steps of {1e3 * statistics.median(self.steps):.1f} ms, "
            f"{len(self.switching)} switches, {sum(self.switching) / seconds:.2%} of the time, "
            f"longest wait {max(self.waited, default=0.0):.3f} s, bound {bound:.3f} s"
        )
        assert max(self.waited, default=0.0) <= bound, "a skill waited for longer than the bound"
        return {
            "skills": self.skills,
            **dataclasses.asdict(self.rules),
            "requests": self.answered,
            "tokens": self.tokens,
            "seconds": seconds,
            "empty_steps": self.counters.empty,
            "bound_seconds": bound,
            "steps_ms": [round(1e3 * s, 2) for s in self.steps],
            "switches_ms": [round(1e3 * s, 3) for s in self.switching],
            "waits_seconds": [round(s, 4) for s in self.waited],
        }


def together(runs: Sequence[Run]) -> list[Row]:
    """All of these at once, each on its engine: a step for who has the least answers."""
    while left := [run for run in runs if not run.done]:
        min(left, key=lambda run: run.answered).step()
    return [run.row() for run in runs]


def wait_bound(rules: Rules, skills: int, longest: float) -> float:
    """As `hotgraft.serve.vllm.turns` has it, the smaller of the two bounds."""
    by_quantum = (skills - 1) * rules.quantum * longest + longest
    return min(by_quantum, max(rules.max_wait, longest) + (skills - 1) * longest)


if __name__ == "__main__":
    main()
