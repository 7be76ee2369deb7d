"""From a file in the page cache to live on a GPU; merging two resident skills there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hotgraft
import numpy as np
import torch
from hotgraft import Graft, Host
from hotgraft.format import DTYPES
from hotgraft.kernels.device import DeviceBackend, DeviceSource

from bench import shapes
from bench.cases.merge import overlapping
from bench.gpu import report, work
from bench.gpu.lab import Lab
from bench.gpu.report import Findings
from bench.gpu.work import Judge, Patch
from bench.rows import Row, Target
from bench.session import Session

CASE = "gpu_load"
LIVE_MS, UNCHECKED_MS, MERGE_US = 4.0, 1.5, 200.0
LIVE, MERGE, COMPOSED = "file to live", "merge", "activate two"


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
    entries = shapes.entries_at(session.pick(1e-4, 3e-3), shape)
    a = shapes.graft(tensors, entries, 1)
    b = overlapping(a, shapes.graft(tensors, entries, 2))
    path = session.scratch / "patch.graft.safetensors"
    a.save(path)
    patch, judge = Patch.of(a, tensors), Judge(tensors)
    both = hotgraft.compose([a, b], "sum", backend="cpu")
    union = Patch.of(both, tensors)
    parameters = report.sizes(shape, patch)
    for name, host in findings.hosts(tensors, {"A": a, "B": b}).items():
        _load(findings, name, host, path, patch, judge, parameters)
        _merge(findings, name, host, both, union, judge, parameters)
        host.detach(force=True)
    findings.conclude()


# ---- loading ------------------------------------------------------------------------------------


def _load(
    findings: Findings,
    name: str,
    host: Host,
    path: Path,
    patch: Patch,
    judge: Judge,
    parameters: dict[str, Any],
) -> None:
    kinds = [("id verified", True, LIVE_MS), ("id not verified", False, UNCHECKED_MS)]
    for kind, verified, limit in kinds:
        variant = f"hotgraft, {name}, {kind}"

        def come_live(verified: bool = verified) -> None:
            host.load(path, "file", verify_id=verified)
            host.activate("file")

        samples, good = [], True
        for turn in range(findings.session.pick(40, 3)):
            samples.append(findings.lab.done_us(come_live))
            if not turn:
                good = judge.holds(patch)
            host.deactivate()
            host.unload("file")
        row = Row(
            CASE, LIVE, variant, name, {**parameters, "files": "page cache"}, samples,
            bytes=path.stat().st_size, correct=good and judge.is_base(patch),
        )  # fmt: skip
        row.targets.append(Target("ms from file to live", round(row.median / 1000, 3), limit))
        findings.add([row])
    reading = [
        findings.lab.done_us(lambda: Graft.load(path)) for _ in range(findings.session.pick(20, 2))
    ]
    findings.add([Row(CASE, "Graft.load", f"hotgraft, {name}", "CPU", dict(parameters), reading)])


# ---- merging ------------------------------------------------------------------------------------


def _merge(
    findings: Findings,
    name: str,
    host: Host,
    both: Graft,
    union: Patch,
    judge: Judge,
    parameters: dict[str, Any],
) -> None:
    lab, rounds = findings.lab, findings.session.pick(60, 3)
    parameters = {**parameters, "policy": "sum", "union": both.nnz}
    merging, right = _merge_alone(lab, host, both)
    lab.done_us(merging)
    alone = Row(
        CASE, MERGE, f"hotgraft, {name}", "two resident skills, with the report", parameters,
        [lab.done_us(merging) for _ in range(rounds)], correct=right,
    )  # fmt: skip
    # Every weight is another set, so each activation is its set's first.
    fresh = (1.0 + 2.0**-20 * step for step in itertools.count(1))
    first = []
    for _ in range(rounds):
        weights = (1.0, next(fresh))
        first.append(
            lab.done_us(lambda w=weights: host.activate("A", "B", policy="sum", weights=w))  # type: ignore[misc]
        )
        host.deactivate()

    def again() -> None:
        host.activate("A", "B", policy="sum")

    again()
    good = judge.holds(union)
    host.deactivate()
    good &= judge.is_base(union)
    kept, device = [], []
    for _ in range(rounds):
        kept.append(lab.call_us(again))
        host.deactivate()
        device.append(lab.device_us(again, kept[-1]))
        host.deactivate()
    found = [
        alone,
        Row(CASE, COMPOSED, f"hotgraft, {name}, first time", name, parameters, first, correct=good),
        Row(
            CASE, COMPOSED, f"hotgraft, {name}, plan kept", name, {**parameters, "clock": "call"},
            kept, correct=good,
        ),
        Row(
            CASE, COMPOSED, f"hotgraft, {name}, plan kept", name, {**parameters, "clock": "device"},
            device, correct=good,
        ),
    ]  # fmt: skip
    alone.targets.append(Target("us to merge", round(alone.median, 1), MERGE_US))
    found[1].targets.append(Target("us to merge and activate", round(found[1].median, 1), MERGE_US))
    findings.add(found)


def _merge_alone(lab: Lab, host: Host, both: Graft) -> tuple[Callable[[], object], bool]:
    """The merge of two skills by the backend's verb, and whether it gives the right bits."""
    launches = [host.skills[skill].plan.launches[0] for skill in ("A", "B")]
    backend = host._backends[launches[0].device]
    assert isinstance(backend, DeviceBackend)
    assert [row.name for row in launches[0].rows] == [row.name for row in launches[1].rows]
    sources = [DeviceSource(x.table.positions, x.new, x.old, 1.0) for x in launches]
    ranges = np.stack([x.segments[:, 1:] for x in launches], 1)

    def merging() -> Any:
        return backend.merge_there(sources, ranges, DTYPES["BF16"], "sum", (0, 1))

    merged = merging()
    lab.synchronize()
    group = both.groups["BF16"]
    right = all(
        np.array_equal(there.cpu().view(torch.uint8).numpy(), here.view(np.uint8))
        for there, here in zip((merged.positions, merged.new, merged.old), group, strict=True)
    )
    return merging, right
