"""Mixed traffic: 16 clients, up to eight skills, each step with the requests of one.

Run in vLLM's environment, from any folder but the repository's root:

    python .../bench/serving/traffic.py --out .../bench/serving/results/DATE-traffic.jsonl

Each client sends its next request when it has the answer to the one before. The requests are the
same in all runs; what differs is whom they name:

- burst: so many requests in a row name one skill, the next ones the next skill.
- shuffled: a skill each, by chance.

Runs that are compared are made in turns.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lab
from hotgraft.serve.vllm.turns import Rules

CLIENTS = 16
SKILLS = [f"s{i}" for i in range(8)]
DENSITY = 1e-3
PROMPTS = (4, 24)
ANSWERS = (6, 18)
QUANTA = (1, 4, 8, 16, 32)
COUNTS = (1, 2, 4, 8)
BURSTS = (16, 32, 64)
LONG = 3600.0
"""A `max_wait` that plays no part."""


def main() -> None:
    """Measure, print a line for each run, and append rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", nargs="+", default=["burst", "shuffled", "waits"])
    given = parser.parse_args()
    lab.append(given.out, [lab.environment()])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = lab.checkpoint(folder / "base", given.dtype)
        for name in SKILLS:
            lab.skill(base, DENSITY).save(folder / f"{name}.graft.safetensors")
        engine = lab.Engine(folder / "base", dtype=given.dtype, **lab.OURS)
        lab.load(engine, folder)
        run(engine, SKILLS[:2] * CLIENTS, Rules())  # the first steps are slower
        for number in range(given.rounds):
            for case in given.cases:
                for row in CASES[case](engine):
                    about = {"case": case, "dtype": given.dtype, "round": number}
                    lab.append(given.out, [about | row])


def bursts(engine: lab.Engine) -> Any:
    """Bursts of eight skills, each beside as many requests of one skill."""
    for size in BURSTS:
        for names in (SKILLS, SKILLS[:1]):
            order = [name for name in SKILLS for _ in range(size)]
            wanted = [names[SKILLS.index(name) % len(names)] for name in order]
            yield {"burst": size, "skills": len(names), **run(engine, wanted, Rules())}


def shuffled(engine: lab.Engine, count: int = 3 * CLIENTS) -> Any:
    """The curve over live skills and quanta."""
    for skills in COUNTS:
        for quantum in QUANTA if skills > 1 else QUANTA[:1]:
            wanted = chance(SKILLS[:skills], count)
            rules = Rules(quantum=quantum, max_wait=LONG)
            yield {"skills": skills, "quantum": quantum, **run(engine, wanted, rules)}


def waits(engine: lab.Engine, count: int = 6 * CLIENTS) -> Any:
    """Waiting, where the bound in seconds cuts turns short."""
    for max_wait in (0.25, 1.0):
        rules = Rules(max_wait=max_wait)
        found = run(engine, chance(SKILLS, count), rules)
        yield {"skills": len(SKILLS), "max_wait": max_wait, "quantum": rules.quantum, **found}


CASES = {"burst": bursts, "shuffled": shuffled, "waits": waits}


def chance(names: Sequence[str], count: int) -> list[str]:
    """As many of each, in the order of chance."""
    wanted = [names[i % len(names)] for i in range(count)]
    random.Random(count).shuffle(wanted)
    return wanted


def run(engine: lab.Engine, wanted: Sequence[str], rules: Rules) -> dict[str, Any]:
    """Serve a request for each of these skills, in this order."""
    rng = random.Random(0)
    asked = [
        (f"r{i}", lab.tokens(rng, rng.randint(*PROMPTS)), rng.randint(*ANSWERS), skill)
        for i, skill in enumerate(wanted)
    ]
    scheduler, worker = engine.scheduler, engine.worker
    scheduler._turns.rules = rules
    counters = scheduler.counters = type(scheduler.counters)()
    waited: list[float] = []
    switching: list[float] = []
    count_wait, switch = counters.count_wait, worker.hotgraft_switch
    counters.count_wait = lambda seconds: (waited.append(seconds), count_wait(seconds))
    worker.hotgraft_switch = lab.timing(switch, switching)
    steps: list[float] = []
    coming = iter(asked)
    for _, request in zip(range(CLIENTS), coming, strict=False):
        engine.add(*request)
    while engine.engine.has_unfinished_requests():
        begin = time.perf_counter()
        for _ in engine.step()[1]:
            if (request := next(coming, None)) is not None:
                engine.add(*request)
        steps.append(time.perf_counter() - begin)
    worker.hotgraft_switch = switch
    answered = sum(tokens for _, _, tokens, _ in asked)
    bound = wait_bound(rules, len({*wanted}), max(steps))
    found = {
        "requests": len(asked),
        "tokens": answered,
        "seconds": sum(steps),
        "empty_steps": counters.empty,
        "bound_seconds": bound,
        "steps_ms": [round(1e3 * s, 2) for s in steps],
        "switches_ms": [round(1e3 * s, 3) for s in switching],
        "waits_seconds": [round(s, 4) for s in waited],
    }
    print(
        f"{len({*wanted})} skills, {rules}: {answered / sum(steps):.1f} tokens/s, "
        f"{len(steps)} steps of {1e3 * statistics.median(steps):.1f} ms, "
        f"{len(switching)} switches, {sum(switching) / sum(steps):.2%} of the time, "
        f"waits: p99 {percentile(waited, 99):.3f} s, bound {bound:.3f} s"
    )
    assert max(waited, default=0.0) <= bound, "a skill waited for longer than the bound"
    return found


def wait_bound(rules: Rules, skills: int, longest: float) -> float:
    """As `hotgraft.serve.vllm.turns` has it, the smaller of the two bounds."""
    by_quantum = (skills - 1) * rules.quantum * longest + longest
    return min(by_quantum, max(rules.max_wait, longest) + (skills - 1) * longest)


def percentile(values: Sequence[float], share: int) -> float:
    """The smallest of these that so many in a hundred do not exceed."""
    if not values:
        return 0.0
    return sorted(values)[-(-len(values) * share // 100) - 1]


if __name__ == "__main__":
    main()
