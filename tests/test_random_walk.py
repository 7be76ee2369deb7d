"""A thousand random steps: at each, live = f(base bits, the active set, the policy)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import factories
import numpy as np
import pytest
import torch
from hosts import contents
from hotgraft import Entries, Graft, attach
from hotgraft.errors import OverlapError
from hotgraft.format import DTYPES, DType
from hotgraft.graft import bits
from hotgraft.kernels.reference import resolve, resolve_one
from torch import nn

STEPS = 1000
SKILLS = 20


class Walker(nn.Module):
    """bf16 and fp32, contiguous, transposed, a slice, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        big = factories.weights("BF16", (9, 16), 1)
        self.slice = nn.Parameter(big[:, 3:11])
        self.turned = nn.Parameter(factories.weights("F32", (7, 6), 2).t())
        self.embed = nn.Embedding(11, 6, _weight=factories.weights("BF16", (11, 6), 3))
        self.norm = nn.Parameter(factories.weights("F32", (12,), 4))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclasses.dataclass
class Flat:
    """A graft as one mapping: (name, position) -> (new bits, old bits)."""

    id: str
    entries: Mapping[tuple[str, int], tuple[int, int]]


def make_graft(base: Mapping[str, torch.Tensor], seed: int) -> Graft:
    """A quarter of every tensor's places, some of which many grafts share; some change nothing."""
    rng = np.random.default_rng(seed)
    entries = {}
    for name, tensor in base.items():
        if rng.random() < 0.2:
            continue
        held = tensor.reshape(-1)
        popular = rng.random(len(held)) < np.where(np.arange(len(held)) % 5 == 0, 0.6, 0.15)
        where = torch.from_numpy(np.flatnonzero(popular))
        step = torch.from_numpy(rng.normal(0, 0.02, len(where)) * (rng.random(len(where)) < 0.9))
        new = (held[where].double() + step).to(tensor.dtype)
        entries[name] = Entries(where, new, held[where], tuple(tensor.shape))
    return Graft.from_entries(entries)


def flatten(graft: Graft) -> Flat:
    found = {}
    for name in graft.names:
        part = graft[name]
        for at, new, old in zip(
            part.indices.tolist(), bits(part.new).tolist(), bits(part.old).tolist(), strict=True
        ):
            found[name, at] = (new, old)
    return Flat(graft.id, found)


def expected(
    base: Mapping[str, torch.Tensor],
    kinds: Mapping[str, DType],
    live: list[Flat],
    weights: list[float],
    policy: str,
) -> dict[str, np.ndarray]:
    """f(base, set, policy), an entry at a time."""
    out = {name: bits(tensor) for name, tensor in base.items()}
    order = sorted(range(len(live)), key=lambda i: live[i].id)
    cover: dict[tuple[str, int], list[int]] = {}
    for i in order:
        for place in live[i].entries:
            cover.setdefault(place, []).append(i)
    for (name, at), covering in cover.items():
        pairs = [live[i].entries[name, at] for i in covering]
        scales = [weights[i] for i in covering]
        old = pairs[0][1]
        if len(pairs) == 1 or policy == "refuse":
            value = resolve_one(pairs[0][0], old, scales[0], kinds[name])
        else:
            new = [pair[0] for pair in pairs]
            value = resolve(new, old, scales, covering, policy, kinds[name])
        assert value is not None
        out[name][at] = value
    return out


def conflicting(live: list[Flat], weights: list[float], kinds: Mapping[str, DType]) -> bool:
    """Whether `refuse` has to refuse."""
    seen: dict[tuple[str, int], int | None] = {}
    for flat, weight in zip(live, weights, strict=True):
        for (name, at), (new, old) in flat.entries.items():
            value = resolve_one(new, old, weight, kinds[name])
            if seen.setdefault((name, at), value) != value:
                return True
    return False


def holds_bits(model: nn.Module, wanted: Mapping[str, np.ndarray]) -> bool:
    held = contents(model)
    return all(np.array_equal(bits(held[name]), wanted[name]) for name in wanted)


def test_random_walk() -> None:
    model = Walker()
    whole = contents(model)
    base = {name: tensor for name, tensor in whole.items() if name != "head.weight"}
    kinds = {
        name: next(d for d in DTYPES.values() if d.torch == tensor.dtype)
        for name, tensor in base.items()
    }
    rng = np.random.default_rng(11)
    grafts = [make_graft(base, seed) for seed in range(2 * SKILLS)]
    flats = [flatten(graft) for graft in grafts]
    host = attach(model)
    loaded = {f"s{i}": i for i in range(SKILLS)}
    for name, i in loaded.items():
        host.load(grafts[i], name=name)

    live: tuple[list[str], list[float], str] = ([], [], "refuse")
    refused = 0
    for step in range(STEPS):
        kind = rng.choice(["one", "set", "set", "set", "none", "reload"])
        if kind == "reload":
            idle = sorted(set(loaded) - set(live[0]))
            name = str(rng.choice(idle))
            loaded[name] = int(rng.integers(len(grafts)))
            if rng.random() < 0.5:
                host.unload(name)
                host.load(grafts[loaded[name]], name=name)
            else:
                host.load(grafts[loaded[name]], name=name, replace=True)
        elif kind == "none":
            host.deactivate()
            live = ([], [], "refuse")
        else:
            size = 1 if kind == "one" else int(rng.integers(2, 6))
            names = [str(name) for name in rng.choice(sorted(loaded), size, replace=False)]
            weights = [float(w) for w in rng.choice([1.0, 1.0, 0.5, -0.75, 2.0], size)]
            policy = str(rng.choice(["refuse", "priority", "sum", "mean", "sign"]))
            chosen = [flats[loaded[name]] for name in names]
            if policy == "refuse" and conflicting(chosen, weights, kinds):
                refused += 1
                with pytest.raises(OverlapError):
                    host.activate(*names, weights=weights)
            else:
                host.activate(*names, policy=policy, weights=weights)
                live = (names, weights, policy)
        active, weights, policy = live
        assert host.active == tuple(active)
        wanted = expected(base, kinds, [flats[loaded[n]] for n in active], weights, policy)
        assert holds_bits(model, wanted), (step, live)
        if step % 50 == 0:
            host.verify()
    assert refused > 20
    host.deactivate()
    assert factories.same_bits(contents(model), whole)
