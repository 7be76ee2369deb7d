"""Batches again and again, orders that a seed fixes, and losses that are numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hotgraft.batches import check_seed, endless, scalar
from hotgraft.errors import DataError, NonFiniteError
from torch.utils.data import DataLoader


def first(count: int, data: Iterable[Any], **how: Any) -> list[Any]:
    return list(itertools.islice(endless(data, count, **how), count))


class Counted:
    """Three batches, as often as wanted; it is no sequence."""

    def __init__(self) -> None:
        self.rounds = 0

    def __iter__(self) -> Iterator[str]:
        self.rounds += 1
        yield from "abc"


def test_a_list_starts_again() -> None:
    assert first(7, ["a", "b", "c"]) == list("abcabca")


def test_anything_that_can_be_read_again_is() -> None:
    data = Counted()
    assert first(7, data, seed=3) == list("abcabca")
    assert data.rounds == 3
    assert first(3, Counted()) == list("abc")
    loaded = first(3, DataLoader([1, 2, 3], batch_size=2))
    assert [batch.tolist() for batch in loaded] == [[1, 2], [3], [1, 2]]


def test_data_is_read_no_further_than_needed() -> None:
    data = iter(range(10))
    assert first(4, data) == [0, 1, 2, 3]
    assert next(data) == 4
    counted = Counted()
    first(3, counted)
    assert counted.rounds == 1


@pytest.mark.parametrize("data", [list(range(20)), tuple(range(20)), range(20)])
def test_a_seed_fixes_an_order_that_differs_each_round(data: Any) -> None:
    found = first(60, data, seed=1)
    rounds = [tuple(found[i : i + 20]) for i in (0, 20, 40)]
    assert len({*rounds, tuple(data)}) == 4
    assert all(sorted(one) == list(data) for one in rounds)
    assert first(60, data, seed=1) == found
    other = first(60, data, seed=2)
    assert other[:20] != found[:20] != other[20:40]


def test_a_seeds_order_is_the_same_in_every_process() -> None:
    assert first(8, list(range(8)), seed=7) == [6, 4, 1, 2, 5, 3, 7, 0]


def test_torchs_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    first(9, list(range(3)), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("data", [[], (), iter(()), DataLoader([])])
def test_no_batch(data: Any) -> None:
    with pytest.raises(DataError, match="data has no batch"):
        first(1, data, seed=0)


@pytest.mark.parametrize("hidden", [False, True])
def test_what_ends_and_cannot_be_read_again(hidden: bool) -> None:
    class Once:
        batches = iter("ab")

        def __iter__(self) -> Iterator[str]:
            return self.batches

    assert first(2, iter("ab")) == ["a", "b"]
    with pytest.raises(DataError, match=r"ended after 2 of 9 batches and cannot .*: give what can"):
        first(9, Once() if hidden else iter("ab"))


@pytest.mark.parametrize(
    ("data", "kind"),
    [(5, "int"), (None, "NoneType"), ({"input_ids": [1]}, "dict"), ("ab", "str"), (b"ab", "bytes")],
)
def test_what_is_no_data(data: Any, kind: str) -> None:
    with pytest.raises(DataError, match=f"data is a {kind}; wanted batches: a list, a DataLoader"):
        endless(data, 3)  # at once, not at the first batch


def test_what_reading_raises_comes_through() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        first(2, broken())


# ---- losses -------------------------------------------------------------------------------------


def leaf(value: Any) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_loss_is_a_number(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    value = torch.full(shape, 1.5, dtype=dtype, requires_grad=True)
    assert scalar(value, "step 1") == 1.5


def test_a_loss_that_is_only_looked_at_needs_no_gradient() -> None:
    assert scalar(torch.tensor(2.0), "step 1", differentiable=False) == 2.0
    assert scalar(torch.tensor(2), "step 1", differentiable=False) == 2.0


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (1.5, DataError, "the loss is float; wanted a tensor of one element: take its mean"),
        (None, DataError, "the loss is NoneType; wanted"),
        ((leaf(1.0),), DataError, "the loss is tuple; wanted"),
        (leaf([1.0, 2.0]), DataError, r"the loss is \[2\]; wanted a tensor of one element"),
        (leaf([]), DataError, r"the loss is \[0\]; wanted"),
        (leaf(1j), DataError, "the loss is of torch.complex64; wanted a real number"),
        (torch.tensor(1.0), DataError, "the loss at step 2 of 9 depends on no weight that may"),
        (leaf(float("nan")), NonFiniteError, "the loss is nan at step 2 of 9: look at its batch"),
        (leaf(float("inf")), NonFiniteError, "the loss is inf at step 2 of 9"),
        (leaf(float("-inf")), NonFiniteError, "the loss is -inf at step 2 of 9"),
    ],
)
def test_what_is_no_loss(value: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        scalar(value, "step 2 of 9")


# ---- seeds --------------------------------------------------------------------------------------


def shuffling() -> Iterable[Any]:
    return DataLoader(list(range(20)), batch_size=None, shuffle=True)


def test_a_seed_settles_a_shuffling_loader_whatever_else_draws() -> None:
    found = []
    for noise in (0, 1, 2):
        torch.manual_seed(noise)
        order = []
        for batch in itertools.islice(endless(shuffling(), 40, seed=6), 40):
            order.append(int(batch))
            torch.rand(noise)  # as a loss might
        found.append(order)
    assert found[0] == found[1] == found[2]
    assert sorted(found[0][:20]) == sorted(found[0][20:]) == list(range(20))
    assert found[0][:20] != found[0][20:]
    assert [int(batch) for batch in first(40, shuffling(), seed=7)] != found[0]


@pytest.mark.parametrize("error", [False, True])
def test_reading_a_loader_leaves_torchs_generator_alone(error: bool) -> None:
    def broken(batch: Any) -> Any:
        if error:
            raise OSError("the disk")
        return batch

    before = torch.get_rng_state()
    loader = DataLoader(list(range(5)), shuffle=True, collate_fn=broken)
    if error:
        with pytest.raises(OSError, match="the disk"):
            first(2, loader, seed=1)
    else:
        first(12, loader, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, np.int64(3)])
def test_what_is_a_seed(seed: Any) -> None:
    assert type(check_seed(seed)) is int
    assert check_seed(seed) == seed
    first(3, ["a", "b"], seed=check_seed(seed))


@pytest.mark.parametrize("seed", [True, False, 1.0, "1", None, -1, 2**63, torch.tensor(1.5)])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(DataError, match=r"^seed .*: wanted a whole number in 0 \.\. 2"):
        check_seed(seed)
