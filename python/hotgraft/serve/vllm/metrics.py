"""Metrics: what happened to skills, for Prometheus and as lines of a log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TextIO

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from hotgraft.serve.vllm.resident import WAIT_BOUNDS
from hotgraft.serve.vllm.skills import Skills

FRESH = 0.5
"""Seconds for which the engine is not asked again, however often metrics are."""
PATIENCE = 5.0
"""Seconds after which metrics are answered with what was known before."""
SUMMARY_EVERY = 60.0
"""Seconds between two summaries of switches in the log."""


class Events:
    """A JSON line for each thing that happens, and how many of each there were.

    Args:
        stream: where lines go; standard error by default.

    Example:
        >>> events = Events(sys.stdout, clock=lambda: 0.0)
        >>> events("unload", skill="sql")
        {"time": 0.0, "logger": "hotgraft", "event": "unload", "skill": "sql"}
    """

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._stream = stream
        self._clock = clock
        self.counts: Counter[tuple[str, str]] = Counter()
        """By event, and for refusals by the kind of error."""

    def __call__(self, event: str, **about: Any) -> None:
        """Note an event, with what there is to say of it."""
        self.counts[event, about.get("kind", "")] += 1
        line = {"time": round(self._clock(), 3), "logger": "hotgraft", "event": event, **about}
        # What has happened has, also where a disk is full or nobody reads on: nothing is undone.
        with contextlib.suppress(OSError, ValueError):
            print(json.dumps(line), file=self._stream or sys.stderr, flush=True)


class Metrics:
    """Prometheus metrics of a server's skills; register it as a collector.

    Args:
        skills: of the server.
        events: of the server.
        ask: returns the scheduler's counters and each rank's switches.
    """

    def __init__(
        self,
        skills: Skills,
        events: Events,
        ask: Callable[[], Awaitable[tuple[dict[str, Any], list[dict[str, Any]]]]],
    ) -> None:
        self._skills = skills
        self._events = events
        self._ask = ask
        self._asked_at = -FRESH
        self._asking: asyncio.Task[None] | None = None
        self._counters: dict[str, Any] = {}
        self._ranks: list[dict[str, Any]] = []

    async def refresh(self) -> None:
        """Ask the engine; what it does not answer in time stays as it was."""
        if self._asking is None and time.monotonic() - self._asked_at >= FRESH:
            self._asking = asyncio.ensure_future(self._renew())
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=PATIENCE)

    async def _renew(self) -> None:
        try:
            self._counters, self._ranks = await self._ask()
        except Exception as error:  # a dead engine must not keep anyone from reading metrics
            self._events("refusal", what="metrics", kind=type(error).__name__, why=str(error))
        finally:
            self._asked_at = time.monotonic()
            self._asking = None

    async def summarise(self) -> None:
        """Log from time to time, for ever, how many switches there were, if there were any."""
        known = 0
        while True:
            await asyncio.sleep(SUMMARY_EVERY)
            await self.refresh()
            counters = self._counters
            if counters and counters["switches"] != known:
                seconds = self._ranks[0]["seconds"] if self._ranks else None
                names = ("evictions", "empty", "refusals", "wait_seconds", "longest_wait")
                self._events(
                    "switches",
                    new=counters["switches"] - known,
                    switches=counters["switches"],
                    switch_seconds=seconds,
                    steps=counters["steps"],
                    **{name: counters[name] for name in names},
                )
                known = counters["switches"]

    def collect(self) -> Iterator[Metric]:
        """The metrics as they are known now."""
        yield from _of_residents(self._skills)
        counts = self._events.counts.copy()
        for event in ("load", "unload"):
            found = counts.get((event, ""), 0)
            yield CounterMetricFamily(f"hotgraft_{event}s", f"Skills that were {event}ed.", found)
        refused = CounterMetricFamily(
            "hotgraft_refusals", "Loads and unloads that were refused, or failed.", labels=["kind"]
        )
        for (event, kind), count in counts.items():
            if event == "refusal":
                refused.add_metric([kind], count)
        yield refused
        if self._counters:
            yield from _of_scheduler(self._counters)
        if self._ranks:
            # Ranks switch together, so one of them says how many there were.
            rank = self._ranks[0]
            yield HistogramMetricFamily(
                "hotgraft_switch_seconds",
                "Time that a worker process spends on a switch.",
                _buckets(rank["bounds"], rank["counts"]),
                rank["seconds"],
            )

    def describe(self) -> list[Metric]:
        """Nothing: the metrics depend on the engine, which is not asked for this."""
        return []


def _of_residents(skills: Skills) -> Iterator[Metric]:
    """Only numbers are read: this may run in another thread than the server's."""
    budget, counts = skills.resident.budget, skills.resident.counts
    for name, text, number in (
        ("known_skills", "Skills that requests can name.", len(skills)),
        ("loaded_skills", "Those of them that are loaded.", len(budget)),
        ("resident_bytes", "Memory of loaded skills, on all ranks together.", budget.nbytes),
        ("resident_limit_bytes", "What they may take (--resident).", budget.limit),
    ):
        yield GaugeMetricFamily(f"hotgraft_{name}", text, number)
    for name, text, number in (
        ("skill_hits", "Requests whose skill was loaded.", counts.hits),
        ("skill_misses", "Requests that waited until it was.", counts.misses),
        ("skill_evictions", "Skills that made room for others.", counts.evictions),
    ):
        yield CounterMetricFamily(f"hotgraft_{name}", text, number)
    yield HistogramMetricFamily(
        "hotgraft_load_wait_seconds",
        "How long requests waited for their skill to be loaded.",
        _buckets(list(WAIT_BOUNDS), counts.waits),
        counts.wait_seconds,
    )


def _of_scheduler(counters: dict[str, Any]) -> Iterator[Metric]:
    about = {
        "switches": "Steps for another skill than the step before.",
        "evictions": "Requests that lost their KV blocks to another skill's.",
        "empty": "Steps that came out empty while several skills had requests.",
    }
    for name, text in about.items():
        called = "hotgraft_empty_steps" if name == "empty" else f"hotgraft_{name}"
        yield CounterMetricFamily(called, text, counters[name])
    yield CounterMetricFamily(
        "hotgraft_refused_requests",
        "Requests that the scheduler ended with an error.",
        counters["refusals"],
    )
    steps = CounterMetricFamily("hotgraft_steps", "Steps with tokens.", labels=["of"])
    for of, count in counters["steps"].items():
        steps.add_metric([of], count)
    yield steps
    yield HistogramMetricFamily(
        "hotgraft_wait_seconds",
        "How long skills with requests waited for a turn.",
        _buckets(counters["wait_bounds"], counters["waits"]),
        counters["wait_seconds"],
    )


def _buckets(bounds: list[float], counts: list[int]) -> list[tuple[str, float]]:
    """Prometheus counts what is at or below each bound.

    Example:
        >>> _buckets([0.1, 1.0], [2, 3, 4])
        [('0.1', 2), ('1.0', 5), ('+Inf', 9)]
    """
    total = 0
    found: list[tuple[str, float]] = []
    for bound, count in zip([*map(str, bounds), "+Inf"], counts, strict=True):
        total += count
        found.append((bound, total))
    return found
