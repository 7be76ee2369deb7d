"""Python's own share of an activation whose plan is there: the same call with a scatter that
writes nothing, and the whole call less the native scatter."""

from __future__ import annotations

from typing import Any

from bench import shapes
from bench.cases.switch import workload
from bench.rows import Row, Target
from bench.session import Session, make_rows
from bench.switching import ACTIVATE, DEACTIVATE, Workload, hotgraft_way
from bench.timing import Contender, take_turns

LIMIT_US = 60.0


class Idle:
    """A backend whose scatter does nothing."""

    name = "idle"
    exchanges = False

    def prefetch(self, table: Any, values: Any) -> None:
        """Do nothing."""

    def scatter(self, table: Any, values: Any) -> None:
        """Do nothing."""


def run(session: Session) -> None:
    """The case."""
    shape = shapes.SHAPES[session.pick("1.3B", "tiny")]
    work = workload(shapes.model(shape), session.pick(131_019, 2000))
    backends, backend = work.host._backends, work.host._backend
    (launch,) = work.host.skills["A"].plan.launches
    whole = hotgraft_way(work)
    whole.steps = {ACTIVATE: whole.steps[ACTIVATE], DEACTIVATE: whole.steps[DEACTIVATE]}
    whole.correct = _right(work, whole)
    idle = Contender("hotgraft, nothing written", "Python only", dict(whole.steps))
    native = Contender(
        "native scatter",
        whole.body,
        {
            ACTIVATE: lambda: backend.scatter(launch.table, launch.new),
            DEACTIVATE: lambda: backend.scatter(launch.table, launch.old),
        },
    )
    rounds = session.pick(300, 10)
    # The idle scatter leaves the base where the ledger takes the patch to be; going back mends it.
    (device,) = backends
    backends[device] = Idle()  # type: ignore[assignment]
    take_turns([idle], rounds, cold=False)
    backends[device] = backend
    take_turns([whole, native], rounds, cold=False)
    parameters = {
        "shape": shape.name,
        "tensors": len(work.a.names),
        "entries": work.a.nnz,
        "caches": "warm",
    }
    found = make_rows("overhead", [whole, idle, native], parameters)
    _judge(found)
    session.add(found)
    work.host.detach()


def _right(work: Workload, contender: Contender) -> bool:
    contender.steps[ACTIVATE]()
    good = work.holds(work.a)
    contender.steps[DEACTIVATE]()
    return good and work.holds(work.a, old=True)


def _judge(found: list[Row]) -> None:
    for row in found:
        if row.variant == "hotgraft, nothing written":
            row.targets.append(
                Target("us of Python in a cached call", round(row.median, 1), LIMIT_US)
            )
        elif row.variant == "hotgraft":
            native = next(
                r for r in found if (r.operation, r.variant) == (row.operation, "native scatter")
            )
            row.targets.append(
                Target(
                    "us of the whole less native", round(row.median - native.median, 1), LIMIT_US
                )
            )
