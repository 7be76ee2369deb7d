"""Mask: set algebra on positions, and how much masks and grafts overlap."""

import operator
import re

import numpy as np
import pytest
import torch
from factories import graft_on, state
from hotgraft import Entries, Graft, Mask, Provenance, overlap
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


@given(masks(), masks(), masks(), st.integers(0, 5))
def test_overlap_by_chance_is_that_of_membership(a, b, c, more):
    """Against the correlation of zeros and ones over every position."""
    every = [a, b, c]
    places = [(name, i) for name, shape in SHAPES.items() for i in range(int(np.prod(shape)))]
    belongs = [[place in pairs_of(m) for place in places] + [False] * more for m in every]
    n = len(places) + more
    found = overlap(every, eligible=n)
    assert found.eligible == n
    for i, left in enumerate(every):
        for j, right in enumerate(every):
            assert found.chance[i, j] == left.nnz * right.nnz / n
            if {left.nnz, right.nnz} & {0, n}:
                assert np.isnan(found.similarity[i, j])
                continue
            wanted = np.corrcoef(belongs[i], belongs[j])[0, 1]
            assert found.similarity[i, j] == pytest.approx(wanted, abs=1e-9)
            assert (found.similarity[i, j] == 1) == (left == right)


def test_similarity_of_masks_in_a_large_model():
    """Where a product of sizes leaves 64 bits, and a difference of shares would cancel."""
    n, k = 10**12, 10**5
    one = Mask({"w": ((n,), np.arange(k))})
    other = Mask({"w": ((n,), np.arange(k // 2, k + k // 2))})
    found = overlap([one, other], eligible=n)
    assert found.chance[0, 1] == 0.01
    assert found.similarity[0, 0] == 1
    assert found.similarity[0, 1] == pytest.approx((0.5 - k / n) / (1 - k / n), rel=1e-12)
    far = Mask({"w": ((n,), np.arange(k) + n // 2)})
    assert overlap([one, far], eligible=n).similarity[0, 1] == pytest.approx(-1e-7, rel=1e-5)


def graft_of(where, scope="encoder", eligible=40):
    ones = torch.ones(len(where))
    entries = {"w": Entries(torch.tensor(where), ones, 0 * ones, (9,))}
    return Graft.from_entries(entries, provenance=Provenance(scope=scope, eligible=eligible))


def test_grafts_tell_what_was_eligible():
    found = overlap([graft_of([0, 1]), graft_of([1, 2, 3, 4])])
    assert found.eligible == 40
    assert found.chance.tolist() == [[0.1, 0.2], [0.2, 0.4]]
    assert overlap([graft_of([0]), graft_of([1])], eligible=10).eligible == 10


@pytest.mark.parametrize(
    "every",
    [
        [],
        [graft_of([0]), graft_of([0], scope="linear")],
        [graft_of([0]), graft_of([0], eligible=41)],
        [graft_of([0]), graft_of([0]).mask],
        [graft_of([0]), Mask({})],
        [graft_of([0], scope="covered"), graft_of([0], scope="covered")],
    ],
    ids=["none", "scopes", "numbers", "a mask", "an empty mask", "covered"],
)
def test_chance_is_not_known(every):
    found = overlap(every)
    assert (found.eligible, found.chance, found.similarity) == (None, None, None)


def test_overlap_of_nothing_is_nothing():
    none = overlap([], eligible=9)
    assert none.chance.shape == none.similarity.shape == (0, 0)
    empty = overlap([Mask({}), Mask({"w": ((9,), [1])})], eligible=9)
    assert empty.chance.tolist() == [[0, 0], [0, 1 / 9]]
    assert np.isnan(empty.similarity).tolist() == [[True, True], [True, False]]
    nowhere = overlap([Mask({})], eligible=0)
    assert nowhere.chance.tolist() == [[0]]
    assert np.isnan(nowhere.similarity).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            Mask({"w": ((9,), [0, 1])}),
            "overlap of a Mask; wanted a list of grafts or masks, [a, b]",
        ),
        (Mask({}), "overlap of a Mask; wanted a list"),
        (graft_of([0, 1]), "overlap of a Graft; wanted a list"),
        (None, "overlap of a NoneType; wanted a list"),
        ([None], "item 0 to overlap is a NoneType; wanted grafts or masks"),
        ([Mask({}), "a.graft.safetensors"], "item 1 to overlap is a str; wanted grafts or masks"),
    ],
)
def test_overlap_is_of_several_grafts_or_masks(given, message):
    for eligible in (None, 9):
        with pytest.raises(GraftError, match=re.escape(message)):
            overlap(given, eligible=eligible)


@pytest.mark.parametrize(
    ("every", "eligible", "message"),
    [
        (
            [Mask({"w": ((9,), [0, 1])}), Mask({"w": ((9,), [1, 2])})],
            2,
            "eligible is 2, and the masks cover 3 positions",
        ),
        (
            [graft_of([0, 1], eligible=2), graft_of([1, 2], eligible=2)],
            None,
            "eligible (scope 'encoder', as the grafts state) is 2, and the masks cover 3",
        ),
        ([], -1, "eligible -1 is not a number of positions"),
        ([], 9.0, "eligible 9.0 is not a number of positions"),
        ([], True, "eligible True is not a number of positions"),
        ([], "9", "eligible '9' is not a number of positions"),
    ],
)
def test_eligible_that_cannot_be(every, eligible, message):
    with pytest.raises(GraftError, match=re.escape(message)):
        overlap(every, eligible=eligible)


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
