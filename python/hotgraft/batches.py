"""Batches of any kind, and the loss on one: what training and searching ask of both."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from hotgraft.errors import DataError, NonFiniteError

Loss = Callable[[Any, Any], torch.Tensor]
"""Called with the model and a batch; gives a scalar."""


def endless(data: Iterable[Any], wanted: int, *, seed: int | None = None) -> Iterator[Any]:
    """Batches, from the start again when they end.

    Args:
        data: batches. An iterator, which cannot be read again, must have enough.
        wanted: how many will be taken, for the message.
        seed: where given and `data` is a sequence (a list of batches), each round has another
            order, which the seed fixes.

    Raises:
        DataError: `data` is nothing to read, has no batch, or ended early.

    Example:
        >>> list(itertools.islice(endless(["a", "b"], 3), 3))
        ['a', 'b', 'a']
    """
    # What a mapping or a text gives one by one are no batches.
    if not isinstance(data, Iterable) or isinstance(data, Mapping | str | bytes):
        raise DataError(
            f"data is a {type(data).__name__}; wanted batches: a list, a DataLoader, ..."
        )
    return _rounds(data, wanted, seed)


def _rounds(data: Iterable[Any], wanted: int, seed: int | None) -> Iterator[Any]:
    taken = 0
    for round_ in itertools.count():
        before = taken
        for batch in _shuffled(data, seed, round_):
            taken += 1
            yield batch
        if taken == 0:
            raise DataError("data has no batch")
        if isinstance(data, Iterator) or taken == before:
            raise DataError(
                f"data ended after {taken} of {wanted} batches and cannot be read again: give what "
                "can (a list, a DataLoader), or ask for fewer"
            )


def _shuffled(data: Iterable[Any], seed: int | None, round_: int) -> Iterable[Any]:
    if seed is None or not isinstance(data, Sequence):
        return data
    generator = torch.Generator().manual_seed(hash((seed, round_)) % 2**63)
    return (data[i] for i in torch.randperm(len(data), generator=generator).tolist())


def scalar(value: object, place: str, *, differentiable: bool = True) -> float:
    """A loss as a number.

    Args:
        value: what the loss returned.
        place: where it did, for the message: "step 3 of 100".
        differentiable: whether its gradient will be asked for.

    Raises:
        DataError: it is not a tensor of one element or, where that is wanted, does not depend on a
            parameter.
        NonFiniteError: it is a NaN or infinity.

    Example:
        >>> scalar(torch.ones((), requires_grad=True), "step 1")
        1.0
    """
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(f"the loss is {found}; wanted a tensor of one element: take its mean")
    if value.is_complex():
        raise DataError(f"the loss is of {value.dtype}; wanted a real number")
    if differentiable and not value.requires_grad:
        raise DataError(
            f"the loss at {place} depends on no weight that may change: does it run the model it "
            "is given, outside torch.no_grad()?"
        )
    number = float(value.detach())
    if not math.isfinite(number):
        raise NonFiniteError(
            f"the loss is {number} at {place}: look at its batch and its scale or, where weights "
            "are trained, take a smaller learning rate"
        )
    return number
