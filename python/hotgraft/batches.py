"""Batches of any kind, and the loss on one: what training and searching ask of both."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hotgraft.errors import DataError, NonFiniteError

Loss = Callable[[Any, Any], torch.Tensor]
"""Called with the model and a batch; gives a scalar."""


def endless(data: Iterable[Any], wanted: int, *, seed: int | None = None) -> Iterator[Any]:
    """Batches, from the start again when they end.

    Args:
        data: batches. An iterator, which cannot be read again, must have enough.
        wanted: how many will be taken, for the message.
        seed: where given and `data` is a sequence (a list of batches), each round has another
            order, which the seed fixes. While other data is read torch's generator of the CPU is
            one that starts from the seed, so a shuffling `DataLoader`'s order is fixed too,
            whatever else draws from torch's generator meanwhile.

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
    def order(round_: int) -> Iterable[Any]:
        if seed is None:
            return data
        if isinstance(data, Sequence):
            return _shuffled(data, seed, round_)
        return _drawing(data, states)

    states = [] if seed is None else [torch.Generator().manual_seed(seed).get_state()]
    taken = 0
    for round_ in itertools.count():
        before = taken
        for batch in order(round_):
            taken += 1
            yield batch
        if taken == 0:
            raise DataError("data has no batch")
        if isinstance(data, Iterator) or taken == before:
            raise DataError(
                f"data ended after {taken} of {wanted} batches and cannot be read again: give what "
                "can (a list, a DataLoader), or ask for fewer"
            )


def _shuffled(data: Sequence[Any], seed: int, round_: int) -> Iterable[Any]:
    generator = torch.Generator().manual_seed(hash((seed, round_)) % 2**63)
    return (data[i] for i in torch.randperm(len(data), generator=generator).tolist())


def _drawing(data: Iterable[Any], states: list[torch.Tensor]) -> Iterator[Any]:
    """A round of data whose random numbers are a stream of their own; keeps where it is."""
    batches = None
    done = object()
    while True:
        before = torch.get_rng_state()
        torch.set_rng_state(states[0])
        try:
            batches = iter(data) if batches is None else batches
            batch = next(batches, done)
        finally:
            states[0] = torch.get_rng_state()
            torch.set_rng_state(before)
        if batch is done:
            return
        yield batch


def check_seed(seed: int) -> int:
    """A seed as a plain number.

    Raises:
        DataError: it is not a whole number that torch's generators take.

    Example:
        >>> check_seed(3)
        3
    """
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**63:
        raise DataError(f"seed {seed!r}: wanted a whole number in 0 .. 2**63 - 1")
    return number


@contextlib.contextmanager
def seeded(model: nn.Module, seed: int | None) -> Iterator[None]:
    """The CPU's generator and those of the model's devices start from a seed, and are put back."""
    if seed is None:
        yield
        return
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    numbers = [device.index for device in devices]
    with torch.random.fork_rng(devices=numbers):
        torch.default_generator.manual_seed(seed)
        for number in numbers:
            torch.cuda.default_generators[number].manual_seed(seed)
        yield


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
