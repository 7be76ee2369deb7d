"""Models and helpers for the tests of live hosts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import factories
import torch
from hotgraft import Entries, Graft, Host, attach
from torch import nn

State = dict[str, torch.Tensor]


def contents(model: nn.Module) -> State:
    """A copy on the CPU of everything the model's state dict holds now."""
    return {name: tensor.detach().clone().cpu() for name, tensor in model.state_dict().items()}


def holds(model: nn.Module, wanted: Mapping[str, torch.Tensor]) -> bool:
    """Whether the model holds exactly these bits."""
    return factories.same_bits(contents(model), dict(wanted))


def versions(model: nn.Module) -> dict[str, int]:
    """The version counter of every parameter and buffer."""
    return {name: t._version for name, t in model.state_dict(keep_vars=True).items()}


class Mixed(nn.Module):
    """bf16 and fp32 parameters and an integer buffer; small enough for the reference backend."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 4)
        self.register_buffer("step", torch.zeros(3, dtype=torch.int64))
        self.second.to(torch.bfloat16)
        for i, tensor in enumerate(self.state_dict(keep_vars=True).values()):
            fresh = factories.tensor(
                {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}[tensor.dtype],
                tuple(tensor.shape),
                seed + i,
            )
            tensor.data.copy_(fresh)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x).to(torch.bfloat16))
        return out


class Small(nn.Module):
    """Can be copied and pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, *, twice: bool = False) -> torch.Tensor:
        """Say it once or twice."""
        out: torch.Tensor = self.layer(x) * (2 if twice else 1)
        return out


class Workshop:
    """A host on a model, its base, and grafts `a` and `b` that overlap."""

    def __init__(
        self, backend: str | None = None, base_id: str | None = None, device: str = "cpu"
    ) -> None:
        self.model = Mixed().to(device)
        self.base = contents(self.model)
        self.a = factories.graft_on(self.base, seed=1, share=0.4)
        self.b = factories.graft_on(self.base, seed=2, share=0.4)
        self.host: Host = attach(self.model, backend=backend, base_id=base_id)
        self.host.load(self.a, name="a")
        self.host.load(self.b, name="b")
        self.with_a = factories.grafted(self.base, self.a)
        self.with_b = factories.grafted(self.base, self.b)

    def is_base(self) -> bool:
        return holds(self.model, self.base)

    def is_a(self) -> bool:
        return holds(self.model, self.with_a)

    def is_b(self) -> bool:
        return holds(self.model, self.with_b)


def use(host: Host, backend: Any) -> None:
    """Give a host another backend on every device."""
    for device in host._backends:
        host._backends[device] = backend


def single(
    name: str, base: torch.Tensor, at: list[int], new: list[float], old: list[float] | None = None
) -> Graft:
    """A graft on one tensor: positions, new values and (by default the base's) old values."""
    where = torch.tensor(at)
    held = base.detach().reshape(-1)[where]
    return Graft.from_entries(
        {
            name: Entries(
                where,
                torch.tensor(new).to(base.dtype),
                held if old is None else torch.tensor(old).to(base.dtype),
                tuple(base.shape),
            )
        }
    )
