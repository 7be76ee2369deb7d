"""Small models, data and plain dense judges for the tests of searching."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import factories
import torch
from hosts import State, contents, holds
from hotgraft import Graft, diff
from hotgraft.batches import Loss
from hotgraft.search import (
    FirstOrder,
    Fisher,
    Learned,
    Method,
    Movement,
    Panigrahi,
    Search,
    Snip,
    Step,
)
from torch import nn

Batch = tuple[torch.Tensor, torch.Tensor]

QUICK: Mapping[str, str | Method] = {
    "magnitude": "magnitude",
    "random": "random",
    "first_order": FirstOrder(steps=3),
    "fisher": Fisher(steps=3),
    "snip": Snip(steps=3),
    "movement": Movement(steps=9),
    "panigrahi": Panigrahi(steps=2, batches=2, rate=1e4),
    "learned": Learned(steps=4),
}
"""Every method, few steps of each."""
SEARCHES = {name: method for name, method in QUICK.items() if not isinstance(method, str)}


class Net(nn.Module):
    """Two blocks and a head, 6 to 3 numbers."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 8), nn.Linear(8, 6)])
        self.head = nn.Linear(6, 3)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator).mul_(0.4)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x.to(layer.weight.dtype)))
        out: torch.Tensor = self.head(x.to(self.head.weight.dtype))
        return out


def loss(model: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> torch.Tensor:
    """Mean squared error, in fp32."""
    return (model(batch[0]).float() - batch[1]).square().mean()


def batches(count: int = 4, seed: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(5, 6, generator=generator), torch.randn(5, 3, generator=generator))
        for _ in range(count)
    ]


def nudged(base: Mapping[str, torch.Tensor], share: float = 0.7, seed: int = 1) -> State:
    """A fine-tuned state dict: a share of every floating tensor's entries moved by up to 0.4."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for name, tensor in base.items():
        move = torch.rand(tensor.shape, generator=generator).mul_(0.8).sub_(0.4)
        keep = torch.rand(tensor.shape, generator=generator) < share
        moved = (tensor.float() + move * keep).to(tensor.dtype)
        out[name] = moved if tensor.is_floating_point() else tensor.clone()
    return out


def tuned_for(model: nn.Module) -> State:
    """A fine-tuned state of a model; tied tensors stay equal."""
    base, tuned = contents(model), {}
    moved = nudged(base)
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = seen.setdefault(tensor.data_ptr(), name)
        tuned[name] = moved[first].clone()
    return tuned


class Snapshot(NamedTuple):
    """All that a search must leave as it was."""

    state: State
    flags: list[bool]
    gradients: list[torch.Tensor | None]
    modes: list[bool]
    versions: list[int]


def snapshot(model: nn.Module) -> Snapshot:
    every = list(model.parameters())
    return Snapshot(
        contents(model),
        [p.requires_grad for p in every],
        [p.grad for p in every],
        [module.training for module in model.modules()],
        [p._version for p in every],
    )


def is_as_before(model: nn.Module, before: Snapshot) -> bool:
    """Bits, flags, the very gradients, modes; and no hook is left."""
    now = snapshot(model)
    same = all(a is b for a, b in zip(now.gradients, before.gradients, strict=True))
    hooks = [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    return (
        holds(model, before.state)
        and (now.flags, now.modes) == (before.flags, before.modes)
        and same
        and not hooks
    )


def ask(loss: Loss, data: Any, budget: int, seed: int = 0, **how: Any) -> Search:
    """What a method's `rank` is given."""
    return Search(loss, data, budget, seed, how.get("checkpoint"), how.get("progress", ignore))


def ignore(_step: Step) -> None:
    """No progress."""


# ---- the judge: dense, plain ---------------------------------------------------------------------


def dense_gradients(model: nn.Module, state: State, loss: Loss, batch: Any) -> State:
    """dL/dtheta of every tensor at these weights, by the first of its names."""
    judge = copy.deepcopy(model).eval().requires_grad_(True)
    judge.load_state_dict(state)
    judge.zero_grad()
    loss(judge, batch).backward()
    first: dict[int, str] = {}
    found: State = {}
    mine = model.named_parameters(remove_duplicate=False)
    for (name, p), (_, held) in zip(
        mine, judge.named_parameters(remove_duplicate=False), strict=True
    ):
        gradient = torch.zeros_like(held) if held.grad is None else held.grad.to_dense()
        home = first.setdefault(p.data_ptr(), name)
        if home not in found:
            found[home] = gradient
        elif found[home] is not gradient:  # a parameter of its own on the same memory
            found[home] = found[home] + gradient
    return found


def wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def gathered(graft: Graft, dense: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What dense tensors hold at a graft's entries: dtype after dtype, in the order of its rows."""
    parts = []
    for dtype in graft.groups:
        for row in graft.rows:
            if row.dtype == dtype:
                parts.append(wide(dense[row.name]).reshape(-1)[graft[row.name].indices].float())
    return torch.cat(parts)


def changes(graft: Graft) -> torch.Tensor:
    """Fine-tuned minus base, from the graft's entries."""
    parts = []
    for dtype in graft.groups:
        for row in (r for r in graft.rows if r.dtype == dtype):
            entries = graft[row.name]
            parts.append((wide(entries.new) - wide(entries.old)).float())
    return torch.cat(parts)


def dense_slopes(
    model: nn.Module, base: State, tuned: State, at: State, loss: Loss, batch: Any
) -> State:
    """dL/dtheta x (fine-tuned - base), at these weights."""
    gradients = dense_gradients(model, at, loss, batch)
    return {n: wide(g) * (wide(tuned[n]) - wide(base[n])) for n, g in gradients.items()}


def between(base: State, tuned: State, gates: Mapping[str, torch.Tensor]) -> State:
    """base + gate x change, in fp32 or fp64, rounded to each tensor's type."""
    out = {name: tensor.clone() for name, tensor in base.items()}
    for name, gate in gates.items():
        low, high = wide(base[name]), wide(tuned[name])
        out[name] = torch.lerp(low, high, gate.to(low.dtype)).to(base[name].dtype)
    return out


def highest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Which are the k highest, the first of equals, by sorting pairs in Python."""
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    out = torch.zeros(len(scores), dtype=torch.bool)
    out[order[:k]] = True
    return out


def kept(graft: Graft, pool: Graft) -> torch.Tensor:
    """Which of a pool's entries a graft has, as `gathered` orders them."""
    marks = {}
    for name, shape in pool.shapes.items():
        marks[name] = torch.zeros(shape)
        if name in graft.names:
            marks[name].view(-1)[graft[name].indices] = 1
    return gathered(pool, marks).bool()


def pair(**how: Any) -> tuple[Net, State, State, Graft]:
    """A model, its base, the fine-tuned state and all that differs."""
    model = Net(**how)
    base = contents(model)
    tuned = nudged(base)
    return model, base, tuned, diff(base, tuned)


def grafted(base: State, graft: Graft) -> State:
    return factories.grafted(base, graft)
