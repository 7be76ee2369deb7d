"""One patch size on models of 0.1, 1.3 and 3 B parameters: does the cost follow the patch?"""

from __future__ import annotations

from bench import shapes
from bench.cases.switch import measure, workload
from bench.session import Session
from bench.switching import floors, hotgraft_way, torch_ways

ENTRIES = shapes.entries_at(1e-4, shapes.SHAPES["1.3B"])


def run(session: Session) -> None:
    """The case."""
    entries = session.pick(ENTRIES, 2000)
    for name in session.pick(("0.1B", "1.3B", "3B"), ("tiny", "small")):
        shape = shapes.SHAPES[name]
        work = workload(shapes.model(shape), entries)
        contenders = [hotgraft_way(work), *floors(work), torch_ways(work)[0]]
        density = float(f"{entries / shape.parameters:.3g}")
        measure(session, "scale", shape, density, work, contenders)
        work.host.detach()
