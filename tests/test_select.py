"""select against the reference: the exact difference, and exactly the k largest of many tensors."""

import numpy as np
import pytest
import torch
from agreement import BACKENDS, check_select, selection
from factories import from_bits, random_bits, specials
from hotgraft import _native
from hotgraft.format import DTYPES, DType
from hotgraft.kernels import NanDifferenceError, Pair, native_cpu, ranking
from hotgraft.kernels.reference import BACKEND as REFERENCE
from hypothesis import given
from hypothesis import strategies as st

BLOCK = 64  # entries that the streaming loops test together
PIECE = 1 << 16  # entries that a thread claims at a time
WINDOW = 1 << 22  # entries between two looks at the ties that are left


def pair(base: np.ndarray, fresh: np.ndarray, dtype: DType, start: int = 0) -> Pair:
    """A pair whose tensors begin `start` elements into their memory."""
    front = np.zeros(start, base.dtype)
    left, right = (
        from_bits(np.concatenate([front, side]), dtype, (start + len(side),))[start:]
        for side in (base, fresh)
    )
    return Pair(left, right, dtype)


@st.composite
def random_pairs(draw: st.DrawFn) -> list[Pair]:
    """A few tensors, mixed dtypes, any bits, NaN now and then; often nothing differs."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        n, seed = draw(st.integers(0, 2 * BLOCK + 9)), draw(st.integers(0, 99))
        finite = draw(st.integers(0, 5)) > 0
        base = random_bits(dtype, n, seed, finite=finite)
        fresh = random_bits(dtype, n, seed + 1, finite=finite)
        same = np.random.default_rng(seed).random(n) < draw(st.sampled_from([0, 0.5, 0.95, 1]))
        fresh[same] = base[same]
        found.append(pair(base, fresh, dtype, draw(st.integers(0, 9))))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@given(random_pairs(), st.integers(1, 300) | st.none(), st.sampled_from([0, 3, 1 << 19]))
def test_select_agrees(backend, pairs, k, slack):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "SLACK", slack)
        check_select(backend, pairs, k)


def levels(dtype: DType, digit: int) -> list[int]:
    """Bits whose distance from zero shares the leading `digit` 16-bit digits of its score."""
    if dtype.name in ("F64", "I64"):
        step = [1 << 50, 1 << 40, 1 << 20, 1][digit]
        one = 0x3FF0_0000_0000_0000 if dtype.name == "F64" else 1 << 52
        return [one, one + step, one + 2 * step]
    return specials(dtype)[2:12:2] if dtype.nonfinite else [1, 2, 3]


@st.composite
def tied_pairs(draw: st.DrawFn) -> list[Pair]:
    """Tensors with few distinct differences: most entries tie, across tensors too."""
    dtype = DTYPES[draw(st.sampled_from(["F64", "I64", "F64", "I64", "F32", "BF16", "F16", "I8"]))]
    values = np.array(levels(dtype, draw(st.integers(0, 3))), dtype.bits)
    found = []
    for _ in range(draw(st.integers(1, 3))):
        n, seed = draw(st.integers(1, 150)), draw(st.integers(0, 99))
        rng = np.random.default_rng(seed)
        base = np.zeros(n, dtype.bits)
        fresh = np.where(rng.random(n) < 0.7, rng.choice(values, n), base)
        if draw(st.booleans()):
            base, fresh = fresh, base
        found.append(pair(base, fresh, dtype, seed % 3))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@given(tied_pairs(), st.integers(1, 300), st.sampled_from([0, 0, 1, 20, 1 << 19]))
def test_ties_go_to_the_earlier_tensor_then_the_lower_position(backend, pairs, k, slack):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "SLACK", slack)
        check_select(backend, pairs, k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "I8", "U64"])
def test_every_length_and_start(backend, dtype):
    kind = DTYPES[dtype]
    for n in range(2 * BLOCK + 2):
        base = random_bits(kind, n, n, finite=True)
        fresh = base.copy()
        fresh[n // 2 :: 29] = random_bits(kind, len(fresh[n // 2 :: 29]), n + 1, finite=True)
        pairs = [pair(base, fresh, kind, n % 5)]
        check_select(backend, pairs, None)
        check_select(backend, pairs, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_result_has_exactly_k_entries_and_they_are_the_largest(backend, dtype):
    kind = DTYPES[dtype]
    base, fresh = (random_bits(kind, 3 * PIECE + 77, s, finite=True) for s in (1, 2))
    keep = np.random.default_rng(0).random(len(base)) < 0.997
    fresh[keep] = base[keep]
    pairs = [pair(base[:PIECE], fresh[:PIECE], kind), pair(base[PIECE:], fresh[PIECE:], kind, 1)]
    differing = sum(len(p) for p in REFERENCE.select(pairs, None))
    for k in (1, 50, differing - 1):
        assert sum(len(p) for p in backend.select(pairs, k)) == k
    check_select(backend, pairs, 50)
    assert selection(backend, pairs, differing) == selection(REFERENCE, pairs, None)
    assert selection(backend, pairs, 10 * differing) == selection(REFERENCE, pairs, None)


@pytest.mark.parametrize("backend", BACKENDS[::2])
@pytest.mark.parametrize("slack", [0, 1 << 19])
def test_ties_are_counted_across_windows_and_threads(backend, slack, monkeypatch):
    monkeypatch.setattr(ranking, "SLACK", slack)
    base = np.zeros(2 * WINDOW + 5, np.uint8)
    fresh = base.copy()
    ties = np.r_[:40, PIECE - 3 : PIECE + 3, WINDOW - 5 : WINDOW + 5, 2 * WINDOW - 2 : len(base)]
    fresh[ties] = 7
    fresh[[100, 2 * WINDOW + 4]] = 9
    pairs = [pair(base, fresh, DTYPES["U8"]), pair(base[:90], fresh[:90], DTYPES["U8"])]
    for k in (1, 2, 3, 45, 50, 60, 61, 63, 64, 70, 103):
        check_select(backend, pairs, k)


def test_each_digit_of_the_score_can_decide(monkeypatch):
    """Scores that agree up to the 1st, 2nd or 3rd 16 bits are told apart by the next ones."""
    monkeypatch.setattr(ranking, "SLACK", 0)
    reads = []
    count_scores = _native.count_scores

    def counted(*arguments):
        reads.append(arguments[4])
        return count_scores(*arguments)

    monkeypatch.setattr(_native, "count_scores", counted)
    for digit, shifts in enumerate([[48], [48, 32], [48, 32, 16], [48, 32, 16, 0]]):
        fresh = np.array(levels(DTYPES["F64"], digit)[:2] * 10, np.uint64)
        pairs = [pair(np.zeros_like(fresh), fresh, DTYPES["F64"])]
        for parameter in BACKENDS:
            reads.clear()
            check_select(parameter.values[0], pairs, 10)
            assert reads == shifts


def test_a_full_boundary_bin_costs_another_read_only_beyond_the_slack(monkeypatch):
    fresh = np.full(50, 0x3FF0_0000_0000_0000, np.uint64)
    pairs = [pair(np.zeros_like(fresh), fresh, DTYPES["F64"])]
    collected = []
    collect = _native.collect

    def recorded(*arguments):
        collected.append(arguments[4:6])
        return collect(*arguments)

    monkeypatch.setattr(_native, "collect", recorded)
    for slack in (39, 40):
        monkeypatch.setattr(ranking, "SLACK", slack)
        assert native_cpu.BACKEND.select(pairs, 10)[0].tolist() == list(range(10))
    assert [ties for _, ties in collected] == [10, 1 << 62]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"])
def test_nan_is_refused_with_its_place(backend, dtype):
    kind = DTYPES[dtype]
    nan = max(b for b in specials(kind) if b < 1 << (8 * kind.item_size - 1))
    clean = np.zeros(3, kind.bits)
    for place in (0, 63, 64, PIECE - 1, PIECE, 2 * PIECE + 5):
        base = np.zeros(2 * PIECE + 9, kind.bits)
        fresh = base.copy()
        fresh[:: PIECE // 4] = specials(kind)[6]  # larger than nothing, smaller than nothing
        fresh[[place, 2 * PIECE + 8]] = nan
        pairs = [pair(clean, clean + 1, kind), pair(base, fresh, kind)]
        with pytest.raises(NanDifferenceError) as caught:
            backend.select(pairs, 1)
        assert caught.value.args == (1, place)
        check_select(backend, pairs, None)
    # The same NaN on both sides is no difference.
    same = np.full(70, nan, kind.bits)
    fresh = same.copy()
    fresh[69] = 0
    with pytest.raises(NanDifferenceError) as caught:
        backend.select([pair(same, fresh, kind)], 1)
    assert caught.value.args == (0, 69)
    check_select(backend, [pair(same, same, kind), pair(clean, clean + 1, kind)], 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_infinite_differences_rank_first(backend, dtype):
    kind = DTYPES[dtype]
    infinity, largest = kind.nonfinite, kind.nonfinite - 1
    fresh = np.array([largest, infinity, 1, infinity | 1 << (8 * kind.item_size - 1)], kind.bits)
    pairs = [pair(np.zeros_like(fresh), fresh, kind)]
    assert backend.select(pairs, 2)[0].tolist() == [1, 3]
    assert backend.select(pairs, 3)[0].tolist() == [0, 1, 3]
    check_select(backend, pairs, 1)


def test_negative_zero_differs_but_ranks_last():
    fresh = torch.tensor([-0.0, 1e-45, 0.0])
    for parameter in BACKENDS:
        backend = parameter.values[0]
        pairs = [Pair(torch.zeros(3), fresh, DTYPES["F32"])]
        assert backend.select(pairs, None)[0].tolist() == [0, 1]
        assert backend.select(pairs, 1)[0].tolist() == [1]
        assert backend.select(pairs, 2)[0].tolist() == [0, 1]


def test_integer_differences_do_not_wrap():
    low, high = -(2**63), 2**63 - 1
    base = torch.tensor([low, 0, 0], dtype=torch.int64)
    fresh = torch.tensor([high, high, low], dtype=torch.int64)
    for parameter in BACKENDS:
        pairs = [Pair(base, fresh, DTYPES["I64"])]
        assert parameter.values[0].select(pairs, 1)[0].tolist() == [0]
        check_select(parameter.values[0], pairs, 2)


def test_flushed_subnormals_change_nothing():
    """torch.set_flush_denormal makes subnormals zero in this thread; not in the verbs."""
    pairs = []
    for dtype in ("F16", "BF16", "F32"):
        fresh = np.array([1, 3, 2, 0, 5], DTYPES[dtype].bits)
        pairs.append([pair(np.zeros_like(fresh), fresh, DTYPES[dtype])])
    assert torch.set_flush_denormal(True)
    try:
        for parameter in BACKENDS:
            for p in pairs:
                assert parameter.values[0].select(p, 2)[0].tolist() == [1, 4]
    finally:
        torch.set_flush_denormal(False)


def test_nothing_to_compare():
    nothing = torch.zeros(0)
    for parameter in BACKENDS:
        backend = parameter.values[0]
        assert [len(p) for p in backend.select([Pair(nothing, nothing, DTYPES["F32"])], 5)] == [0]
        assert backend.select([], None) == []
        assert backend.select([], 5) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 2**31 + 1, 4), r"n must be in \[0, 2\^31\]"),
        ((0, 0, -1, 4), r"n must be in \[0, 2\^31\]"),
        ((0, 0, 1, 5), "item_size must be 1, 2, 4 or 8"),
    ],
)
def test_difference_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        _native.Difference(*arguments)


@pytest.mark.parametrize(
    ("room", "message"),
    [
        ((np.zeros(1, np.int32), np.zeros(2, np.uint16), np.zeros(2, np.uint16)), "positions"),
        ((np.zeros(2, np.int32), np.zeros(2, np.uint32), np.zeros(2, np.uint16)), "new and old"),
        ((np.zeros(2, np.int32), np.zeros(2, np.uint16), np.zeros(4, np.uint16)[::2]), "new and"),
    ],
)
def test_difference_writes_into_nothing_else(room, message):
    base, fresh = np.zeros(9, np.uint16), np.zeros(9, np.uint16)
    fresh[[2, 7]] = 5
    found = _native.Difference(base.ctypes.data, fresh.ctypes.data, 9, 2)
    assert found.count == 2
    with pytest.raises(ValueError, match=message):
        found.write(*room)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: 14}, "unknown value type code"),
        ({0: -1}, "unknown value type code"),
        ({3: -1}, r"n in \[0, 2\^31\]"),
        ({4: 8}, "shift must be 48, 32, 16 or 0"),
        ({4: 64}, "shift must be 48, 32, 16 or 0"),
        ({6: 0}, "k must be positive"),
        ({7: np.zeros((1, 5), np.int64)}, r"counts must be int64\[workers\]"),
        ({8: 4}, "unknown instruction set code"),
    ],
)
def test_count_scores_refuses(changes, message):
    arguments = [0, 0, 0, 0, 48, 0, 1, np.zeros((1, _native.COUNTS_WIDTH), np.int64), 0]
    for index, value in changes.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        _native.count_scores(*arguments)


def test_collect_refuses():
    with pytest.raises(ValueError, match=r"n must be in \[0, 2\^31\]"):
        _native.collect(0, 0, 0, 2**31 + 1, 0, 0)
    with pytest.raises(ValueError, match="ties must not be negative"):
        _native.collect(0, 0, 0, 0, 0, -1)
