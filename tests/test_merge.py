"""merge and round against the reference: every policy, every type, every bit."""

import numpy as np
import pytest
import torch
from agreement import BACKENDS, check_merge, check_round
from factories import FLOATS, random_bits, specials
from hotgraft import _native
from hotgraft.format import DTYPES
from hotgraft.kernels import POLICIES, Source
from hotgraft.kernels.native_cpu import BACKEND as CPU
from hotgraft.kernels.reference import tensor_bits
from hypothesis import given
from hypothesis import strategies as st

WEIGHTS = [1.0, 1.0, 1.0, 0.5, 2.0, -1.0, 0.0, 1 / 3, 1e-300, 1e300]


def numbers(dtype, n, seed):
    """Bits of values near one another, so that sums cancel, round and tie."""
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.integers(-40, 41, n) * 2.0 ** -rng.integers(0, 12, n))
    return tensor_bits(values.to(DTYPES[dtype].torch))


@st.composite
def merges(draw: st.DrawFn):
    """Up to five sources over a few rows: empty rows, shared and lone positions, wrong bases."""
    policy = draw(st.sampled_from(POLICIES))
    names = sorted(DTYPES) if policy in ("refuse", "priority") else FLOATS
    dtype = DTYPES[draw(st.sampled_from(names))]
    k, rows, seed = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(0, 999))
    cells = draw(st.sampled_from([1, 6, 40]))
    tame = dtype.has_arithmetic and draw(st.booleans())
    make = numbers if tame else lambda name, n, s: random_bits(DTYPES[name], n, s, finite=s % 7 > 0)
    rng = np.random.default_rng(seed)
    base = make(dtype.name, rows * cells, seed).reshape(rows, cells)
    wrong = draw(st.sampled_from([0, 0, 0, 0.1]))
    weights = draw(st.lists(st.sampled_from(WEIGHTS), min_size=k, max_size=k))
    sources, ranges = [], np.zeros((rows, k, 2), np.int64)
    for i in range(k):
        positions, old = [], []
        for row in range(rows):
            share = draw(st.sampled_from([0, 0.3, 1]))
            here = np.flatnonzero(rng.random(cells) < share).astype(np.int32)
            ranges[row, i] = sum(map(len, positions)), len(here)
            positions.append(here)
            held = base[row, here]
            held[rng.random(len(here)) < wrong] ^= 1
            old.append(held)
        new = make(dtype.name, sum(map(len, positions)), seed + i + 1)
        weight = weights[i] if dtype.has_arithmetic else 1.0
        # Some entries write what is there, or what another source writes.
        flat_old = np.concatenate(old)
        keep = rng.random(len(new)) < 0.2
        new[keep] = flat_old[keep]
        sources.append(Source(np.concatenate(positions), new, flat_old, weight))
    return sources, ranges, dtype, policy, draw(st.permutations(range(k)))


@pytest.mark.parametrize("backend", BACKENDS[:3])
@given(merges())
def test_merge_agrees(backend, case):
    check_merge(backend, *case)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows_are_shared_among_threads(dtype, policy):
    rows, each, k = 41, 9, 3
    rng = np.random.default_rng(1)
    sources, ranges = [], np.zeros((rows, k, 2), np.int64)
    base = numbers(dtype, rows * 20, 2).reshape(rows, 20)
    for i in range(k):
        where = np.array([np.sort(rng.choice(20, each, replace=False)) for _ in range(rows)])
        ranges[:, i] = [(row * each, each) for row in range(rows)]
        old = np.take_along_axis(base, where, 1).ravel()
        new = numbers(dtype, rows * each, i + 5)
        sources.append(Source(where.ravel().astype(np.int32), new, old, [1.0, 0.5, -0.25][i]))
    for parameter in BACKENDS[:3]:
        check_merge(parameter.values[0], sources, ranges, DTYPES[dtype], policy, [1, 2, 0])


def lone(dtype, new, old, weight=1.0, position=0):
    kind = DTYPES[dtype]
    return Source(
        np.array([position], np.int32),
        np.array([new], kind.bits),
        np.array([old], kind.bits),
        weight,
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"])
def test_alone_at_weight_one_is_a_copy(dtype, policy):
    """NaN payloads, infinities and -0 come through, whatever the base holds."""
    kind = DTYPES[dtype]
    every = np.array(specials(kind), kind.bits)
    positions = np.arange(len(every), dtype=np.int32)
    source = Source(positions, every, every[::-1].copy(), 1.0)
    ranges = np.array([[[0, len(every)]]], np.int64)
    merged = CPU.merge([source], ranges, kind, policy, [0])
    assert merged.new.tobytes() == every.tobytes()
    assert (merged.overflows, merged.base_mismatches) == (0, 0)


@pytest.mark.parametrize(
    ("policy", "new", "weights", "wanted"),
    [
        # Base 1.0 everywhere; what shared values become, worked out by hand.
        ("sum", [2.0, 3.0], [1, 1], 4.0),
        ("sum", [2.0, 3.0], [0.5, -1], -0.5),
        ("mean", [2.0, 4.0], [1, 1], 3.0),
        ("mean", [2.0, 4.0], [1, 0], 1.5),
        ("priority", [2.0, 3.0], [1, 1], 3.0),
        ("priority", [2.0, 3.0], [1, 0.5], 2.0),
        ("sign", [2.0, 4.0, 0.0], [1, 1, 1], 3.0),
        ("sign", [2.0, 0.0], [1, 1], 1.0),
        ("sign", [2.0, 1.0], [1, 1], 2.0),
        ("sign", [0.5, 2.0, 0.0], [1, 1, 1], 0.25),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_policies_by_hand(dtype, policy, new, weights, wanted):
    def bits(value):
        return int(tensor_bits(torch.tensor([value], dtype=DTYPES[dtype].torch))[0])

    sources = [lone(dtype, bits(n), bits(1.0), w) for n, w in zip(new, weights, strict=True)]
    ranges = np.array([[[0, 1]] * len(new)], np.int64)
    merged = CPU.merge(sources, ranges, DTYPES[dtype], policy, range(len(new)))
    assert merged.new.tolist() == [bits(wanted)]
    assert merged.old.tolist() == [bits(1.0)]
    check_merge(CPU, sources, ranges, DTYPES[dtype], policy, range(len(new)))


def test_a_sum_is_rounded_once():
    """1 + (2^-8 + 2^-40) is just above the middle of two bf16 values; by way of float it is not."""
    base = 0x3F80  # 1.0
    sources = [lone("BF16", 0x3F81, base, 0.5), lone("BF16", 0x3F81, base, 2.0**-33)]
    merged = (
        BACKENDS[0]
        .values[0]
        .merge(sources, np.array([[[0, 1], [0, 1]]], np.int64), DTYPES["BF16"], "sum", [0, 1])
    )
    assert merged.new.tolist() == [0x3F81]  # 1.0078125


def test_flushed_subnormals_change_nothing():
    ranges = np.array([[[0, 1], [0, 1]]], np.int64)
    assert torch.set_flush_denormal(True)
    try:
        for dtype in ("BF16", "F16", "F32"):
            sources = [lone(dtype, 3, 1), lone(dtype, 6, 1)]  # subnormals: 1 + 2 + 5 steps
            merged = CPU.merge(sources, ranges, DTYPES[dtype], "sum", [0, 1])
            assert merged.new.tolist() == [8]
            tiny = np.array([2.0**-149 if dtype != "F16" else 2.0**-24])
            rounded, _ = CPU.round(tiny.view(np.uint64), DTYPES["F64"], DTYPES[dtype])
            assert rounded.tolist() == [0 if dtype == "BF16" else 1]
    finally:
        torch.set_flush_denormal(False)


def test_conflicts_are_counted_for_each_pair():
    old = np.zeros(4, np.uint16)
    where = np.arange(4, dtype=np.int32)
    sources = [
        Source(where, np.array(new, np.uint16), old, 1.0)
        for new in ([1, 1, 1, 1], [1, 2, 2, 1], [1, 2, 3, 1])
    ]
    ranges = np.array([[[0, 4]] * 3], np.int64)
    for parameter in BACKENDS[:3]:
        merged = parameter.values[0].merge(sources, ranges, DTYPES["BF16"], "refuse", [0, 1, 2])
        assert merged.conflicts.tolist() == [[0, 2, 2], [0, 0, 1], [0, 0, 0]]


def test_the_first_wrong_base_and_overflow_are_the_lowest():
    k, rows = 2, 30
    largest = 0x7F7F
    ranges = np.zeros((rows, k, 2), np.int64)
    ranges[:, :, 0], ranges[:, :, 1] = 2 * np.arange(rows)[:, None], 2
    where = np.tile(np.array([3, 8], np.int32), rows)
    fresh = np.full(2 * rows, 1, np.uint16)
    other = np.zeros(2 * rows, np.uint16)
    other[[2 * 20 + 1, 2 * 25]] = 5
    fresh[[2 * 7 + 1, 2 * 9]] = largest
    sources = [
        Source(where, fresh, np.zeros(2 * rows, np.uint16), 1.0),
        Source(where, fresh, other, 1.0),
    ]
    for parameter in BACKENDS[:3]:
        merged = parameter.values[0].merge(sources, ranges, DTYPES["BF16"], "sum", [0, 1])
        assert (merged.base_mismatches, merged.first_base_mismatch) == (2, (20, 8))
        assert (merged.overflows, merged.first_overflow) == (2, (7, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranges": np.array([[[0, 3]]])}, "a range reaches beyond its source"),
        ({"ranges": np.array([[[3, 1]]])}, "a range reaches beyond its source"),
        ({"ranges": np.array([[[-1, 1]]])}, "a range reaches beyond its source"),
        ({"ranges": np.array([[[0, 2**62]]])}, "a range reaches beyond its source"),
        ({"ranges": np.array([[0, 1]])}, r"ranges must be int64\[rows\]\[sources\]\[2\]"),
        ({"order": np.array([0, 1])}, r"order must be int64\[sources\]"),
        ({"policy": 5}, "unknown policy code"),
        ({"type": 14}, "unknown value type code"),
        ({"type": 2}, "new and old must be contiguous arrays as long as their positions"),
    ],
)
def test_merge_refuses(changes, message):
    two = np.zeros(2, np.uint16)
    arguments = {
        "sources": [(np.arange(2, dtype=np.int32), two, two, 1.0)],
        "ranges": np.array([[[0, 2]]]),
        "type": 0,
        "policy": 0,
        "order": np.array([0]),
    }
    with pytest.raises(ValueError, match=message):
        _native.merge(**(arguments | changes))


def test_merge_copes_with_strided_positions():
    two = np.array([1, 2], np.uint16)
    strided = np.arange(8, dtype=np.int32)[::4]
    sources = [(strided + 0, two, two, 1.0), (strided, two, two, 1.0)]
    counts, positions, *_ = _native.merge(
        sources, np.array([[[0, 2], [0, 2]]]), 0, 0, np.array([0, 1])
    )
    assert (counts.tolist(), positions.tolist()) == ([2], [0, 4])


# ---- round ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_round_agrees(source, target):
    values = np.concatenate(
        [
            np.array(specials(DTYPES[source]), DTYPES[source].bits),
            random_bits(DTYPES[source], 700, 3),
            numbers(source, 100, 4),
        ]
    )
    check_round(CPU, values, source, target)


@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
def test_round_agrees_in_the_middle_between_values(target):
    """Doubles on, just below and just above the middle of neighbours, subnormal ones included."""
    kind = DTYPES[target]
    held = random_bits(kind, 150, 8, finite=True)
    held = held[(held & (kind.nonfinite | (kind.nonfinite - 1))) + 1 < kind.nonfinite]
    here, above = (torch.from_numpy(b).view(kind.torch).double().numpy() for b in (held, held + 1))
    middle = here / 2 + above / 2
    doubles = np.concatenate([np.nextafter(middle, np.inf), middle, np.nextafter(middle, -np.inf)])
    check_round(CPU, doubles.view(np.uint64), "F64", target)


@pytest.mark.parametrize(
    ("number", "target", "bits"),
    [
        (1 + 2.0**-8 + 2.0**-40, "BF16", 0x3F81),  # 1.0078125; by way of float it would be 1.0
        (1 + 2.0**-8, "BF16", 0x3F80),
        (1 + 3 * 2.0**-8, "BF16", 0x3F82),
        (2.0**-133, "BF16", 0x0001),
        (2.0**-134, "BF16", 0x0000),
        (-(2.0**-134), "BF16", 0x8000),
        (1.5 * 2.0**-134, "BF16", 0x0001),
        (2.0**-126 - 2.0**-134, "BF16", 0x0080),  # a subnormal that rounds up to a normal
        (65519.999, "F16", 0x7BFF),
        (65520.0, "F16", 0x7C00),
        (-1e300, "BF16", 0xFF80),
        (5e-324, "F32", 0x0000_0000),
        (3.4028235677973366e38, "F32", 0x7F80_0000),
        (3.4028235677973362e38, "F32", 0x7F7F_FFFF),
    ],
)
def test_round_by_hand(number, target, bits):
    values = np.array([number]).view(np.uint64)
    rounded, overflows = CPU.round(values, DTYPES["F64"], DTYPES[target])
    assert hex(rounded[0]) == hex(bits)
    infinite = (bits & DTYPES[target].nonfinite) == DTYPES[target].nonfinite
    assert overflows == infinite
    check_round(CPU, values, "F64", target)


@pytest.mark.parametrize(("source", "target"), [("BF16", "F16"), ("F16", "BF16")])
def test_every_16_bit_value(source, target):
    """All of them, against torch, whose way through float is exact here."""
    every = np.arange(1 << 16, dtype=np.uint16)
    rounded, _ = CPU.round(every, DTYPES[source], DTYPES[target])
    by_torch = torch.from_numpy(every).view(DTYPES[source].torch).to(DTYPES[target].torch)
    number = ~by_torch.isnan().numpy()
    assert (rounded[number] == by_torch.view(torch.uint16).numpy()[number]).all()
    quiet = DTYPES[target].nonfinite | (DTYPES[target].nonfinite & -DTYPES[target].nonfinite) >> 1
    assert (rounded[~number] == ((every[~number] & 0x8000) | quiet)).all()


def test_round_widens_exactly():
    for source in FLOATS:
        values = random_bits(DTYPES[source], 300, 5, finite=True)
        wide, overflows = CPU.round(values, DTYPES[source], DTYPES["F64"])
        back, _ = CPU.round(wide, DTYPES["F64"], DTYPES[source])
        assert (overflows, back.tobytes()) == (0, values.tobytes())


def test_round_refuses():
    four = np.zeros(4, np.uint16)
    with pytest.raises(ValueError, match="only bf16, f16, f32 and f64 can be rounded"):
        _native.round(4, four, 0)
    for values in (four.astype(np.uint32), four[::2], four.reshape(2, 2)):
        with pytest.raises(ValueError, match="a contiguous array of the source type's bits"):
            _native.round(0, values, 1)
