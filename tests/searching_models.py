"""Models that store, share and use their weights in every way that a search must know."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from searching import Net
from torch import nn
from torch.utils.checkpoint import checkpoint


class Turned(Net):
    """Weights that are transposed (as GPT-2's Conv1D has them), strided, and in one piece."""

    def __init__(self) -> None:
        super().__init__()
        first, second = (layer.weight.detach() for layer in self.layers)
        self.layers[0].weight = nn.Parameter(first.t().contiguous().t())
        room = torch.full((12, 16), 7.0)
        room[::2, ::2] = second
        self.room = room
        self.layers[1].weight = nn.Parameter(room[::2, ::2])


class Conv1D(Net):
    """Weights stored as inputs x outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].weight = nn.Parameter(self.layers[0].weight.detach().t().contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.layers
        x = torch.tanh(torch.addmm(first.bias, x, first.weight))
        return self.head(torch.tanh(second(x)))


class Mixed(Net):
    """Every float type at once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].to(torch.bfloat16)
        self.layers[1].to(torch.float64)
        self.head.to(torch.float16)


class Tied(Net):
    """One square weight in two layers; by one parameter, or by two on the same memory."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        for p in self.layers.parameters():
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
        shared = self.layers[0].weight
        self.layers[1].weight = shared if parameters == 1 else nn.Parameter(shared.detach())


class Checkpointed(Net):
    """The second block is computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layers[0](x))
        x = torch.tanh(checkpoint(self.layers[1], x, use_reentrant=self.reentrant))
        return self.head(x)


class Experts(Net):
    """One of two experts sees a text, and another nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([copy.deepcopy(self.layers[1]) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layers[0](x))
        chosen = (x.sum(-1) > 0).long()
        out = torch.stack([self.experts[int(i)](row) for row, i in zip(x, chosen, strict=True)])
        return self.head(torch.tanh(out))


class Spoken(nn.Module):
    """Words, looked up with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4, sparse=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fp32": Net,
    "bf16": lambda: Net(torch.bfloat16),
    "fp16": lambda: Net(torch.float16),
    "fp64": lambda: Net(torch.float64),
    "mixed": Mixed,
    "turned": Turned,
    "conv1d": Conv1D,
    "tied": lambda: Tied(1),
    "tied parameters": lambda: Tied(2),
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
    "experts": Experts,
    "a deep copy": lambda: copy.deepcopy(Turned()),
}
