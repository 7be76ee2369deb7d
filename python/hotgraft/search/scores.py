"""Scores from gradients at points that do not move: sums over batches, one pass over the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hotgraft.batches import endless
from hotgraft.errors import DataError
from hotgraft.search.candidates import Candidates
from hotgraft.search.method import Search, Step, largest_affordable, require_positive

Slopes = torch.Tensor
"""fp32 `[count]`: of a batch's loss with respect to the gates, (dL/dtheta)(finetuned - base)."""


@dataclass(frozen=True)
class _Score:
    """A sum over `steps` batches of some function of the gates' slopes.

    Between `points` points of the straight line from the base to all candidates the batches take
    turns; one point is the base itself.
    """

    steps: int = 64
    name: ClassVar[str]
    points: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_positive(steps=self.steps)

    def add(self, total: torch.Tensor, slopes: Slopes) -> torch.Tensor:
        """The sum, with a batch's part."""
        return total.add_(slopes)

    def score(self, total: torch.Tensor) -> torch.Tensor:
        """The score, from the sum."""
        return -total

    def pool(self, count: int, eligible: int, base_nbytes: int) -> int:
        return largest_affordable(count, eligible, base_nbytes)

    def rank(self, candidates: Candidates, search: Search) -> torch.Tensor:
        batches = endless(search.data, self.steps, seed=search.seed)
        total = torch.zeros(candidates.count)
        for step in range(1, self.steps + 1):
            if self.points > 1:
                at = (step % self.points + 0.5) / self.points
                candidates.write(torch.full((candidates.count,), at))
            place = f"step {step} of {self.steps}"
            loss = candidates.differentiate(search.loss, next(batches), place)
            total = self.add(total, candidates.slopes)
            search.progress(Step(step, self.steps, search.budget, loss, None))
        if not total.any():
            raise DataError(
                f"the loss does not change with any candidate, over {self.steps} batches, so "
                f"{self.name!r} cannot choose between them: is the loss multiplied by zero, or so "
                "small that its gradient vanishes? 'magnitude' needs no loss"
            )
        return self.score(total)


@dataclass(frozen=True)
class FirstOrder(_Score):
    """The fall of the loss to first order, -(dL/dtheta)(finetuned - base) at the base."""

    name = "first_order"


@dataclass(frozen=True)
class Snip(_Score):
    """SNIP (Lee et al. 2019): the same without its sign, |(dL/dtheta)(finetuned - base)|.

    SNIP asks how much a connection matters, dL/dg of a gate g that multiplies the weight; here the
    gate multiplies the change.
    """

    name = "snip"

    def score(self, total: torch.Tensor) -> torch.Tensor:
        return total.abs()


@dataclass(frozen=True)
class Fisher(_Score):
    """The empirical Fisher information in the change's direction, E[(dL/dtheta)^2] (change)^2.

    FISH masks (Sung et al. 2021) keep the largest E[(dL/dtheta)^2] of weights to be trained; where
    the values are given already, an entry matters by how far it goes. A batch counts as one
    example: with batches of one text it is the Fisher information of the texts.
    """

    name = "fisher"

    def add(self, total: torch.Tensor, slopes: Slopes) -> torch.Tensor:
        # The root of the sum ranks alike, and neither overflows nor vanishes where squares would.
        return torch.hypot(total, slopes, out=total)

    def score(self, total: torch.Tensor) -> torch.Tensor:
        return total


@dataclass(frozen=True)
class Movement(_Score):
    """The loss's fall along the way, an entry's part of it: first order at eight points.

    Movement pruning (Sanh et al. 2020) sums -(dL/dtheta)(theta's step) over a training run. The run
    is over here, so its path is taken to be straight.
    """

    name = "movement"
    points = 8
