"""activate, deactivate and A to B on Llama 2's 7 B shape on a GPU, beside everything else."""

from __future__ import annotations

import functools

import torch

from bench import shapes
from bench.cases.merge import overlapping
from bench.gpu import report, work
from bench.gpu import ways as how
from bench.gpu.lab import Lab
from bench.gpu.work import Judge, Patch
from bench.rows import Row
from bench.session import Session

CASE = "gpu_switch"
DENSITY = 1e-4
ROUNDS = {"device": 100, "call": 200}
SLOW = 10
"""Ways that take milliseconds take part in one round of so many."""
COPY_BYTES = 1 << 30


def run(session: Session) -> None:
    """The case."""
    measure(session, Lab())


def measure(session: Session, lab: Lab) -> None:
    """The case, on a device."""
    findings = report.opened(session, CASE, lab)
    if findings is None:
        return
    shape = shapes.SHAPES[session.pick("7B", "tiny")]
    tensors = work.weights(shape, lab.device)
    entries = shapes.entries_at(session.pick(DENSITY, 3e-3), shape)
    a, b, c = (shapes.graft(tensors, entries, seed) for seed in (1, 2, 3))
    skills = {"A": a, "B": work.disjoint(a, b), "C": overlapping(a, c)}
    patches = {name: Patch.of(graft, tensors) for name, graft in skills.items()}
    judge = Judge(tensors)
    hosts = findings.hosts(tensors, skills)
    rounds = session.pick(ROUNDS, {"device": 3, "call": 3})

    _overheads(session, lab)
    one = patches["A"]
    ways = [how.hotgraft_way(host, name) for name, host in hosts.items()]
    ways += findings.floor_ways(functools.partial(how.floor_ways, a=one))
    ways += [
        how.index_copy_way(one),
        how.nan_dense_way(one, session.pick(SLOW, 1)),
        how.dense_way(one, session.pick(SLOW, 1)),
    ]
    expected = how.expected(judge, one)
    ways = findings.checked(ways, expected)
    lora = [how.lora_way(tensors, session.pick(SLOW, 1))]
    ways += findings.checked(lora, {**expected, how.ACTIVATE: lambda: True})
    parameters = report.sizes(shape, one)
    report.measure(findings, ways, one, parameters, rounds, one.moved_bytes, judge)
    del ways, lora
    lab.release()

    for other, kind in (("B", "disjoint"), ("C", "overlapping")):
        two = patches[other]
        ways = [how.hotgraft_switch(host, name, other) for name, host in hosts.items()]
        apart = kind == "disjoint"
        ways += findings.floor_ways(
            functools.partial(how.floor_switches, a=one, b=two, apart=apart)
        )
        ways.append(how.index_copy_switch(one, two))
        ways = findings.checked(ways, how.expected(judge, one, two))
        report.measure(
            findings, ways, one, {**parameters, "patches": kind}, rounds,
            one.moved_bytes + two.moved_bytes, judge,
        )  # fmt: skip
    report.release(hosts)
    findings.conclude()


def _overheads(session: Session, lab: Lab) -> None:
    """What the clock itself takes, and what memory can do: a large block copied."""
    source = torch.arange(session.pick(COPY_BYTES, 1 << 20) // 8, device=lab.device)
    target = torch.zeros_like(source)
    samples = {
        "nothing": [lab.device_us(how.nothing, 10) for _ in range(session.pick(50, 3))],
        "copy": [
            lab.device_us(lambda: target.copy_(source), 20) for _ in range(session.pick(30, 3))
        ],
    }
    clock = {"clock": "device"}
    empty = Row(CASE, "nothing", "two events", "CUDA events", clock, samples["nothing"])
    copied = Row(
        CASE, "copy", "torch copy_", "torch", {**clock, "copied": source.nbytes},
        samples["copy"], bytes=2 * source.nbytes, correct=torch.equal(source, target),
    )  # fmt: skip
    copied.parameters["gb_per_s"] = round(2 * source.nbytes / copied.median / 1000, 1)
    session.add([empty, copied])
