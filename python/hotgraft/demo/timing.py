"""Medians of activate, switch and deactivate: hotgraft, plain torch, loading a checkpoint."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hotgraft.graft import Graft
from hotgraft.host import Host

CYCLES = 50
LOADS = 5


class Times(NamedTuple):
    """Medians in seconds; None for what cannot be had that way."""

    activate: float | None
    switch: float | None
    deactivate: float | None


class PlainTorch:
    """What one would write without hotgraft: per tensor, save by `index_select`, `index_copy_`.

    The model is copied, so that another's host does not see the writes. Indices and values are
    prepared beforehand.

    Example: `PlainTorch(model, {"sql": graft}).activate("sql")`.
    """

    def __init__(self, model: nn.Module, grafts: dict[str, Graft]) -> None:
        self.model = copy.deepcopy(model)
        flat = {name: p.detach().view(-1) for name, p in self.model.named_parameters()}
        self._prepared: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {
            skill: [(flat[name], graft[name].indices, graft[name].new) for name in graft.names]
            for skill, graft in grafts.items()
        }
        self._saved: list[tuple[Tensor, Tensor, Tensor]] = []

    def activate(self, skill: str) -> None:
        """Write a skill's values; what was live goes out first."""
        self.deactivate()
        for weights, indices, new in self._prepared[skill]:
            self._saved.append((weights, indices, weights.index_select(0, indices)))
            weights.index_copy_(0, indices, new)

    def deactivate(self) -> None:
        """Put back what was there."""
        for weights, indices, old in self._saved:
            weights.index_copy_(0, indices, old)
        self._saved.clear()


def of_swaps(subject: Host | PlainTorch, first: str, second: str) -> Times:
    """Time first in, first out and second in, second out; the subject holds the base after it.

    Example: `of_swaps(host, "section", "kind").switch`.
    """
    actions: tuple[Callable[[], None], ...] = (
        lambda: subject.activate(first),
        lambda: subject.activate(second),
        subject.deactivate,
    )
    samples = [[_seconds(action) for action in actions] for _ in range(CYCLES + 1)]
    return Times(*(statistics.median(column) for column in zip(*samples[1:], strict=True)))


def of_loading(model: nn.Module, checkpoint: Path) -> Times:
    """Time reading a full checkpoint of this model into a copy of it: what a switch costs then.

    The file is in the page cache after the first time, which is not counted.
    """
    target = copy.deepcopy(model)

    def load() -> None:
        target.load_state_dict(load_file(checkpoint), strict=False)

    samples = [_seconds(load) for _ in range(LOADS + 1)]
    return Times(None, statistics.median(samples[1:]), None)


def _seconds(action: Callable[[], object]) -> float:
    with torch.no_grad():
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin
