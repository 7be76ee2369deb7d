"""The relaxation of Panigrahi et al. (2023), with its published hyper-parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from hotgraft.batches import endless
from hotgraft.errors import DataError, NonFiniteError
from hotgraft.search.candidates import Candidates
from hotgraft.search.choice import largest
from hotgraft.search.method import Search, Step, require_positive


@dataclass(frozen=True)
class Panigrahi:
    """Gates that leave a base mask through a sigmoid, by plain gradient descent.

    With the base mask b (the budget's largest changes) and real S, the gates are
    b + (1 - 2 b) sigmoid(S - bias), S starts uniform in [0, 1], and a step is
    S <- S - rate x mean(dL/dg) (1 - 2 b) sigmoid'(S - bias), the mean over `batches` batches, at
    the soft weights. Every differing entry in scope is a candidate.

    Nothing in it holds the number of gates above 1/2. The paper rounds; here the highest gates are
    kept, as many as the budget has, ordered by their logits: with the published rate many a gate is
    1 in fp32, and there they still differ. The step has to be tuned for each model and scale of the
    loss. (In the paper's run a full pass is 128 batches of 8, and the S is kept whose rounded graft
    scores best on held-out texts; that choice is the caller's.)

    It is there for comparison, on small models: with every differing entry a candidate, at about 60
    bytes each, it needs some 15 times the memory of an fp32 scope.

    Args:
        steps: of `batches` batches each.
        rate, bias: as above.
    """

    steps: int = 10
    rate: float = 1e7
    bias: float = 10.0
    batches: int = 128
    name: ClassVar[str] = "panigrahi"

    def __post_init__(self) -> None:
        require_positive(steps=self.steps, batches=self.batches)
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise DataError(f"rate {self.rate}: wanted a finite number of at least 0")
        if not math.isfinite(self.bias):
            raise DataError(f"bias {self.bias}: wanted a finite number")

    def pool(self, count: int, eligible: int, base_nbytes: int) -> int:  # noqa: ARG002 - a Method
        return eligible

    def rank(self, candidates: Candidates, search: Search) -> torch.Tensor:
        generator = torch.Generator().manual_seed(search.seed)
        scores = torch.rand(candidates.count, generator=generator)
        inside = torch.from_numpy(largest(candidates.changes().abs(), search.budget))
        batches = endless(search.data, self.steps * self.batches, seed=search.seed)
        for step in range(1, self.steps + 1):
            slopes = torch.zeros(candidates.count)
            loss = 0.0
            candidates.write(torch.sigmoid(logits(scores, inside, self.bias)))
            for batch in range(1, self.batches + 1):
                place = f"step {step} of {self.steps}, batch {batch} of {self.batches}"
                loss += candidates.differentiate(search.loss, next(batches), place)
                slopes.add_(candidates.slopes, alpha=1 / self.batches)
            open_ = scores - self.bias
            slopes *= torch.sigmoid(open_) * torch.sigmoid(-open_)  # 1 - sigmoid, to every digit
            scores += torch.where(inside, slopes, -slopes).mul_(self.rate)
            found = int(torch.isfinite(scores).sum())
            if found < candidates.count:
                raise NonFiniteError(
                    f"step {step} of {self.steps} makes {candidates.count - found} of "
                    f"{candidates.count} S infinite or a NaN: take a smaller rate than "
                    f"{self.rate:g}, or scale the loss down"
                )
            kept = int((logits(scores, inside, self.bias) > 0).sum())
            search.progress(Step(step, self.steps, kept, loss / self.batches, None))
        return logits(scores.double(), inside, self.bias)  # in fp32 S - bias would make ties


def logits(scores: torch.Tensor, inside: torch.Tensor, bias: float) -> torch.Tensor:
    """Of the gates b + (1 - 2 b) sigmoid(S - bias): what their sigmoid is.

    Args:
        scores: fp32 or fp64 `[n]`, the S.
        inside: bool `[n]`, the b.

    Example:
        >>> logits(torch.tensor([3.0, 3.0]), torch.tensor([False, True]), 10.0).tolist()
        [-7.0, 7.0]
    """
    open_ = scores - bias
    return torch.where(inside, -open_, open_)
