"""The relaxation of Panigrahi et al. (2023), with its published hyper-parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hotgraft.batches import endless
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
    kept, as many as the budget has. The step has to be tuned for each model and scale of the loss.
    (In the paper's run a full pass is 128 batches of 8, and the S is kept whose rounded graft
    scores best on held-out texts; that choice is the caller's.)
    """

    steps: int = 10
    rate: float = 1e7
    bias: float = 10.0
    batches: int = 128
    name: ClassVar[str] = "panigrahi"

    def __post_init__(self) -> None:
        require_positive(steps=self.steps, batches=self.batches)

    def pool(self, count: int, eligible: int, base_nbytes: int) -> int:  # noqa: ARG002 - a Method
        return eligible

    def rank(self, candidates: Candidates, search: Search) -> torch.Tensor:
        generator = torch.Generator().manual_seed(search.seed)
        scores = torch.rand(candidates.count, generator=generator)
        inside = torch.from_numpy(largest(candidates.changes().abs(), search.budget))
        sign = torch.where(inside, -1.0, 1.0)  # 1 - 2 b
        batches = endless(search.data, self.steps * self.batches, seed=search.seed)
        for step in range(1, self.steps + 1):
            slopes = torch.zeros(candidates.count)
            loss = 0.0
            candidates.write(self._gates(scores, inside, sign))
            for batch in range(1, self.batches + 1):
                place = f"step {step} of {self.steps}, batch {batch} of {self.batches}"
                loss += candidates.differentiate(search.loss, next(batches), place)
                slopes += candidates.slopes
            open_ = torch.sigmoid(scores - self.bias)
            scores -= self.rate * slopes / self.batches * sign * open_ * (1 - open_)
            gates = self._gates(scores, inside, sign)
            kept = int((gates > 0.5).sum())
            search.progress(Step(step, self.steps, kept, loss / self.batches, None))
        return gates

    def _gates(
        self, scores: torch.Tensor, inside: torch.Tensor, sign: torch.Tensor
    ) -> torch.Tensor:
        return inside + sign * torch.sigmoid(scores - self.bias)
