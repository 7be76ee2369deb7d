"""Composing two grafts that overlap, under each policy; verifying a host."""

from __future__ import annotations

from collections.abc import Callable

import hotgraft
import torch
from hotgraft import Graft
from hotgraft.graft import Entries

from bench import environment, floor, shapes
from bench.session import Session, make_rows
from bench.switching import Workload
from bench.timing import Contender, take_turns

POLICIES = ("priority", "sum", "mean", "sign")


def run(session: Session) -> None:
    """The case."""
    shape = shapes.SHAPES[session.pick("1.3B", "tiny")]
    model = shapes.model(shape)
    tensors = dict(model.named_parameters())
    entries = session.pick(131_019, 2000)
    a = shapes.graft(tensors, entries, 1)
    b = overlapping(a, shapes.graft(tensors, entries, 2))
    _compose(session, shape, a, b)
    _verify(session, shape, Workload(model, a, b))


def overlapping(a: Graft, b: Graft) -> Graft:
    """`b` with every other position replaced by one of `a`'s, so that half of it meets `a`."""
    found = {}
    for name in a.names:
        mine, other = a[name], b[name]
        old = torch.cat([mine.old[::2], other.old[::2]])
        new = torch.cat([mine.new[::2] + 1, other.new[::2]])
        both = torch.cat([mine.indices[::2], other.indices[::2]])
        indices, first = torch.unique(both, return_inverse=True)
        at = torch.empty_like(indices).scatter_(0, first, torch.arange(len(both)))
        found[name] = Entries(indices, new[at], old[at], mine.shape)
    return Graft.from_entries(found)


def _compose(session: Session, shape: shapes.Shape, a: Graft, b: Graft) -> None:
    def composing(policy: str, backend: str | None = None) -> Callable[[], Graft]:
        return lambda: hotgraft.compose([a, b], policy, backend=backend)

    native = Contender(
        "hotgraft",
        f"cpu, {floor.threads()} threads",
        {f"compose {policy}": composing(policy) for policy in POLICIES},
    )
    native.correct = all(composing(p)() == composing(p, "reference")() for p in POLICIES)
    reference = Contender(
        "hotgraft, reference",
        "numpy",
        {f"compose {policy}": composing(policy, "reference") for policy in POLICIES},
        every=5,
        slack=True,
    )
    pairs = [
        (
            torch.cat([a[name].indices, b[name].indices])[None],
            torch.cat([(g[name].new.float() - g[name].old.float()) for g in (a, b)]),
            a[name].shape[0] * a[name].shape[1],
        )
        for name in a.names
    ]
    coalesce = Contender(
        "torch sparse coalesce",
        f"torch, {torch.get_num_threads()} threads",
        {
            "compose sum": lambda: [
                torch.sparse_coo_tensor(i, v, (n,), check_invariants=False).coalesce()
                for i, v, n in pairs
            ]
        },
    )
    contenders = [native, reference, coalesce]
    take_turns(contenders, session.pick(30, 2), cold=False)
    parameters = {
        "shape": shape.name,
        "entries": [a.nnz, b.nnz],
        "union": composing("sum")().nnz,
        "isa": environment.isa(),
    }
    session.add(make_rows("merge", contenders, parameters, lambda _c, _s: a.nbytes + b.nbytes))


def _verify(session: Session, shape: shapes.Shape, work: Workload) -> None:
    host = work.host
    prepared = [
        (work.flat[name], graft[name].indices, graft[name].old)
        for graft in (work.a, work.b)
        for name in graft.names
    ]
    compare = Contender(
        "torch index_select, equal",
        f"torch, {torch.get_num_threads()} threads",
        {"verify": lambda: [t.index_select(0, i).equal(old) for t, i, old in prepared]},
    )
    mine = Contender("hotgraft", f"cpu, {floor.threads()} threads", {"verify": host.verify})
    mine.correct = host.verify() == work.a.nnz + work.b.nnz
    take_turns([mine, compare], session.pick(30, 2), cold=False)
    parameters = {"shape": shape.name, "entries": [work.a.nnz, work.b.nnz]}
    session.add(make_rows("merge", [mine, compare], parameters))
    host.detach()
