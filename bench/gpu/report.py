"""From ways to rows: what a case on a GPU leaves behind, measured or not."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hotgraft import Graft, Host

from bench import shapes
from bench.gpu import ways as how
from bench.gpu.lab import Call, Lab
from bench.gpu.ways import Way
from bench.gpu.work import Judge, Patch
from bench.gpu.work import model as model_of
from bench.rows import Row, Target
from bench.session import Session, make_rows, ratio

CLOCKS = (("device", "warm"), ("device", "cold"), ("call", "warm"))
MINE = "hotgraft, cuda"


class Findings:
    """The rows of one case, and whether something went wrong on the way.

    Args:
        session: where the rows go.
        case: the case's name.
        lab: the device.
    """

    def __init__(self, session: Session, case: str, lab: Lab) -> None:
        self.session, self.case, self.lab = session, case, lab
        self.wrong: list[str] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows; note those of ours that left wrong bits."""
        self.session.add(rows)
        self.wrong += [
            f"{row.variant}: {row.operation} left wrong bits"
            for row in rows
            if row.correct is False and row.variant.startswith("hotgraft")
        ]

    def missing(self, operation: str, variant: str, why: str) -> None:
        """Keep a row that says that something was not measured, and why."""
        self.add([not_measured(self.case, operation, variant, why)])

    def hosts(self, tensors: dict[str, Any], skills: dict[str, Graft]) -> dict[str, Host]:
        """A host on each backend that runs here, over the same weights, with the skills loaded."""
        found = {}
        for name, reason in self.lab.backends.items():
            if reason is not None:
                self.missing(how.ACTIVATE, f"hotgraft, {name}", reason)
                continue
            try:
                host = self.lab.attach(model_of(tensors), name)
                for skill, graft in skills.items():
                    host.load(graft, skill)
            except Exception as error:  # the other backend can still be measured
                self.failed(f"hotgraft, {name}", error)
                continue
            found[name] = host
        return found

    def failed(self, variant: str, error: Exception) -> None:
        """Note what was raised; the case goes on, and fails at the end."""
        traceback.print_exception(error, file=sys.stderr)
        self.wrong.append(f"{variant}: {error}")
        self.missing(how.ACTIVATE, variant, f"{type(error).__name__}: {error}")

    def floor_ways(self, make: Callable[[Any], list[Way]]) -> list[Way]:
        """The raw kernels' ways, or a row that says why there are none."""
        if isinstance(self.lab.floor, str):
            self.missing(how.ACTIVATE, "floor", self.lab.floor)
            return []
        return make(self.lab.floor)

    def checked(self, ways: Sequence[Way], expected: dict[str, Call]) -> list[Way]:
        """Those of the ways that go round without an exception; see `Way.check`."""
        found = []
        for way in ways:
            try:
                way.check(expected)
            except Exception as error:  # the others can still be measured
                self.failed(way.name, error)
            else:
                found.append(way)
        return found

    def conclude(self) -> None:
        """Raises `RuntimeError` if something went wrong: the rows are kept, the run fails."""
        if self.wrong:
            raise RuntimeError("; ".join(self.wrong))


def opened(session: Session, case: str, lab: Lab) -> Findings | None:
    """Findings for a case; or None, and a row that says so, where nothing can be measured."""
    why = lab.why_not()
    if why is not None:
        session.add([not_measured(case, how.ACTIVATE, "hotgraft", why)])
        return None
    return Findings(session, case, lab)


def not_measured(case: str, operation: str, variant: str, why: str) -> Row:
    """A row without samples."""
    return Row(case, operation, variant, "nothing ran", {}, [], note=why)


def sample(lab: Lab, ways: list[Way], rounds: int, clock: str, caches: str, judge: Judge) -> None:
    """Sample ways, and see that they led back to the base's bits."""
    how.sample(lab, ways, rounds, clock, caches == "cold")
    restored = judge.is_base()
    for way in ways:
        way.correct = bool(way.correct) and restored


def measure(
    findings: Findings,
    ways: list[Way],
    patch: Patch,
    parameters: dict[str, Any],
    rounds: dict[str, int],
    moved_bytes: int,
    judge: Judge,
    targets: bool = True,
) -> None:
    """Sample ways by each clock, see that they lead back, and make and keep their rows.

    Args:
        patch: what goes in, for the sizes that the rows state.
        rounds: how many by each clock.
        moved_bytes: what a step has to move, of those ways that do not copy whole tensors.
        judge: knows what memory should hold afterwards.
        targets: whether the rows get the targets, which are for the 7 B shape.
    """
    for clock, caches in CLOCKS:
        sample(findings.lab, ways, rounds[clock], clock, caches, judge)
        found = make_rows(
            findings.case,
            ways,
            {**parameters, "caches": caches, "clock": clock},
            lambda way, _step: 2 * patch.touched_bytes if way.name == how.DENSE else moved_bytes,
        )
        if targets:
            set_targets(found, clock, caches)
        findings.add(found)


CALL_US, SWITCH_US = 40, 60
DEVICE_US = {"warm": 20, "cold": 35}
OVER_FLOOR = OVER_CUDA = 1.5
TIMES_FASTER = {
    how.INDEX_COPY: 25,
    how.NAN_DENSE: 500,
    how.LORA: 200,
    how.DENSE: 100,
}
"""In device time."""


def set_targets(found: list[Row], clock: str, caches: str) -> None:
    """Put the targets for 650 thousand entries into our rows."""
    there = {row.variant for row in found}
    for row in found:
        if row.variant == MINE and clock == "call":
            limit = CALL_US if row.operation in (how.ACTIVATE, how.DEACTIVATE) else SWITCH_US
            row.targets.append(Target("us of the whole call", round(row.median, 1), limit))
        elif row.variant == MINE and row.operation in (how.ACTIVATE, how.DEACTIVATE):
            limit = DEVICE_US[caches]
            row.targets.append(Target("us of device time", round(row.median, 1), limit))
            if row.floor_ratio is not None:
                row.targets.append(
                    Target("device time over the floor's", row.floor_ratio, OVER_FLOOR)
                )
            for other, times in TIMES_FASTER.items():
                if other in there and row.operation == how.ACTIVATE:
                    faster = round(1 / ratio(found, how.ACTIVATE, MINE, other), 1)
                    row.targets.append(Target(f"times faster than {other}", faster, times, True))
        elif row.variant == "hotgraft, triton" and clock == "device" and MINE in there:
            over = round(ratio(found, row.operation, row.variant, MINE), 3)
            row.targets.append(Target("device time over CUDA's", over, OVER_CUDA))


def sizes(shape: shapes.Shape, patch: Patch) -> dict[str, Any]:
    """What every row says of a model and a patch."""
    return {
        "shape": shape.name,
        "layers": shape.layers,
        "model_parameters": shape.parameters,
        "tensors": len(patch.parts),
        "density": float(f"{patch.entries / shape.parameters:.3g}"),
        "entries": patch.entries,
    }


def release(hosts: Mapping[str, Host]) -> None:
    """Let go of the models."""
    for host in hosts.values():
        host.detach(force=True)
