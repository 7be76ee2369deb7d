"""What the bits of an element mean and how a number becomes bits: csrc/core/value.h in Triton.

Types are named by the codes of `ValueType` there. Elements come and go as integers of their size.
"""

from __future__ import annotations

import triton
import triton.language as tl

BF16 = tl.constexpr(0)
F16 = tl.constexpr(1)
F32 = tl.constexpr(2)
F64 = tl.constexpr(3)
F8_E4M3 = tl.constexpr(4)
F8_E5M2 = tl.constexpr(5)
U8 = tl.constexpr(10)
U64 = tl.constexpr(13)
INFINITY = tl.constexpr(0x7FF0_0000_0000_0000)
"""The bits of a double that is infinite; a NaN's are above it."""


@triton.jit
def _decode_small(bits, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """fp8 to fp32. The power of two and the product with it are exact."""
    byte = bits.to(tl.int32) & 0xFF
    exponent = (byte >> MANTISSA_BITS) & ((1 << EXPONENT_BITS) - 1)
    mantissa = byte & ((1 << MANTISSA_BITS) - 1)
    normal = exponent > 0
    significand = tl.where(normal, mantissa + (1 << MANTISSA_BITS), mantissa)
    scale = tl.where(normal, exponent, 1) - ((1 << (EXPONENT_BITS - 1)) - 1) - MANTISSA_BITS
    power = ((127 + scale) << 23).to(tl.float32, bitcast=True)
    body = (significand.to(tl.float32) * power).to(tl.int32, bitcast=True)
    if EXPONENT_BITS == 4:  # e4m3 has no infinity and one NaN
        body = tl.where((byte & 0x7F) == 0x7F, 0x7FC00000, body)
    else:
        beyond = tl.where(mantissa > 0, 0x7FC00000, 0x7F800000)
        body = tl.where(exponent == (1 << EXPONENT_BITS) - 1, beyond, body)
    return (body | ((byte & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def decode(bits, TYPE: tl.constexpr):
    """The number, in the type in which a difference is taken: fp32, or fp64 for fp32 and fp64."""
    if TYPE == BF16:
        number = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif TYPE == F16:
        number = bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif TYPE == F32:
        number = bits.to(tl.float32, bitcast=True).to(tl.float64)
    elif TYPE == F64:
        number = bits.to(tl.float64, bitcast=True)
    elif TYPE == F8_E4M3:
        number = _decode_small(bits, 4, 3)
    else:
        number = _decode_small(bits, 5, 2)
    return number


@triton.jit
def _encode_small(bits, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """A double's bits as the nearest value's of a smaller format, ties to even, as int64."""
    bias: tl.constexpr = (1 << (EXPONENT_BITS - 1)) - 1
    infinity: tl.constexpr = ((1 << EXPONENT_BITS) - 1) << MANTISSA_BITS
    hidden: tl.constexpr = 1 << 52
    sign = ((bits >> 63) & 1) << (EXPONENT_BITS + MANTISSA_BITS)
    biased = (bits >> 52) & 0x7FF
    mantissa = bits & (hidden - 1)
    exponent = biased - 1023
    normal = exponent >= 1 - bias
    # From a shift of 54 on everything rounds to zero, subnormal doubles included.
    shift = tl.minimum(52 - MANTISSA_BITS + tl.where(normal, 0, 1 - bias - exponent), 60)
    one = tl.full(bits.shape, 1, tl.int64)
    significand = mantissa | hidden
    remainder = significand & ((one << shift) - 1)
    half = one << (shift - 1)
    rounded = significand >> shift
    up = (remainder > half) | ((remainder == half) & ((rounded & 1) == 1))
    rounded = tl.where(up, rounded + 1, rounded)
    # A carry out of the mantissa runs into the exponent, which is what it should do.
    lifted = rounded + ((exponent + bias - 1) << MANTISSA_BITS)
    magnitude = tl.minimum(tl.where(normal, lifted, rounded), infinity)
    quiet: tl.constexpr = infinity | (1 << (MANTISSA_BITS - 1))
    beyond = tl.where(mantissa != 0, quiet, infinity)
    return sign | tl.where(biased == 0x7FF, beyond, magnitude)


@triton.jit
def encode(number, TYPE: tl.constexpr):
    """The bits nearest to a double, rounded once; a NaN becomes the quiet NaN of its sign."""
    bits = number.to(tl.int64, bitcast=True)
    if TYPE == BF16:
        found = _encode_small(bits, 8, 7).to(tl.int16)
    elif TYPE == F16:
        found = _encode_small(bits, 5, 10).to(tl.int16)
    elif TYPE == F32:
        found = _encode_small(bits, 8, 23).to(tl.int32)
    else:
        payload: tl.constexpr = 0x000F_FFFF_FFFF_FFFF
        quiet = (bits & ~payload) | 0x0008_0000_0000_0000
        found = tl.where((bits & 0x7FFF_FFFF_FFFF_FFFF) > INFINITY, quiet, bits)
    return found


@triton.jit
def _distance(a, b, TYPE: tl.constexpr):
    """|a - b| of integers: exact, then rounded once to a double."""
    x = a.to(tl.int64)
    y = b.to(tl.int64)
    if TYPE == U64:
        above = x.to(tl.uint64, bitcast=True) > y.to(tl.uint64, bitcast=True)
    else:
        if TYPE >= U8:  # undo the sign that widening spread
            ones: tl.constexpr = (1 << a.dtype.primitive_bitwidth) - 1
            x = x & ones
            y = y & ones
        above = x > y
    return tl.where(above, x - y, y - x).to(tl.uint64, bitcast=True).to(tl.float64)


@triton.jit
def score(a, b, TYPE: tl.constexpr):
    """The bits of the double |a - b|, by which entries are ranked; above INFINITY for a NaN."""
    if TYPE > F8_E5M2:
        wide = _distance(a, b, TYPE)
    else:
        wide = (decode(a, TYPE) - decode(b, TYPE)).to(tl.float64)
    return wide.to(tl.int64, bitcast=True) & 0x7FFF_FFFF_FFFF_FFFF
