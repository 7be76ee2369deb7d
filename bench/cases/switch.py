"""activate, A to B and deactivate on the 1.3 B model, at three densities, warm and cold."""

from __future__ import annotations

import torch

from bench import shapes
from bench.rows import Row, Target
from bench.session import Session, make_rows, ratio
from bench.switching import (
    ACTIVATE,
    SWITCH,
    Workload,
    bytes_moved,
    checksum,
    dense_bytes,
    dense_way,
    floors,
    hotgraft_way,
    torch_ways,
)
from bench.timing import Contender, take_turns

MANY = (100, 60)
ROUNDS = {1e-3: (40, 30), 1e-2: (12, 10)}
"""Warm and cold rounds, at densities where they take long."""


def run(session: Session) -> None:
    """The case."""
    shape = shapes.SHAPES[session.pick("1.3B", "tiny")]
    densities = session.pick((1e-4, 1e-3, 1e-2), (1e-2,))
    for density in densities:
        model = shapes.model(shape)
        work = workload(model, shapes.entries_at(density, shape))
        contenders = [
            hotgraft_way(work),
            *floors(work),
            *torch_ways(work),
            dense_way(work, session.pick(10, 2)),
        ]
        measure(session, "switch", shape, density, work, contenders)
        work.host.detach()


def workload(model: torch.nn.Module, entries: int) -> Workload:
    """A host with two patches of so many random entries."""
    tensors = dict(model.named_parameters())
    return Workload(model, shapes.graft(tensors, entries, 1), shapes.graft(tensors, entries, 2))


def measure(
    session: Session,
    case: str,
    shape: shapes.Shape,
    density: float,
    work: Workload,
    contenders: list[Contender],
) -> None:
    """Check every contender, then sample them, warm and cold."""
    before = checksum(work)
    for contender in contenders:
        contender.correct = work.goes_round(contender)
    for cold in (False, True):
        rounds = session.pick(ROUNDS.get(density, MANY)[cold], 4)
        take_turns(contenders, rounds, cold)
        restored = checksum(work) == before
        for contender in contenders:
            contender.correct = bool(contender.correct) and restored
        parameters = {
            "shape": shape.name,
            "model_parameters": shape.parameters,
            "tensors": len(work.a.names),
            "density": density,
            "entries": work.a.nnz,
            "caches": "cold" if cold else "warm",
        }
        found = make_rows(
            case,
            contenders,
            parameters,
            lambda c, step: dense_bytes(work) if "whole" in c.name else bytes_moved(work, step),
        )
        _judge(found)
        session.add(found)


def _judge(found: list[Row]) -> None:
    """Put the targets into hotgraft's rows."""
    for row in found:
        if row.variant != "hotgraft":
            continue
        if row.operation == SWITCH:
            over_one = round(ratio(found, SWITCH, "hotgraft", "hotgraft", ACTIVATE), 3)
            row.targets.append(Target("A to B over activate", over_one, 2.2))
        else:
            over_floor = round(ratio(found, row.operation, "hotgraft", "floor"), 3)
            row.targets.append(Target("time over the floor's", over_floor, 1.2))
