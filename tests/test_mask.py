"""Mask: set algebra on positions, and how much masks and grafts overlap."""

import operator
import re

import numpy as np
import pytest
import torch
from factories import graft_on, state
from hotgraft import Mask, overlap
from hotgraft.errors import GraftError
from hypothesis import given
from hypothesis import strategies as st

SHAPES = {"a": (5,), "b": (2, 3), "c": ()}


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    chosen = {}
    for name, shape in SHAPES.items():
        where = draw(st.sets(st.integers(0, int(np.prod(shape)) - 1)))
        chosen[name] = (shape, draw(st.permutations(sorted(where))))
    return Mask(chosen)


def pairs_of(mask: Mask) -> set[tuple[str, int]]:
    return {(name, int(i)) for name in mask for i in mask[name]}


@given(masks(), masks(), masks())
def test_mask_algebra_is_set_algebra(a, b, c):
    for found, wanted in (
        (a | b, pairs_of(a) | pairs_of(b)),
        (a & b, pairs_of(a) & pairs_of(b)),
        (a - b, pairs_of(a) - pairs_of(b)),
    ):
        assert pairs_of(found) == wanted
        assert found.nnz == len(wanted)
        assert all(len(found[name]) for name in found)
        assert all((np.diff(found[name]) > 0).all() for name in found)
    assert a | b == b | a
    assert (a | b) & c == (a & c) | (b & c)
    assert a - (b | c) == (a - b) - c
    assert (a - b) | (a & b) == a


@given(masks(), masks(), masks())
def test_overlap_counts(a, b, c):
    every = [a, b, c]
    found = overlap(every)
    for i, left in enumerate(every):
        for j, right in enumerate(every):
            both, either = len(pairs_of(left) & pairs_of(right)), pairs_of(left) | pairs_of(right)
            assert found.counts[i, j] == both
            assert found.jaccard[i, j] == both / max(1, len(either))
            assert found.share[i, j] == both / max(1, right.nnz)


def test_overlap_takes_grafts_and_masks():
    graft = graft_on(state())
    part = Mask({"layers.0.norm.weight": ((8,), graft.mask["layers.0.norm.weight"][:1])})
    found = overlap([graft, part])
    assert found.counts.tolist() == [[graft.nnz, 1], [1, 1]]
    assert found.share.tolist() == [[1.0, 1.0], [1 / graft.nnz, 1.0]]
    assert overlap([]).counts.shape == (0, 0)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ([0, 6], "'b': index 6 is outside shape [2, 3]"),
        ([-1, 3], "'b': index -1 is outside shape [2, 3]"),
        ([3, 0, 3], "'b': index 3 is given twice"),
        ([0.5], "'b': indices must be integers, not float64"),
        ([True], "'b': indices must be integers, not bool"),
        (["x"], "'b': indices must be integers, not <U1"),
    ],
)
def test_a_mask_refuses(where, message):
    with pytest.raises(GraftError, match=re.escape(message)):
        Mask({"b": ((2, 3), where)})


def test_masks_of_different_shapes():
    one, other = Mask({"b": ((2, 3), [1])}), Mask({"b": ((3, 2), [1])})
    for operation in (one.__or__, one.__and__, one.__sub__):
        with pytest.raises(
            GraftError, match=r"'b' has shape \[2, 3\] in one mask and \[3, 2\] in the other"
        ):
            operation(other)
    assert one != other
    assert one != "mask"


def test_what_a_mask_tells():
    mask = Mask({"b": ((2, 3), torch.tensor([4, 1])), "a": ((5,), [])})
    assert (dict(mask).keys(), len(mask), mask.nnz, mask.shape("b")) == ({"b"}, 1, 2, (2, 3))
    assert str(mask) == "Mask(2 entries in 1 tensors)"
    with pytest.raises(KeyError):
        mask["a"]


def test_a_mask_cannot_be_changed():
    where = np.array([4, 1])
    mask = Mask({"a": ((6,), where)})
    where[0] = 0
    assert mask["a"].tolist() == [1, 4]
    with pytest.raises(ValueError, match="read-only"):
        mask["a"][0] = 2
    with pytest.raises(TypeError):
        mask["a"] = where
    with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
        mask["a"].setflags(write=True)


@pytest.mark.parametrize("operation", [operator.or_, operator.and_, operator.sub])
def test_masks_are_combined_with_masks_alone(operation):
    with pytest.raises(TypeError, match="unsupported operand"):
        operation(Mask({"a": ((6,), [1])}), {"a": [1]})
