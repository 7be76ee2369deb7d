"""Graft and Mask: what they are, what they refuse, and the laws they keep."""

import re

import numpy as np
import pytest
import torch
from factories import finetuned, graft_on, grafted, random_bits, same_bits, state, tensor
from hotgraft import Entries, Graft, Mask, Provenance, compose, diff
from hotgraft.errors import BaseMismatchError, CoverageError, GraftError
from hotgraft.format import DTYPES, Group, Row
from hotgraft.graft import bits
from hypothesis import given
from hypothesis import strategies as st

BLOCK = 2**31


def entries(where, new, old=None, shape=(2, 3)) -> Entries:
    new = torch.as_tensor(new)
    old = torch.zeros_like(new) if old is None else torch.as_tensor(old)
    return Entries(torch.as_tensor(where), new, old, shape)


def small(**provenance) -> Graft:
    """A graft that never changes; its id is written down below."""
    return Graft.from_entries(
        {
            "b.weight": entries([0, 5], [1.0, -2.5], [0.0, -0.0]),
            "a": entries([2], torch.tensor([7], dtype=torch.int8), shape=(4,)),
            "c": entries([1], torch.tensor([1.5], dtype=torch.bfloat16), shape=(1, 2, 1)),
        },
        Provenance(**provenance),
    )


# ---- the id -----------------------------------------------------------------------------------


def test_the_id_is_fixed():
    """This value may never change: servers key caches with it, and files state it."""
    assert small().id == "814780debff032913326d06e1394261920faf4bc85bb772a8abf2c939d2a0a35"


def test_the_id_knows_contents_only():
    assert small(scope="all", eligible=99, base_id="x", method="m", creator="c").id == small().id
    entries_of = {name: small()[name] for name in reversed(small().names)}
    assert Graft.from_entries(entries_of).id == small().id


@pytest.mark.parametrize(
    "change",
    [
        {"b": entries([0, 5], [1.0, -2.5])},
        {"a": entries([1, 5], [1.0, -2.5])},
        {"a": entries([0, 5], [1.0, -2.0])},
        {"a": entries([0, 5], [1.0, -2.5], [0.0, -0.0])},
        {"a": entries([0, 5], [1.0, -2.5], shape=(3, 2))},
        {"a": entries([0, 5], [1.0, -2.5], shape=(6,))},
        {"a": entries([0, 5], torch.tensor([1, 2]).int())},
        {"a": entries([0], [1.0])},
    ],
)
def test_the_id_sees_every_part(change):
    same = Graft.from_entries({"a": entries([0, 5], [1.0, -2.5])})
    other = Graft.from_entries(change)
    assert same != other
    assert same.id != other.id
    assert len({same, other, Graft.from_entries({"a": entries([0, 5], [1.0, -2.5])})}) == 2


def test_dtypes_of_the_same_bits_differ():
    pattern = torch.tensor([0x3F80], dtype=torch.int16)
    grafts = [
        Graft.from_entries({"a": entries([0], pattern.view(t))})
        for t in (torch.int16, torch.uint16, torch.bfloat16, torch.float16)
    ]
    assert len({graft.id for graft in grafts}) == 4


# ---- looking ----------------------------------------------------------------------------------


def test_what_a_graft_tells():
    graft = small()
    assert (graft.nnz, graft.names) == (4, ("a", "b.weight", "c"))
    assert graft.shapes == {"a": (4,), "b.weight": (2, 3), "c": (1, 2, 1)}
    assert graft.provenance.scope == "covered"
    assert graft.provenance.eligible == 4 + 6 + 2
    assert graft.density == 4 / 12
    assert graft.provenance.creator.startswith("hotgraft")
    assert graft.nbytes == 4 * 4 + 2 * (2 * 4 + 1 + 2)
    assert graft["b.weight"].indices.tolist() == [0, 5]
    assert graft["b.weight"].indices.dtype == torch.int64
    assert graft["b.weight"].new.tolist() == [1.0, -2.5]
    assert graft["c"].new.dtype == torch.bfloat16
    assert str(graft) == (
        f"Graft(4 entries in 3 tensors, density 0.33 of covered, id {graft.id[:12]})"
    )
    assert graft != "graft"
    with pytest.raises(KeyError, match=r"does not touch 'd'; it touches a, b\.weight, c"):
        graft["d"]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_bits_of_every_dtype_come_back(dtype):
    kind = DTYPES[dtype]
    new, old = (tensor(dtype, (90,), seed, finite=False) for seed in (1, 2))
    graft = Graft.from_entries({"w": Entries(torch.arange(90), new, old, (9, 10))})
    found = graft["w"]
    assert (found.new.dtype, found.old.dtype) == (kind.torch, kind.torch)
    assert bits(found.new).tobytes() == random_bits(kind, 90, 1).tobytes()
    assert bits(found.old).tobytes() == random_bits(kind, 90, 2).tobytes()


def test_scalars_and_strided_values():
    values = torch.arange(6.0).reshape(2, 3).t()[1]
    graft = Graft.from_entries(
        {"s": entries([0], [3.0], shape=()), "t": Entries([1, 2], values, values + 1, (5,))}
    )
    assert graft["s"].shape == ()
    assert graft["t"].new.tolist() == [1.0, 4.0]


# ---- immutability -----------------------------------------------------------------------------


def test_a_graft_cannot_be_changed():
    given = entries([0, 5], [1.0, -2.5])
    graft = Graft.from_entries({"a": given})
    before = Graft.from_entries({"a": given}).id
    for name in ("rows", "groups", "provenance", "id", "anything"):
        with pytest.raises(AttributeError, match=f"a Graft is immutable: cannot set '{name}'"):
            setattr(graft, name, None)
        with pytest.raises(AttributeError, match="a Graft is immutable"):
            delattr(graft, name)
    with pytest.raises(TypeError):
        graft.groups["F32"] = None
    for array in (*graft.groups["F32"], *graft.arrays(graft.rows[0])):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        graft.provenance.scope = "all"
    # What it was made from, and what it hands out, are other memory.
    given.new.fill_(9)
    given.indices.fill_(3)
    graft["a"].new.fill_(9)
    graft["a"].indices.fill_(3)
    assert Graft(graft.rows, graft.groups, Provenance()).id == before


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (entries([0, 1, 2], [1.0, 2.0]), "'w': 3 indices, 2 new (torch.float32) and 2 old"),
        (entries([0], [1.0], torch.tensor([1])), "1 old (torch.int64) values; wanted as many"),
        (entries([0, 6], [1.0, 2.0]), "'w': an index is outside shape [2, 3]"),
        (entries([-1, 0], [1.0, 2.0]), "'w': an index is outside shape [2, 3]"),
        (entries([0], [1.0], shape=(0, 3)), "'w': an index is outside shape [0, 3]"),
        (
            entries([1, 0], [1.0, 2.0]),
            "'w': positions must ascend without repeats, but 0 follows 1",
        ),
        (
            entries([1, 1], [1.0, 2.0]),
            "'w': positions must ascend without repeats, but 1 follows 1",
        ),
        (entries([0.0], [1.0]), "'w': indices must be flat integers, not float32 of shape [1]"),
        (entries([True], [1.0]), "'w': indices must be flat integers, not bool of shape [1]"),
        (entries([[0, 1]], [[1.0, 2.0]]), "not int64 of shape [1, 2]"),
        (entries([0, 1], [[1.0], [2.0]]), None),
        (entries([0], [[1.0, 2.0]]), "F32: the rows count 1 entries, but there are 1 positions, 2"),
        (entries([0], [1j]), "'w' has dtype torch.complex64; a graft holds BF16, F16"),
        (entries([], []), "the graft is empty: it needs at least one entry"),
    ],
)
def test_from_entries_refuses(wrong, message):
    if message is None:  # n values are n values, whatever their shape
        assert Graft.from_entries({"w": wrong}).nnz == 2
        return
    with pytest.raises(GraftError, match=re.escape(message)):
        Graft.from_entries({"w": wrong})


def test_no_entries_at_all():
    with pytest.raises(GraftError, match="the graft is empty: it needs at least one entry"):
        Graft.from_entries({})


ROW = Row("w", (4,), "F32", 0, 0, 2)
TWO = np.zeros(2, np.uint32)
GOOD = {"F32": Group(np.array([1, 3], np.int32), TWO, TWO)}


@pytest.mark.parametrize(
    ("rows", "groups", "message"),
    [
        ([ROW._replace(dtype="F31")], GOOD, "'w': unknown dtype 'F31'; known are BF16, F16"),
        ([ROW._replace(dtype="F16")], GOOD, "'w' is of dtype F16, but the graft has no such"),
        ([ROW._replace(shape=(0, 4))], GOOD, "'w': shape [0, 4] is not a possible shape"),
        ([ROW._replace(shape=(2**62, 2))], GOOD, "is not a possible shape"),
        ([ROW._replace(block=7)], GOOD, "block offset 7 is not one of its shape's blocks"),
        ([ROW._replace(block=BLOCK)], GOOD, f"block offset {BLOCK} is not one of its shape's"),
        ([ROW._replace(block=-BLOCK)], GOOD, f"block offset -{BLOCK} is not one of"),
        ([ROW._replace(first=1)], GOOD, "[1, 1 + 2) do not follow the 0 entries"),
        ([ROW._replace(count=0)], GOOD, "[0, 0 + 0) do not follow the 0 entries"),
        ([ROW._replace(count=1)], GOOD, "F32: the rows count 1 entries, but there are 2 positions"),
        ([ROW._replace(count=2**63)], GOOD, "entries, but there are 2 positions"),
        ([ROW._replace(count=1), ROW._replace(first=1, count=1)], GOOD, "'w' follows 'w'"),
        (
            [ROW._replace(count=1), Row("a", (4,), "F32", 0, 1, 1)],
            GOOD,
            "rows must be sorted and unique: 'a' follows 'w'",
        ),
        ([ROW], GOOD | {"F16": Group(np.array([], np.int32), *[np.array([], "u2")] * 2)}, "F16: "),
        ([ROW], GOOD | {"odd": GOOD["F32"]}, "unknown dtype 'odd'"),
        ([ROW], {"F32": GOOD["F32"]._replace(new=TWO[:1])}, "1 new and 2 old"),
        (
            [ROW],
            {"F32": GOOD["F32"]._replace(positions=np.array([1, 3]))},
            "F32.positions is int64 of shape [2]; wanted a flat, contiguous int32",
        ),
        ([ROW], {"F32": GOOD["F32"]._replace(old=TWO.astype("u2"))}, "F32.old is uint16"),
        ([ROW], {"F32": GOOD["F32"]._replace(new=np.zeros((2, 1), "u4"))}, "of shape [2, 1]"),
        ([ROW], {"F32": GOOD["F32"]._replace(new=np.zeros(4, "u4")[::2])}, "flat, contiguous"),
        (
            [ROW],
            {"F32": GOOD["F32"]._replace(positions=np.array([1, 4], np.int32))},
            "'w': position 4 is outside [0, 4) (shape [4], block 0)",
        ),
    ],
)
def test_parts_that_do_not_fit(rows, groups, message):
    with pytest.raises(GraftError, match=re.escape(message)):
        Graft(rows, groups, Provenance())


def test_the_arrays_a_graft_was_given_are_not_its_own():
    given = {part: array.copy() for part, array in GOOD["F32"]._asdict().items()}
    graft = Graft([ROW], {"F32": Group(**given)}, Provenance())
    before = [array.tolist() for array in graft.groups["F32"]]
    for array in given.values():
        array[:] = 0  # still the caller's to write
    assert [array.tolist() for array in graft.groups["F32"]] == before


def test_arrays_cannot_be_made_writable(tmp_path):
    graft = small()
    graft.save(tmp_path / "a.graft.safetensors")
    loaded = Graft.load(tmp_path / "a.graft.safetensors")
    tuned = {"w": torch.ones(4)}
    found = diff({"w": torch.zeros(4)}, tuned)
    for one in (graft, loaded, found, graft.invert(), compose([graft]), found.rebase(tuned)):
        arrays = [a for row in one.rows for a in one.arrays(row)]
        arrays += [a for group in one.groups.values() for a in group]
        for array in [*arrays, *one.mask.values()]:
            with pytest.raises(ValueError, match="cannot set WRITEABLE flag"):
                array.setflags(write=True)


@pytest.mark.parametrize("eligible", [1, 2**63])
def test_impossible_denominators(eligible):
    with pytest.raises(GraftError, match=f"{eligible} eligible elements cannot be: the graft has"):
        small(eligible=eligible)


# ---- blocks -----------------------------------------------------------------------------------


def test_beyond_two_to_the_31_a_tensor_has_several_rows():
    """Only indices: no tensor of that size is made."""
    shape = (3, 2**30 + 1)
    where = [0, BLOCK - 1, BLOCK, BLOCK + 5, 3 * 2**30 + 2]
    graft = Graft.from_entries({"w": entries(where, torch.arange(5.0), shape=shape)})
    assert [(r.block, r.first, r.count) for r in graft.rows] == [(0, 0, 2), (BLOCK, 2, 3)]
    assert graft.groups["F32"].positions.tolist() == [0, BLOCK - 1, 0, 5, 2**30 + 2]
    assert graft["w"].indices.tolist() == where
    assert graft["w"].new.tolist() == [0, 1, 2, 3, 4]
    assert graft.mask["w"].tolist() == where
    assert (graft.names, graft.provenance.eligible) == (("w",), 3 * 2**30 + 3)
    assert graft.invert().invert() == graft
    late = Graft.from_entries({"w": entries(where[3:], [1.0, 2.0], shape=shape)})
    assert [(r.block, r.first, r.count) for r in late.rows] == [(BLOCK, 0, 2)]
    with pytest.raises(GraftError, match="an index is outside"):
        Graft.from_entries({"w": entries([3 * 2**30 + 3], [1.0], shape=shape)})
    first, second = graft.rows
    with pytest.raises(GraftError, match="'w': its blocks disagree on shape or dtype"):
        Graft([first, second._replace(shape=(3 * 2**30 + 3,))], graft.groups, Provenance())
    with pytest.raises(GraftError, match=f"position {2**30 + 2} is outside"):
        Graft([r._replace(shape=(3 * 2**30 + 2,)) for r in graft.rows], graft.groups, Provenance())


# ---- invert and from_mask ---------------------------------------------------------------------


@given(st.integers(0, 50))
def test_invert_goes_back(seed):
    base = state(seed, finite=False)
    graft = graft_on(base, seed + 1, finite=False)
    live = grafted(base, graft)
    assert same_bits(grafted(live, graft.invert()), base)
    assert graft.invert().invert() == graft
    assert graft.invert().mask == graft.mask
    assert graft.invert().provenance.method == "inverted"


@given(st.integers(0, 50))
def test_from_mask_carries_what_the_mask_names(seed):
    base = state(seed, finite=False)
    tuned = finetuned(base, seed + 1, finite=False)
    mask = graft_on(base, seed + 2).mask
    graft = Graft.from_mask(base, tuned, mask)
    assert graft.mask == mask  # also where both agree
    assert graft.provenance.method == "given mask"
    assert graft.provenance.eligible == sum(t.numel() for t in base.values())
    live = grafted(base, graft)
    for name in base:
        flat, old, new = bits(live[name]), bits(base[name]), bits(tuned[name])
        inside = np.zeros(len(flat), bool)
        inside[mask[name]] = True
        assert (flat == np.where(inside, new, old)).all()


def test_from_mask_refuses():
    base = state()
    tuned = finetuned(base)
    with pytest.raises(GraftError, match="the mask is empty: a graft needs at least one entry"):
        Graft.from_mask(base, tuned, Mask({}))
    with pytest.raises(CoverageError, match="the base lacks 'x', which the mask names"):
        Graft.from_mask(base, tuned, Mask({"x": ((1,), [0])}))
    with pytest.raises(BaseMismatchError, match=r"'step' has shape \[\] in the base and \[1\] in"):
        Graft.from_mask(base, tuned, Mask({"step": ((1,), [0])}))
    del tuned["step"]
    with pytest.raises(CoverageError, match="the fine-tuned model lacks 'step'"):
        Graft.from_mask(base, tuned, Mask({"step": ((), [0])}))
