"""The learned mask: gates whose sum is the budget at every step."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from hotgraft.batches import endless
from hotgraft.errors import DataError, FormatError
from hotgraft.files import replacing
from hotgraft.format import creator
from hotgraft.search.candidates import Candidates
from hotgraft.search.method import Search, Step, largest_affordable, require_positive

PROBES = 4
"""Batches on which the loss of the base and that of all candidates are measured."""
SMOOTH = 0.9
"""Of the averages that the progress shows and the slopes are scaled with."""
CLIP = 6.0
"""The largest slope that counts, in units of their root mean square."""
FALL = 0.8
"""By which part the rate falls from the first step to the last."""
SAME = 1e-3
"""By which part a loss may differ, on another number of threads, and still count as the same."""
SAVE_EVERY = 25
"""Steps between two checkpoints."""


@dataclass(frozen=True)
class Learned:
    """Entropic mirror descent on the gates, over the polytope {0 <= g <= 1, sum g = budget}.

    Each candidate has a score s, and its gate is g = sigmoid(s - t), with the threshold t that
    makes the gates' sum the budget. A step reads one batch at the soft weights
    base + g x change and does

        s <- s - rate x slope / scale,   slope = dL/dg,

    where scale is the running root mean square of the candidates' slopes, a slope of more than six
    times it counts as six times (one batch is no evidence for more), and the rate falls linearly
    towards a fifth. The slope is taken with respect to the gate and not to the score: the entropy
    of a gate is the mirror map, so no factor sigmoid' stalls what is almost in or out, which is
    what makes the paper's step hard to tune; and dividing by the scale makes it the same for every
    model and loss. Scores grow as evidence gathers, so the gates harden by themselves. What is kept
    in the end are the highest scores.

    The scores start from the magnitude base: s = prior x log |change|.

    Memory beyond the model and a batch's activations: 56 bytes a candidate, and the dense gradient
    of one tensor at a time. The pool is a hundred times the budget, as far as a quarter of the
    base's memory goes; but at least twice the budget, for there must be something to choose from,
    so budgets above some hundredth of the model take more: 112 bytes an entry. Time: a training
    step's for each step, less the optimiser's.

    Args:
        steps: one batch each.
        rate, prior: as above, the rate being that of the first step.
    """

    steps: int = 200
    rate: float = 0.8
    prior: float = 0.5
    name: ClassVar[str] = "learned"
    resumable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_positive(steps=self.steps)
        for name, number in (("rate", self.rate), ("prior", self.prior)):
            if not (math.isfinite(number) and number >= 0):
                raise DataError(f"{name} {number}: wanted a finite number of at least 0")

    def pool(self, count: int, eligible: int, base_nbytes: int) -> int:
        return largest_affordable(count, eligible, base_nbytes)

    def rank(self, candidates: Candidates, search: Search) -> torch.Tensor:
        run = _Run(self, candidates, search)
        batches = endless(search.data, self.steps, seed=search.seed)
        for batch in itertools.islice(batches, run.step, self.steps):
            run.advance(batch)
            last = run.step == self.steps
            if search.checkpoint is not None and (last or run.step % SAVE_EVERY == 0):
                run.save(search.checkpoint)
        return run.scores


class _Run:
    """A search between two of its steps."""

    def __init__(self, method: Learned, candidates: Candidates, search: Search) -> None:
        self._method, self._candidates, self._search = method, candidates, search
        self.step = 0
        self._threshold = 0.0
        self._square = 0.0  # running mean of the squared slopes
        self._loss = 0.0  # running mean of the loss
        self._ends: tuple[float, float] | None = None  # the loss of the base and of all candidates
        self._gates = torch.empty(candidates.count)
        path = None if search.checkpoint is None else Path(search.checkpoint)
        if path is not None and not path.parent.is_dir():
            raise DataError(f"{path}: there is no folder {str(path.parent)!r}; make it first")
        if not isinstance(search.data, Iterator):  # which could not be read again
            self._ends = self._probe(0.0), self._probe(1.0)
        if path is not None and path.exists():
            self._load(path)
            return
        tiny = torch.finfo(torch.float32).tiny
        self.scores = candidates.changes().abs_().clamp_(min=tiny).log_().mul_(method.prior)
        if path is not None:
            self.save(path)  # at once: that it cannot be written is better known now

    def _probe(self, gate: float) -> float:
        """The loss with all gates alike."""
        self._candidates.write(self._gates.fill_(gate))
        batches = endless(self._search.data, PROBES, seed=self._search.seed)
        loss = self._search.loss
        return sum(
            self._candidates.measure(loss, batch, f"batch {i} before the first step") / PROBES
            for i, batch in enumerate(itertools.islice(batches, PROBES), 1)
        )

    def advance(self, batch: Any) -> None:
        """One step."""
        method, candidates, search = self._method, self._candidates, self._search
        self.step += 1
        self._open()
        candidates.write(self._gates)
        place = f"step {self.step} of {method.steps}"
        loss = candidates.differentiate(search.loss, batch, place)
        slopes = candidates.slopes
        largest = float(torch.linalg.vector_norm(slopes, math.inf))
        if largest > 0:
            slopes /= largest  # so that squares neither vanish nor overflow
        root = largest * float(torch.linalg.vector_norm(slopes)) / len(slopes) ** 0.5
        self._square += (1 - _weight(self.step)) * (root * root - self._square)
        self._loss += (1 - _weight(self.step)) * (loss - self._loss)
        if self._square > 0 and largest > 0:
            rate = method.rate * (1 - FALL * (self.step - 1) / method.steps)
            unit = self._square**0.5 / largest
            self.scores.sub_(slopes.clamp_(-CLIP * unit, CLIP * unit), alpha=rate / unit)
        search.progress(Step(self.step, method.steps, search.budget, self._loss, self._recovery()))

    def _open(self) -> None:
        """Gates of sigmoid(scores - threshold), whose sum the threshold makes the budget."""
        gates, count = self._gates, self._search.budget
        if count == len(gates):
            gates.fill_(1.0)
            return
        low, high = float(self.scores.min()) - 60, float(self.scores.max()) + 60
        at = min(max(self._threshold, low), high)
        exact = max(1e-4 * min(count, len(gates) - count), 1e-6 * count)
        for _ in range(60):  # Newton's steps, in a bracket that is halved where they leave it
            torch.sub(self.scores, at, out=gates).sigmoid_()
            total = float(gates.sum())
            if abs(total - count) < exact:
                break
            low, high = (at, high) if total > count else (low, at)
            slope = total - float(torch.dot(gates, gates))  # the sum of g (1 - g)
            at = at + (total - count) / slope if slope > 0 else low
            if not low < at < high:
                at = (low + high) / 2
        self._threshold = at

    def _recovery(self) -> float | None:
        if self._ends is None or self._ends[0] <= self._ends[1]:
            return None
        return (self._ends[0] - self._loss) / (self._ends[0] - self._ends[1])

    # ---- checkpoints ---------------------------------------------------------------------------

    def _identity(self) -> str:
        """What a checkpoint must be of, to go on from it."""
        search = self._search
        method = {"name": self._method.name, **asdict(self._method)}
        about = {"candidates": self._candidates.graft.id, "budget": search.budget}
        about["creator"] = creator()
        return json.dumps({**about, "seed": search.seed, "method": method}, sort_keys=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Raises `OSError` if the file cannot be written."""
        numbers = [self.step, self._threshold, self._square, self._loss, *(self._ends or ())]
        tensors = {"scores": self.scores, "numbers": torch.tensor(numbers, dtype=torch.float64)}
        with replacing(path) as file:
            file.write(safetensors.torch.save(tensors, {"hotgraft.search": self._identity()}))

    def _load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            FormatError: it is none.
            DataError: it is another search's, as far as can be seen: the loss at both ends is told
                apart, not the data themselves.
        """
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("hotgraft.search")
                self.scores, numbers = file.get_tensor("scores"), file.get_tensor("numbers")
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: not a checkpoint of a search: {error}") from error
        if found != self._identity():
            raise DataError(
                f"{path} is the checkpoint of another search: found {found}, wanted "
                f"{self._identity()}; name another file, or remove this one to start anew"
            )
        values = numbers.double().flatten().tolist()
        steps = self._method.steps
        if (
            (self.scores.dtype, self.scores.shape) != (torch.float32, (self._candidates.count,))
            or not torch.isfinite(self.scores).all()
            or len(values) not in (4, 6)
            or not all(map(math.isfinite, values))
            or values[0] not in range(steps + 1)
        ):
            raise FormatError(
                f"{path}: a damaged checkpoint: wanted {self._candidates.count} finite fp32 scores "
                f"and a step of at most {steps}; remove it to start anew"
            )
        step, self._threshold, self._square, self._loss, *ends = values
        self.step = int(step)
        if self._ends is not None and ends:
            for now, then in zip(self._ends, ends, strict=True):
                if abs(now - then) > SAME * (abs(now) + abs(then)):
                    raise DataError(
                        f"{path} is the checkpoint of another search: the loss of the base and of "
                        f"all candidates was {ends[0]:g} and {ends[1]:g}, now it is "
                        f"{self._ends[0]:g} and {self._ends[1]:g}. Give the loss and data that it "
                        "began with, or name another file"
                    )


def _weight(step: int) -> float:
    """What an average keeps of its past: it is a plain mean at first."""
    return min(SMOOTH, 1 - 1 / step)
