"""evaluate: how well a model tells classes apart and how sure it is of it, with intervals."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple, SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch

from hotgraft.errors import EvaluationError, HotgraftError, NonFiniteError

_Floats = npt.NDArray[np.float64]
_Metric = Callable[..., torch.Tensor]

_BELOW_ONE = math.nextafter(1.0, 0.0)
_LARGEST = 1e300  # a logit's size: their differences are finite in double


class Estimate(NamedTuple):
    """A number and the interval that it is known to."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """What the logits of one model are worth, or how much two models differ in it."""

    accuracy: Estimate
    """The part of the texts whose largest logit (the first of them on a tie) is the label's."""
    f1: Estimate
    """The mean of F1 over the classes that are a label or an answer somewhere."""
    nll: Estimate
    """The mean of -log softmax at the label."""
    brier: Estimate
    """The mean squared distance of softmax from the label's unit vector, in [0, 2]."""
    ece10: Estimate
    """The expected calibration error over 10 bins: the sum over bins of n_m / n |acc_m - conf_m|.

    Confidence is the largest softmax; bins are equally wide and hold their lower edge, the last
    one 1.0 too.
    """
    ece15: Estimate
    """The same over 15 bins."""


@dataclass(frozen=True)
class Evaluation(Scores):
    """Scores of one model and, where others were given, how it stands to them."""

    rel: Estimate | None
    """The part of the gain in accuracy from base to fine-tuned that this model has."""
    agreement: Estimate | None
    """The part of the texts that it answers as the fine-tuned model does, right or wrong."""
    change: Scores | None
    """This model's scores less the fine-tuned model's, on the same texts."""


_SCORES = tuple(field.name for field in fields(Scores))
_BINS = {"ece10": 10, "ece15": 15}
_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def evaluate(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    base: torch.Tensor | None = None,
    finetuned: torch.Tensor | None = None,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Evaluation:
    """Score logits against labels, each score with its bootstrap interval.

    Args:
        logits: float [texts, classes], of any precision and on any device; two classes or more.
        labels: int64 [texts], in [0, classes).
        base, finetuned: the logits of the base and of the fine-tuned model on the same texts. `rel`
            wants both, `agreement` and `change` the second.
        resamples: how often texts are drawn anew, with replacement. A draw is the same for all
            three models, so what compares them is paired.
        confidence: how often an interval shall hold the truth.
        seed: the same one gives the same intervals.

    An interval reaches from quantile to quantile of the resampled scores. Two kinds need more care:

    - `rel` is (accuracy - base's) / (fine-tuned's - base's), after Panigrahi et al. 2023. Where the
      two are equally accurate it is not defined: its value is NaN. A resample in which they are, or
      in which they change places, tells nothing and counts as unbounded on both sides; once such
      resamples fill a tail, the interval is (-inf, inf).
    - A sample's calibration error is too large by what chance adds, and a resample's doubly so. Its
      interval is therefore also reflected about the value, and the two are joined. That is still
      not enough where the true error is near zero: 0.015 over 4,000 texts may be chance alone.

    Raises:
        EvaluationError: shapes, dtypes, labels or options are not as above.
        NonFiniteError: a logit is infinite or NaN.
        HotgraftError: torchmetrics, which F1 and calibration errors come from, is not installed.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.5]])
        >>> found = evaluate(logits, torch.tensor([0, 1, 0, 0]))
        >>> found.accuracy
        Estimate(value=0.75, low=0.25, high=1.0)
    """
    macro_f1, calibration_error = _torchmetrics()
    _check(logits, labels, base, finetuned)
    draws = _whole("resamples", resamples, 1)
    rng = np.random.default_rng(_whole("seed", seed, 0))
    if not isinstance(confidence, SupportsFloat) or not 0 < float(confidence) < 1:
        raise EvaluationError(f"confidence {confidence!r} is not a number in (0, 1)")
    tail = (1 - float(confidence)) / 2

    named = {"logits": logits, "base": base, "finetuned": finetuned}
    models = [_Answers(name, x, labels) for name, x in named.items() if x is not None]
    same = (models[0].answers == models[-1].answers).astype(np.float64)
    scores = np.array([model.measured(macro_f1, calibration_error) for model in models])
    drawn = np.empty((draws, *scores.shape))
    agreed = np.empty(draws)
    texts = len(labels)
    for i in range(draws):
        times = np.bincount(rng.integers(texts, size=texts), minlength=texts).astype(np.float64)
        drawn[i] = [model.resampled(times) for model in models]
        agreed[i] = times @ same / texts

    rel = agreement = change = None
    if finetuned is not None:
        agreement = _between(same.mean(), agreed, tail)
        change = Scores(**_estimates(scores[0] - scores[-1], drawn[:, 0] - drawn[:, -1], tail))
        if base is not None:
            rel = _rel(scores[:, 0], drawn[:, :, 0], tail)
    found = _estimates(scores[0], drawn[:, 0], tail, (0.0, 1.0))
    return Evaluation(**found, rel=rel, agreement=agreement, change=change)


class _Answers:
    """What one model says to each text: all that a score of any resample is made from."""

    def __init__(self, name: str, logits: torch.Tensor, labels: torch.Tensor) -> None:
        # In double on the CPU, whatever comes: no score depends on where its logits were.
        logits, labels = logits.detach().cpu().double(), labels.cpu().long()
        usable = logits.abs() <= _LARGEST  # NaN is not
        if not usable.all():
            text, label = usable.logical_not().nonzero()[0].tolist()
            raise NonFiniteError(
                f"{name}: the logit of text {text} at class {label} is "
                f"{logits[text, label].item()}, and {usable.numel() - int(usable.sum())} of "
                f"{usable.numel()} are no finite number up to {_LARGEST:g}; mend the model, or "
                "mask with a large negative number"
            )
        predicted = logits.argmax(1)
        right = (predicted == labels).double()
        each = torch.arange(len(logits))
        surprise = -logits.log_softmax(1)[each, labels]
        distance = logits.softmax(1)
        sure = distance.max(1).values
        distance[each, labels] -= 1

        self._classes = logits.shape[1]
        self._labels, self.answers = labels.numpy(), predicted.numpy()
        self._right, self._gap = right.numpy(), (sure - right).numpy()
        self._means = torch.stack((right, surprise, distance.square().sum(1)), 1).numpy()
        # torchmetrics keeps a bin of its own for 1.0, which belongs to the last one.
        self._sure = sure.clamp(max=_BELOW_ONE)
        self._bins = [
            torch.bucketize(self._sure, _edges(bins), right=True).sub(1).numpy()
            for bins in _BINS.values()
        ]

    def measured(self, macro_f1: _Metric, calibration_error: _Metric) -> _Floats:
        """The scores, in the order of their fields."""
        answers, labels = torch.from_numpy(self.answers), torch.from_numpy(self._labels)
        f1 = macro_f1(answers, labels, num_classes=self._classes, average="macro").item()
        # Of two classes: whether the model is right is what its confidence claims to foretell.
        right = torch.from_numpy(self._right).long()
        errors = [
            calibration_error(self._sure, right, n_bins=bins, norm="l1").item()
            for bins in _BINS.values()
        ]
        accuracy, nll, brier = self._means.mean(0)
        return np.array([accuracy, f1, nll, brier, *errors])

    def resampled(self, times: _Floats) -> _Floats:
        """The same from sums, which is quick, were text i there `times[i]` times."""
        accuracy, nll, brier = times @ self._means / len(times)
        hits = np.bincount(self._labels, times * self._right, minlength=self._classes)
        seen = np.bincount(self._labels, times, minlength=self._classes)
        seen += np.bincount(self.answers, times, minlength=self._classes)
        f1 = (2 * hits[seen > 0] / seen[seen > 0]).mean()
        gap = times * self._gap / len(times)
        errors = [np.abs(np.bincount(at, gap)).sum() for at in self._bins]
        return np.array([accuracy, f1, nll, brier, *errors])


def _edges(bins: int) -> torch.Tensor:
    return torch.linspace(0, 1, bins + 1, dtype=torch.float64)


def _between(value: float, drawn: _Floats, tail: float) -> Estimate:
    """From quantile to quantile, each of them a value that was drawn."""
    low = np.quantile(drawn, tail, method="lower")
    high = np.quantile(drawn, 1 - tail, method="higher")
    return Estimate(float(value), float(low), float(high))


def _estimates(
    values: _Floats,
    drawn: _Floats,
    tail: float,
    reach: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, Estimate]:
    """An estimate a score; a calibration error's interval is joined with its reflection."""
    found = {}
    for name, value, column in zip(_SCORES, values, drawn.T, strict=True):
        middle, low, high = _between(value, column, tail)
        if name in _BINS:
            low, high = min(low, 2 * middle - high), max(high, 2 * middle - low)
            low, high = max(low, reach[0]), min(high, reach[1])
        found[name] = Estimate(middle, low, high)
    return found


def _rel(accuracies: _Floats, drawn: _Floats, tail: float) -> Estimate:
    """Of (own, base, fine-tuned). See `evaluate` for what is not defined."""
    own, base, finetuned = accuracies
    way, ways = finetuned - base, drawn[:, 2] - drawn[:, 1]
    known = ways * way > 0
    rels = np.full(len(drawn), math.inf)
    np.divide(drawn[:, 0] - drawn[:, 1], ways, out=rels, where=known)
    high = _between(math.nan, rels, tail).high
    rels[~known] = -math.inf
    low = _between(math.nan, rels, tail).low
    return Estimate(float((own - base) / way) if way else math.nan, low, high)


def _torchmetrics() -> tuple[_Metric, _Metric]:
    """Its macro F1 and its calibration error; to import it takes seconds, so not before."""
    try:
        from torchmetrics.functional.classification import (
            binary_calibration_error,
            multiclass_f1_score,
        )
    except ImportError as error:
        raise HotgraftError(
            f'evaluate needs torchmetrics ({error}): pip install "hotgraft[evaluation]"'
        ) from error
    return multiclass_f1_score, binary_calibration_error


def _check(
    logits: torch.Tensor,
    labels: torch.Tensor,
    base: torch.Tensor | None,
    finetuned: torch.Tensor | None,
) -> None:
    """Refuse what has no scores; what the numbers are is looked at later."""
    for name, given in (("logits", logits), ("base", base), ("finetuned", finetuned)):
        if given is None and name != "logits":
            continue
        if not isinstance(given, torch.Tensor) or not given.is_floating_point():
            found = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
            raise EvaluationError(
                f"{name} is {found}; give a tensor of floats [texts, classes], not yet softmaxed"
            )
        _check_values(name, given)
        shape = list(given.shape)
        if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
            raise EvaluationError(
                f"{name} has shape {shape}; [texts, classes] with a text or more and two classes "
                "or more is wanted"
            )
        if given.shape != logits.shape:
            raise EvaluationError(
                f"{name} has shape {shape} and the model's own logits {list(logits.shape)}; give "
                "all models the same texts and classes"
            )
    texts, classes = logits.shape
    if not isinstance(labels, torch.Tensor) or labels.dtype not in _WHOLE:
        found = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise EvaluationError(f"labels is {found}; give an int64 tensor [texts]")
    _check_values("labels", labels)
    if labels.shape != (texts,):
        raise EvaluationError(
            f"labels has shape {list(labels.shape)}; [{texts}] is wanted, one a text"
        )
    inside = (labels >= 0) & (labels < classes)
    if not inside.all():
        text = int(inside.logical_not().nonzero()[0])
        raise EvaluationError(
            f"label {int(labels[text])} of text {text} is not in [0, {classes}), the classes of "
            "the logits; leave out texts without a label"
        )


def _check_values(name: str, given: torch.Tensor) -> None:
    """Refuse a tensor whose elements are not all in memory."""
    if given.is_meta:
        raise EvaluationError(f"{name} is on the device meta, where it has no values; compute them")
    if given.layout != torch.strided or given.is_nested:
        layout = "nested" if given.is_nested else str(given.layout).removeprefix("torch.")
        raise EvaluationError(f"{name} is {layout}; give a dense tensor")


def _whole(name: str, given: SupportsIndex, least: int) -> int:
    try:
        number = operator.index(given)
    except TypeError:
        number = least - 1
    if isinstance(given, bool) or number < least:
        raise EvaluationError(f"{name} {given!r} is not a whole number from {least} on")
    return number
