"""One patch size on models of 1.3, 7 and 70 B parameters on a GPU: time follows the entries."""

from __future__ import annotations

import functools

from bench import shapes
from bench.gpu import report, work
from bench.gpu import ways as how
from bench.gpu.lab import Lab
from bench.gpu.report import Findings
from bench.gpu.work import Judge, Patch
from bench.session import Session

CASE = "gpu_scale"
ENTRIES = shapes.entries_at(1e-4, shapes.SHAPES["7B"])
ROUNDS = {"device": 60, "call": 60}
RESERVE = 8 << 30
"""Bytes that are left to everything but the model."""


def run(session: Session) -> None:
    """The case."""
    measure(session, Lab())


def measure(session: Session, lab: Lab) -> None:
    """The case, on a device."""
    findings = report.opened(session, CASE, lab)
    if findings is None:
        return
    for name in session.pick(("1.3B", "7B", "70B"), ("tiny", "small")):
        _one(session, findings, shapes.SHAPES[name])
        lab.release()
    findings.conclude()


def _one(session: Session, findings: Findings, full: shapes.Shape) -> None:
    lab = findings.lab
    shape = work.trimmed(full, lab.free_bytes() - session.pick(RESERVE, 0))
    tensors = work.weights(shape, lab.device)
    graft = shapes.graft(tensors, session.pick(ENTRIES, 2000), 1)
    patch, judge = Patch.of(graft, tensors), Judge(tensors)
    hosts = findings.hosts(tensors, {"A": graft})
    ways = [how.hotgraft_way(host, name) for name, host in hosts.items()]
    ways += findings.floor_ways(functools.partial(how.floor_ways, a=patch))
    ways.append(how.index_copy_way(patch))
    ways = findings.checked(ways, how.expected(judge, patch))
    for way in ways:
        if shape.layers < full.layers:
            way.body += f"; {shape.layers} of {full.layers} layers, as memory allows"
    rounds = session.pick(ROUNDS, {"device": 2, "call": 2})
    sizes = report.sizes(shape, patch)
    report.measure(findings, ways, patch, sizes, rounds, patch.moved_bytes, judge, targets=False)
    report.release(hosts)
