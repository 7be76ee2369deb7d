"""What a search is asked, what it tells meanwhile, and what every method of searching is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from hotgraft.batches import Loss
from hotgraft.errors import DataError
from hotgraft.search.candidates import Candidates


class Step(NamedTuple):
    """Where a search is."""

    step: int
    steps: int
    kept: int
    """Entries of the budget."""
    loss: float
    """Of the step's batches, with the gates as they were."""
    recovery: float | None
    """The part of the loss's fall from the base to all candidates that the gates keep, smoothed;
    None where the method has not measured these, or all candidates do not lower the loss."""


Progress = Callable[[Step], None]


class Search(NamedTuple):
    """What a method is asked."""

    loss: Loss
    data: Iterable[Any]
    budget: int
    """Entries that the graft may have."""
    seed: int
    checkpoint: str | os.PathLike[str] | None
    progress: Progress


class Method(Protocol):
    """A way to rank candidates. Frozen dataclasses with the hyper-parameters as fields.

    One that saves its state to `Search.checkpoint` says so with a true attribute `resumable`.
    """

    name: ClassVar[str]

    def pool(self, count: int, eligible: int, base_nbytes: int) -> int:
        """How many candidates it wants, of the largest changes.

        Args:
            count: the budget.
            eligible: elements in scope.
            base_nbytes: bytes of the base's parameters.
        """
        ...

    def rank(self, candidates: Candidates, search: Search) -> torch.Tensor:
        """Scores, fp32 or fp64 `[candidates.count]`: the highest are kept,
        of equal ones those of the larger |change|.

        Raises:
            DataError, NonFiniteError: the data or the loss cannot be used.
        """
        ...


def require_positive(**counts: int) -> None:
    """Raises `DataError`, naming it, for a hyper-parameter that must be at least 1."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise DataError(f"{name} {count!r}: wanted a whole number of at least 1")


PER_CANDIDATE = 56
"""Bytes: position and values of the graft (12), slopes, scores, gates and soft values (16), and
what one expression and the allocator hold on the way (28)."""


def largest_affordable(count: int, eligible: int, base_nbytes: int) -> int:
    """A pool of a hundred times the budget, but in a quarter of the base's memory.

    Twice the budget in any case, for there must be something to choose from: so a budget of more
    than `base_nbytes / 448` entries (1/112 of an fp32 model) takes more than that quarter.
    """
    affordable = base_nbytes // 4 // PER_CANDIDATE
    return min(eligible, max(2 * count, min(100 * count, affordable)))
