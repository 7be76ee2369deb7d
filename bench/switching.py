"""Ways to put a patch in and take it out: hotgraft, the floor, and what torch offers.

Each goes the same round: from the base to A, from A to B, from B back to the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import hotgraft
import numpy as np
import torch
from hotgraft import Graft, Host

from bench import floor
from bench.timing import Contender

ACTIVATE, SWITCH, DEACTIVATE = "activate", "A to B", "deactivate"


class Workload:
    """A model that is a host, two patches for it, and the parameters as plain flat tensors.

    The flat tensors do not share version counters with the parameters, so others may write to the
    model between hotgraft's commits, as long as they put the base back.
    """

    def __init__(self, model: torch.nn.Module, a: Graft, b: Graft) -> None:
        self.flat = {name: p.data.view(-1) for name, p in model.named_parameters()}
        self.tensors = dict(self.flat)
        self.a, self.b = a, b
        self.host: Host = hotgraft.attach(model)
        self.host.load(a, "A")
        self.host.load(b, "B")

    def holds(self, graft: Graft, old: bool = False) -> bool:
        """Whether the model holds a graft's new (or old) bits at its positions."""
        for name in graft.names:
            entries = graft[name]
            held = self.flat[name][entries.indices].view(torch.int16)
            if not torch.equal(held, (entries.old if old else entries.new).view(torch.int16)):
                return False
        return True

    def goes_round(self, contender: Contender) -> bool:
        """Whether a contender, untimed, leaves the right bits after each step."""
        good = True
        for name, step in contender.steps.items():
            step()
            if name == ACTIVATE:
                good &= self.holds(self.a)
            elif name == SWITCH:
                good &= self.holds(self.b)
        return good and self.holds(self.a, old=True) and self.holds(self.b, old=True)


def hotgraft_way(work: Workload, name: str = "hotgraft") -> Contender:
    """The whole Python calls."""
    host = work.host
    return Contender(
        name,
        f"{host._backend.name}, {floor.threads()} threads",
        {
            ACTIVATE: lambda: host.activate("A"),
            SWITCH: lambda: host.activate("B"),
            DEACTIVATE: host.deactivate,
        },
    )


def floors(work: Workload) -> list[Contender]:
    """The plain loop: on one thread, and on all, with helpers that sleep and that wait awake."""
    a, b = floor.Table(work.a, work.tensors), floor.Table(work.b, work.tensors)
    found = []
    many = floor.threads()
    kinds = [("1 thread", 1, False)]
    if many > 1:
        kinds += [(f"{many} threads", many, False), (f"{many} threads, awake", many, True)]
    for label, workers, awake in kinds:
        enter_a, leave_a = a.scatter(a.new, workers), a.scatter(a.old, workers)
        enter_b, leave_b = b.scatter(b.new, workers), b.scatter(b.old, workers)
        steps = {ACTIVATE: enter_a, SWITCH: _both(leave_a, enter_b), DEACTIVATE: leave_b}
        found.append(Contender(f"floor, {label}", f"plain C, {label}", steps, awake=awake))
    return found


def _both(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], object]:
    def call() -> None:
        first()
        second()

    return call


def torch_ways(work: Workload) -> list[Contender]:
    """Loops over the tensors, with int64 indices and values prepared beforehand."""
    body = f"torch, {torch.get_num_threads()} threads"
    prepared = {
        name: [
            (work.flat[tensor], entries.indices, entries.new, entries.old)
            for tensor in graft.names
            for entries in [graft[tensor]]
        ]
        for name, graft in (("A", work.a), ("B", work.b))
    }

    def index_copy(name: str, old: bool) -> None:
        for tensor, indices, new, before in prepared[name]:
            tensor.index_copy_(0, indices, before if old else new)

    def index_put(name: str, old: bool) -> None:
        for tensor, indices, new, before in prepared[name]:
            tensor.index_put_((indices,), before if old else new)

    saved: list[torch.Tensor] = []

    def save_and_copy(name: str) -> None:
        saved.clear()
        for tensor, indices, new, _ in prepared[name]:
            saved.append(tensor.index_select(0, indices))
            tensor.index_copy_(0, indices, new)

    def put_back(name: str) -> None:
        for (tensor, indices, _, _), before in zip(prepared[name], saved, strict=True):
            tensor.index_copy_(0, indices, before)

    def round_of(write: Callable[[str, bool], None]) -> dict[str, Callable[[], object]]:
        return {
            ACTIVATE: lambda: write("A", False),
            SWITCH: lambda: (write("A", True), write("B", False)),
            DEACTIVATE: lambda: write("B", True),
        }

    return [
        Contender("torch index_copy_", body, round_of(index_copy)),
        Contender(
            "torch index_select, index_copy_",
            body,
            {
                ACTIVATE: lambda: save_and_copy("A"),
                SWITCH: lambda: (put_back("A"), save_and_copy("B")),
                DEACTIVATE: lambda: put_back("B"),
            },
        ),
        Contender("torch index_put_", body, round_of(index_put)),
    ]


def dense_way(work: Workload, every: int) -> Contender:
    """Copying every touched tensor whole, from copies of the base and of the patched model."""
    touched = [work.flat[name] for name in work.a.names]
    base = [tensor.clone() for tensor in touched]
    patched = [tensor.clone() for tensor in touched]
    for tensor, name in zip(patched, work.a.names, strict=True):
        tensor[work.a[name].indices] = work.a[name].new

    def copy(sources: Iterable[torch.Tensor]) -> None:
        for tensor, source in zip(touched, sources, strict=True):
            tensor.copy_(source)

    return Contender(
        "torch copy_ of whole tensors",
        f"torch, {torch.get_num_threads()} threads",
        {ACTIVATE: lambda: copy(patched), DEACTIVATE: lambda: copy(base)},
        every=every,
        slack=True,
    )


def bytes_moved(work: Workload, step: str) -> int:
    """Bytes that a step has to move: positions and values read, cells written."""

    def entries(graft: Graft) -> int:
        (group,) = graft.groups.values()
        each = group.positions.itemsize + group.new.itemsize + group.new.itemsize
        return len(group.positions) * each

    return {
        ACTIVATE: entries(work.a),
        SWITCH: entries(work.a) + entries(work.b),
        DEACTIVATE: entries(work.b),
    }[step]


def dense_bytes(work: Workload) -> int:
    """Bytes that copying the touched tensors moves: each read and written."""
    return sum(2 * work.flat[n].numel() * work.flat[n].element_size() for n in work.a.names)


def checksum(work: Workload) -> tuple[int, ...]:
    """A number a tensor that changes with any one bit of it."""
    found = []
    for tensor in work.flat.values():
        bits = tensor.view(torch.int16)
        whole = bits[: len(bits) // 4 * 4].view(torch.int64)
        found += [int(whole.sum()), int(bits[len(bits) // 4 * 4 :].sum())]
    return tuple(np.array(found).tolist())
