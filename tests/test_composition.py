"""compose and rebase: policies on whole grafts, messages, and other bases."""

import itertools
import re

import pytest
import torch
from factories import FLOATS, graft_on, grafted, same_bits, state, tensor, weights
from hotgraft import Entries, Graft, Provenance, compose
from hotgraft.errors import (
    BaseMismatchError,
    CoverageError,
    GraftError,
    NonFiniteError,
    OverlapError,
)
from hotgraft.format import DTYPES
from hotgraft.graft import bits
from hotgraft.kernels import POLICIES
from hotgraft.kernels.reference import BACKEND as REFERENCE
from hypothesis import given
from hypothesis import strategies as st

NAMES = ("a", "b", "c")


def base_of(dtype: str = "BF16", seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: weights(dtype, (5, 4), seed + i) for i, name in enumerate(NAMES)}


def skill(base: dict[str, torch.Tensor], seed: int, names=NAMES, share: float = 0.4) -> Graft:
    """A graft whose new values are the base's plus something small."""
    given_ = graft_on({name: base[name] for name in names}, seed, share)
    entries = {}
    for i, name in enumerate(names):
        part = given_[name]
        near = part.old.double() + weights("F64", tuple(part.old.shape), seed + i)
        entries[name] = part._replace(new=near.to(part.old.dtype))
    return Graft.from_entries(entries)


def one(value: float, at: int = 1, *, old: float = 1.0, dtype=torch.float32, shape=(4,)) -> Graft:
    return Graft.from_entries(
        {
            "w": Entries(
                [at], torch.tensor([value], dtype=dtype), torch.tensor([old]).to(dtype), shape
            )
        }
    )


# ---- laws -------------------------------------------------------------------------------------


@given(
    st.sampled_from(["sum", "mean", "sign"]),
    st.sampled_from(FLOATS),
    st.integers(0, 99),
    st.lists(st.sampled_from([1.0, 0.5, -0.25, 2.0]), min_size=3, max_size=3),
)
def test_the_order_of_arguments_says_nothing(policy, dtype, seed, given_weights):
    base = base_of(dtype, seed)
    grafts = [skill(base, seed + i) for i in range(3)]
    results = {
        compose([grafts[i] for i in order], policy, [given_weights[i] for i in order]).id
        for order in itertools.permutations(range(3))
    }
    assert len(results) == 1


@given(st.sampled_from(POLICIES), st.integers(0, 99))
def test_one_graft_at_weight_one_is_itself(policy, seed):
    graft = graft_on(state(seed, finite=False), seed, finite=False)
    assert compose([graft], policy) == graft


@given(st.sampled_from(POLICIES), st.integers(0, 99))
def test_grafts_that_do_not_meet_are_copied(policy, seed):
    base = base_of(seed=seed)
    left, right = skill(base, seed, ("a",)), skill(base, seed + 1, ("b", "c"))
    both = compose([left, right], policy)
    assert same_bits(grafted(base, both), grafted(grafted(base, left), right))
    assert both.mask == left.mask | right.mask


@given(st.integers(0, 99))
def test_priority_is_one_after_the_other(seed):
    base = state(seed, finite=False)
    grafts = [graft_on(base, seed + i, 0.5, finite=False) for i in range(3)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        ordered = [grafts[i] for i in order]
        live = base
        for graft in ordered:
            live = grafted(live, graft)
        assert same_bits(grafted(base, compose(ordered, "priority")), live)


def test_refuse_lets_equal_bits_pass():
    graft = skill(base_of(), 1)
    assert compose([graft, graft]) == graft
    assert compose([graft, graft], weights=[0.5, 0.5]) == compose([graft], weights=[0.5])


@pytest.mark.parametrize(
    ("policy", "given_weights", "wanted"),
    [
        ("sum", [1, 1], 6.0),
        ("sum", [0.5, 2], 8.0),
        ("mean", [1, 1], 3.5),
        ("sign", [1, -2], -5.0),
        ("priority", [1, 1], 4.0),
    ],
)
def test_policies_by_hand(policy, given_weights, wanted):
    """On a base of 1, one graft writes 3 and one writes 4."""
    both = compose([one(3.0), one(4.0)], policy, given_weights)
    assert both["w"].new.tolist() == [wanted]
    assert both["w"].old.tolist() == [1.0]


def test_several_dtypes_and_blocks_at_once():
    far = Entries([3, 2**31 + 7], torch.tensor([1.0, 2.0]), torch.zeros(2), (2**31 + 9,))
    left = Graft.from_entries(
        {"far": far, "near": Entries([0], torch.ones(1).half(), torch.zeros(1).half(), (2,))}
    )
    right = Graft.from_entries({"far": far._replace(indices=torch.tensor([3, 2**31 + 8]))})
    both = compose([left, right], "sum")
    assert both["far"].indices.tolist() == [3, 2**31 + 7, 2**31 + 8]
    assert both["far"].new.tolist() == [2.0, 2.0, 2.0]
    assert both["near"].new.tolist() == [1.0]
    assert [(r.name, r.block) for r in both.rows] == [("far", 0), ("far", 2**31), ("near", 0)]


# ---- provenance -------------------------------------------------------------------------------


def test_the_scope_is_kept_where_it_is_shared():
    shared = Provenance(base_id="b", scope="encoder", eligible=500)
    base = base_of()
    left, right = (
        Graft(g.rows, g.groups, shared) for g in (skill(base, 1, ("a",)), skill(base, 2, ("b",)))
    )
    provenance = compose([left, right]).provenance
    assert (provenance.base_id, provenance.scope, provenance.eligible) == ("b", "encoder", 500)
    assert provenance.method == "composed"
    other = Graft(right.rows, right.groups, Provenance(base_id="c", scope="linear", eligible=500))
    provenance = compose([left, other]).provenance
    assert (provenance.base_id, provenance.scope, provenance.eligible) == (None, "covered", 40)


def test_what_is_covered_is_counted_anew():
    """Two grafts that fill their tensors: together they cover both, not as much as either."""
    base = {name: torch.zeros(4) for name in "ab"}
    left, right = (graft_on({name: base[name]}, 1, share=1.0) for name in "ab")
    assert left.density == right.density == 1.0
    assert compose([left, right]).provenance.eligible == 8


# ---- refusals ---------------------------------------------------------------------------------


def test_refuse_counts_the_disagreements_of_each_pair():
    grafts = [
        Graft.from_entries({"w": Entries([0, 1, 2], torch.tensor(new), torch.zeros(3), (4,))})
        for new in ([1.0, 1.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    ]
    with pytest.raises(OverlapError) as caught:
        compose(grafts, labels=["sql", "french", "poems"])
    message = str(caught.value)
    assert message.endswith("and the policy is 'refuse'; choose priority, sum, mean or sign")
    counts = {
        frozenset(pair): int(count)
        for *pair, count in re.findall(r"(\w+) and (\w+) on (\d+)", message)
    }
    assert counts == {
        frozenset({"sql", "french"}): 2,
        frozenset({"sql", "poems"}): 2,
        frozenset({"french", "poems"}): 1,
    }
    with pytest.raises(OverlapError, match=r"graft [01] and graft [01] on 1"):
        compose([one(3.0), one(4.0)])


def test_what_stands_in_the_way_is_counted_over_all_dtypes():
    def change(by, base=0.0):
        olds = {"b": torch.full((4,), base).bfloat16(), "a": torch.full((4,), base)}
        return Graft.from_entries(
            {name: Entries(range(4), old + by, old, (4,)) for name, old in olds.items()}
        )

    with pytest.raises(OverlapError, match=r"graft [01] and graft [01] on 8"):
        compose([change(1.0), change(2.0)])
    with pytest.raises(BaseMismatchError, match="on 8 shared entries, first 'a', position 0"):
        compose([change(1.0), change(1.0, base=1.0)])
    with pytest.raises(NonFiniteError, match="8 composed values are not finite, first 'a', pos"):
        compose([change(3e38), change(3e38)], policy="sum")


@pytest.mark.parametrize(
    ("grafts", "arguments", "error", "message"),
    [
        ([], {}, GraftError, "nothing to compose: give at least one graft"),
        ([one(3.0)], {"policy": "add"}, GraftError, "unknown policy 'add'; known are refuse, prio"),
        ([one(3.0)], {"weights": [1, 2]}, GraftError, "2 weights for 1 grafts"),
        (
            [one(3.0)],
            {"weights": 0.5},
            GraftError,
            "weights 0.5: give a list with a number a graft",
        ),
        ([one(3.0)], {"weights": ["x"]}, GraftError, "weights ['x']: give a list with a number"),
        (["a"], {}, GraftError, "'a' is not a Graft; Graft.load reads one from a file"),
        ([one(3.0)], {"weights": [float("nan")]}, GraftError, "weight nan is not finite"),
        ([one(3.0)], {"weights": [float("inf")]}, GraftError, "weight inf is not finite"),
        (
            [one(3.0), one(4.0, old=2.0)],
            {"policy": "sum"},
            BaseMismatchError,
            "different old bits on 1 shared entries, first 'w', position 1: they were made against "
            "different bases; rebase one of them",
        ),
        (
            [one(3.0), one(4.0, old=2.0, at=1)],
            {"policy": "priority"},
            BaseMismatchError,
            "different old bits on 1 shared entries",
        ),
        (
            [one(3.0), one(4.0, shape=(2, 2))],
            {},
            BaseMismatchError,
            "they were made against different bases",
        ),
        (
            [one(3.0), one(4.0, dtype=torch.float16)],
            {},
            BaseMismatchError,
            "they were made against different bases",
        ),
        (
            [one(3e38), one(3e38)],
            {"policy": "sum"},
            NonFiniteError,
            "1 composed values are not finite, first 'w', position 1; use smaller weights",
        ),
        ([one(3e38)], {"weights": [2.0]}, NonFiniteError, "1 composed values are not finite"),
        (
            [one(3, dtype=torch.int32)],
            {"weights": [2.0]},
            GraftError,
            "'w' is I32, which knows no arithmetic: policy 'refuse' at weight 2.0 cannot be had; "
            "refuse and priority at weight 1 can",
        ),
        (
            [one(3, dtype=torch.int32)] * 2,
            {"policy": "mean"},
            GraftError,
            "policy 'mean' at weight 1.0 cannot be had",
        ),
        (
            [one(3, dtype=torch.float8_e4m3fn)] * 2,
            {"policy": "sum"},
            GraftError,
            "'w' is F8_E4M3, which knows no arithmetic",
        ),
    ],
)
def test_compose_refuses(grafts, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        compose(grafts, **arguments)


def test_types_without_arithmetic_know_priority():
    left, right = one(3, dtype=torch.int32), one(4, dtype=torch.int32)
    assert compose([left, right], "priority")["w"].new.tolist() == [4]
    assert compose([right, left], "priority")["w"].new.tolist() == [3]
    with pytest.raises(OverlapError):
        compose([left, right])


# ---- rebase -----------------------------------------------------------------------------------


@given(st.sampled_from(["difference", "replacement"]), st.integers(0, 99))
def test_rebase_on_the_same_base_changes_nothing(mode, seed):
    base = state(seed, finite=False)
    graft = graft_on(base, seed, finite=False)
    rebased = graft.rebase(base, mode)
    assert rebased == graft
    assert rebased.provenance.method == "rebased"


@given(st.sampled_from(FLOATS), st.integers(0, 99))
def test_rebase_adds_the_difference(dtype, seed):
    base, other = base_of(dtype, seed), base_of(dtype, seed)
    other["b"] = weights(dtype, (5, 4), seed + 50)
    graft = skill(base, seed + 7)
    rebased = graft.rebase(other)
    assert rebased.mask == graft.mask
    for name in NAMES:
        part, moved = graft[name], rebased[name]
        there = other[name].reshape(-1)[part.indices]
        assert bits(moved.old).tobytes() == bits(there).tobytes()
        if name != "b":  # where the bases agree, the same bits
            assert bits(moved.new).tobytes() == bits(part.new).tobytes()
            continue
        sums = there.double() + (part.new.double() - part.old.double())
        rounded, overflows = REFERENCE.round(bits(sums), DTYPES["F64"], DTYPES[dtype])
        moves = bits(there) != bits(part.old)
        assert (bits(moved.new)[moves] == rounded[moves]).all()
        assert (bits(moved.new)[~moves] == bits(part.new)[~moves]).all()
        assert overflows == 0


def test_rebase_rounds_once():
    base, other = {"w": torch.zeros(1).bfloat16()}, {"w": torch.ones(1).bfloat16()}
    new = torch.tensor([2.0**-8 + 2.0**-15]).bfloat16()  # 1 + it is just above a middle
    graft = Graft.from_entries({"w": Entries([0], new, base["w"], (1,))})
    assert graft.rebase(other)["w"].new.item() == 1.0078125


def test_rebase_minds_no_flushed_subnormals():
    base = {"w": torch.tensor([1, 2]).short().view(torch.float16)}
    graft = Graft.from_entries({"w": Entries([0, 1], 2 * base["w"], base["w"], (2,))})
    assert torch.set_flush_denormal(True)
    try:
        rebased = graft.rebase({"w": torch.tensor([7, 8]).short().view(torch.float16)})
    finally:
        torch.set_flush_denormal(False)
    assert rebased["w"].new.view(torch.int16).tolist() == [8, 10]


def test_rebase_in_double_minds_no_flushed_subnormals():
    base = {"w": torch.tensor([1, 2]).view(torch.float64)}
    graft = Graft.from_entries({"w": Entries([0, 1], base["w"].view(torch.int64).mul(2).view(
        torch.float64), base["w"], (2,))})  # fmt: skip
    assert torch.set_flush_denormal(True)
    try:
        rebased = graft.rebase({"w": torch.tensor([7, 8]).view(torch.float64)})
        assert not torch.full((1,), 1e-310, dtype=torch.float64).mul(1).item()  # as it was before
    finally:
        torch.set_flush_denormal(False)
    assert rebased["w"].new.view(torch.int64).tolist() == [8, 10]


def test_rebase_replacement_keeps_new_and_takes_the_other_old():
    base, other = base_of(), base_of(seed=9)
    graft = skill(base, 1)
    rebased = graft.rebase(other, mode="replacement")
    for name in NAMES:
        assert bits(rebased[name].new).tobytes() == bits(graft[name].new).tobytes()
        assert same_bits(
            {"w": rebased[name].old}, {"w": other[name].reshape(-1)[graft[name].indices]}
        )


def test_rebase_refuses():
    graft = one(3e38)
    with pytest.raises(GraftError, match="unknown mode 'add'; known are difference, replacement"):
        graft.rebase({"w": torch.ones(4)}, mode="add")
    with pytest.raises(CoverageError, match="the other base lacks 'w', which the graft touches"):
        graft.rebase({"v": torch.ones(4)})
    with pytest.raises(
        BaseMismatchError, match=r"'w' is F32 \[4\] in the graft and F32 \[5\] in the other base"
    ):
        graft.rebase({"w": torch.ones(5)})
    with pytest.raises(BaseMismatchError, match=r"'w' is F32 \[4\] in the graft and F64 \[4\]"):
        graft.rebase({"w": torch.ones(4).double()})
    with pytest.raises(NonFiniteError, match="'w': a rebased value is not finite"):
        graft.rebase({"w": torch.full((4,), 3e38)})
    with pytest.raises(NonFiniteError, match="'w': a rebased value is not finite"):
        graft.rebase({"w": torch.full((4,), float("nan"))})
    integers = Graft.from_entries({"n": Entries([0], torch.tensor([5]), tensor("I64", (1,)), (1,))})
    with pytest.raises(GraftError, match="'n' is I64, which knows no arithmetic, and the bases"):
        integers.rebase({"n": torch.tensor([77])})
    replaced = integers.rebase({"n": torch.tensor([77])}, mode="replacement")
    assert (replaced["n"].new.item(), replaced["n"].old.item()) == (5, 77)
