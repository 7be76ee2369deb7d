"""gather, scatter and compare by themselves, on one thread and on all, beside the plain loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hotgraft.kernels.native_cpu import NativeCpu

from bench import floor, shapes
from bench.cases.switch import workload
from bench.session import Session, make_rows
from bench.timing import Contender, take_turns


def run(session: Session) -> None:
    """The case."""
    shape = shapes.SHAPES[session.pick("1.3B", "tiny")]
    density = session.pick(1e-4, 1e-2)
    work = workload(shapes.model(shape), shapes.entries_at(density, shape))
    (launch,) = work.host.skills["A"].plan.launches
    held, wanted = np.empty_like(launch.old), launch.old
    contenders = []
    for workers in sorted({1, floor.threads()}):
        label = f"{workers} thread{'s' if workers > 1 else ''}"
        native = NativeCpu(workers=workers)
        # Values are written that are there already, so that the steps can come in any order.
        steps = {
            "scatter": _bind(native.scatter, launch.table, launch.old),
            "gather": _bind(native.gather, launch.table, held),
            "compare": _bind(native.compare, launch.table, launch.old),
        }
        mine = Contender(f"native, {label}", f"cpu, {label}", steps)
        held[:] = 0
        native.gather(launch.table, held)
        counted = native.compare(launch.table, launch.old)
        mine.correct = bool((held == wanted).all()) and counted == (0, -1)
        contenders.append(mine)
        plain = floor.Table(work.a, work.tensors)
        into = np.empty_like(held)
        loop = Contender(
            f"floor, {label}",
            f"plain C, {label}",
            {"scatter": plain.scatter(plain.old, workers), "gather": plain.gather(into, workers)},
            awake=workers > 1,
        )
        loop.steps["gather"]()
        loop.correct = bool((into == wanted).all())
        contenders.append(loop)
    each = launch.table.n_entries * (4 + 2 * launch.old.itemsize)
    for cold in (False, True):
        take_turns(contenders, session.pick(60, 4), cold)
        parameters = {
            "shape": shape.name,
            "density": density,
            "entries": work.a.nnz,
            "caches": "cold" if cold else "warm",
        }
        session.add(make_rows("verbs", contenders, parameters, lambda _c, _s: each))
    work.host.detach()
    _copy(session)


def _copy(session: Session) -> None:
    """What memory can do: a large block copied."""
    source = np.arange(session.pick(256 << 20, 1 << 20) // 8)
    target = np.zeros_like(source)
    contenders = [
        Contender(
            f"floor, {workers} thread{'s' if workers > 1 else ''}",
            "plain C, memcpy",
            {"copy": _bind(floor.copy, target, source, workers)},
            awake=workers > 1,
        )
        for workers in sorted({1, floor.threads()})
    ]
    take_turns(contenders, session.pick(20, 2), cold=False)
    for contender in contenders:
        contender.correct = bool((target == source).all())
    parameters = {"copied": source.nbytes}
    session.add(make_rows("verbs", contenders, parameters, lambda _c, _s: 2 * source.nbytes))


def _bind(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: function(*arguments)
