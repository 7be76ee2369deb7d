"""Ways to put a patch in and take it out on a device, and how they are sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from hotgraft import Host

from bench.gpu.floor import EACH, Floor
from bench.gpu.lab import Call, Lab
from bench.gpu.work import Judge, Patch
from bench.timing import Contender

ACTIVATE, DEACTIVATE, SWITCH, BACK = "activate", "deactivate", "A to B", "B to A"
RANK = 16
INDEX_COPY, DENSE = "torch index_copy_", "torch copy_ of whole tensors"
NAN_DENSE, LORA = "NaN-dense load", f"LoRA r{RANK} merge"


def nothing() -> None:
    """Do nothing."""


@dataclasses.dataclass
class Way(Contender):
    """A contender whose steps lead from a state that `enter` makes back to it; untimed, both ends.

    Args:
        enter: from the base to where the steps begin.
        leave: back to the base's bits.
    """

    enter: Call = nothing
    leave: Call = nothing

    def check(self, expected: dict[str, Call]) -> None:
        """Go round once, untimed, and note whether the right bits are there after each step.

        Args:
            expected: for each step, and for "" at the end, what says whether they are.
        """
        self.enter()
        good = True
        for name, step in self.steps.items():
            step()
            good &= bool(expected[name]())
        self.leave()
        self.correct = good and bool(expected[""]())


def sample(lab: Lab, ways: Sequence[Way], rounds: int, clock: str, cold: bool) -> None:
    """Sample every way `rounds` times in turns, a different one first each time.

    Args:
        clock: `device` or `call`; see `bench.gpu.lab`.
        cold: whether the L2 is emptied before each sample; otherwise an untimed pass goes first.
    """
    for way in ways:
        way.samples = {name: [] for name in way.steps}
    for turn in range(rounds):
        first = turn % len(ways)
        for way in (*ways[first:], *ways[:first]):
            if turn % way.every:
                continue
            way.enter()
            leads = {name: lab.call_us(step) for name, step in way.steps.items()}
            for name, step in way.steps.items():
                if clock == "call":
                    taken = lab.call_us(step)
                else:
                    taken = lab.device_us(step, leads[name], cold)
                way.samples[name].append(taken)
            way.leave()


# ---- single patches: there and back -------------------------------------------------------------


def hotgraft_way(host: Host, backend: str) -> Way:
    """The whole Python calls."""
    return Way(
        f"hotgraft, {backend}",
        backend,
        {ACTIVATE: lambda: host.activate("A"), DEACTIVATE: host.deactivate},
    )


def floor_ways(floor: Floor, a: Patch) -> list[Way]:
    """The raw kernels over flat addresses."""
    found = []
    addresses, new, old = a.addresses(), a.values(), a.values(old=True)
    for each in EACH:
        steps: dict[str, Call] = {
            ACTIVATE: floor.scatter(addresses, new, each),
            DEACTIVATE: floor.scatter(addresses, old, each),
        }
        found.append(Way(f"floor, {each} a thread", "raw CUDA kernel", steps))
    return found


def index_copy_way(a: Patch) -> Way:
    """A loop over the tensors, its int64 indices and values prepared."""

    def write(old: bool) -> None:
        for part in a.parts:
            part.flat.index_copy_(0, part.indices, part.old if old else part.new)

    return Way(INDEX_COPY, "torch", _both_ways(write))


def nan_dense_way(a: Patch, every: int) -> Way:
    """A dense tensor of NaNs for each weight, the entries in it, and all that is no NaN taken over.

    That is how servers load sparse patches through their loaders for dense checkpoints; here with
    the fewest passes, one scratch tensor, and no loader.
    """
    largest = max(part.flat.numel() for part in a.parts)
    scratch = torch.empty(largest, dtype=a.parts[0].flat.dtype, device=a.parts[0].flat.device)

    def write(old: bool) -> None:
        for part in a.parts:
            dense = scratch[: part.flat.numel()]
            dense.fill_(float("nan"))
            dense.index_copy_(0, part.indices, part.old if old else part.new)
            torch.where(dense.isnan(), part.flat, dense, out=part.flat)

    return Way(NAN_DENSE, "torch", _both_ways(write), every=every)


def dense_way(a: Patch, every: int) -> Way:
    """Copying every touched tensor whole, from copies of the base and of the patched model."""
    base = [part.flat.clone() for part in a.parts]
    patched = [tensor.clone() for tensor in base]
    for part, tensor in zip(a.parts, patched, strict=True):
        tensor.index_copy_(0, part.indices, part.new)

    def write(old: bool) -> None:
        for part, source in zip(a.parts, base if old else patched, strict=True):
            part.flat.copy_(source)

    return Way(DENSE, "torch", _both_ways(write), every=every)


def lora_way(tensors: dict[str, torch.Tensor], every: int) -> Way:
    """Adding and subtracting a product of rank 16 to and from each matrix: one addmm each.

    It does not lead back to the base's bits, so a copy of them does.
    """
    matrices = [tensor.data for tensor in tensors.values()]
    base = [matrix.clone() for matrix in matrices]
    generator = torch.Generator(device=matrices[0].device).manual_seed(4)

    def factor(*size: int) -> torch.Tensor:
        empty = torch.empty(size, dtype=matrices[0].dtype, device=matrices[0].device)
        return empty.normal_(0, 0.02, generator=generator)

    factors = [(factor(len(m), RANK), factor(RANK, m.shape[1])) for m in matrices]

    def write(back: bool) -> None:
        for matrix, (left, right) in zip(matrices, factors, strict=True):
            matrix.addmm_(left, right, alpha=-1 if back else 1)

    def restore() -> None:
        for matrix, before in zip(matrices, base, strict=True):
            matrix.copy_(before)

    return Way(LORA, "torch", _both_ways(write), every=every, leave=restore)


def _both_ways(write: Callable[[bool], None]) -> dict[str, Call]:
    return {ACTIVATE: lambda: write(False), DEACTIVATE: lambda: write(True)}


# ---- from one patch to another ------------------------------------------------------------------


def hotgraft_switch(host: Host, backend: str, b: str) -> Way:
    """The whole Python calls, between A and another skill."""
    return Way(
        f"hotgraft, {backend}",
        backend,
        {SWITCH: lambda: host.activate(b), BACK: lambda: host.activate("A")},
        enter=lambda: host.activate("A"),
        leave=host.deactivate,
    )


def floor_switches(floor: Floor, a: Patch, b: Patch, apart: bool) -> list[Way]:
    """The raw kernels: one launch where the patches share no cell, else one a patch."""
    found = []
    for each in EACH:
        leave_a, enter_a, leave_b, enter_b = (
            floor.scatter(patch.addresses(), patch.values(old), each)
            for patch in (a, b)
            for old in (True, False)
        )
        if apart:
            both = torch.cat([a.addresses(), b.addresses()])
            steps: dict[str, Call] = {
                SWITCH: floor.scatter(both, torch.cat([a.values(True), b.values()]), each),
                BACK: floor.scatter(both, torch.cat([a.values(), b.values(True)]), each),
            }
        else:
            steps = {SWITCH: _in_turn(leave_a, enter_b), BACK: _in_turn(leave_b, enter_a)}
        found.append(
            Way(f"floor, {each} a thread", "raw CUDA kernel", steps, enter=enter_a, leave=leave_a)
        )
    return found


def index_copy_switch(a: Patch, b: Patch) -> Way:
    """Loops over the tensors, out of one patch and into the other."""
    one, other = index_copy_way(a).steps, index_copy_way(b).steps
    return Way(
        INDEX_COPY,
        "torch",
        {
            SWITCH: _in_turn(one[DEACTIVATE], other[ACTIVATE]),
            BACK: _in_turn(other[DEACTIVATE], one[ACTIVATE]),
        },
        enter=one[ACTIVATE],
        leave=one[DEACTIVATE],
    )


def _in_turn(first: Call, second: Call) -> Call:
    def call() -> None:
        first()
        second()

    return call


def expected(judge: Judge, a: Patch, b: Patch | None = None) -> dict[str, Call]:
    """What says whether a way's steps left the right bits: see `Way.check`."""
    base: Call = (lambda: judge.is_base(a)) if b is None else (lambda: judge.is_base(a, b))
    found: dict[str, Call] = {"": base, ACTIVATE: lambda: judge.holds(a), DEACTIVATE: base}
    if b is not None:
        found |= {SWITCH: lambda: judge.holds(b), BACK: lambda: judge.holds(a)}
    return found
