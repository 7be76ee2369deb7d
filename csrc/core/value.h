// Value types: what the bits of an element mean, and how a number becomes bits.
//
// Only `select`, `merge` and `round` look at values. Widening is exact.
// `encode` rounds a double to the nearest value of the type, ties to even, in
// one step: going through float first would round twice
// (1 + 2^-8 + 2^-40 is 1.0078125 in bf16, but 1.0 by way of float). A NaN becomes the quiet NaN of
// its sign, on every machine the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/table.h"

namespace hotgraft {

template <class To, class From>
HOTGRAFT_HD inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

// Bits of a small binary format with ExponentBits and MantissaBits (IEEE-like: the top exponent is
// infinity and NaN) nearest to x, ties to even.
template <int ExponentBits, int MantissaBits>
HOTGRAFT_HD inline std::uint32_t encode_small(double x) {
    constexpr int bias = (1 << (ExponentBits - 1)) - 1;
    constexpr std::uint32_t infinity = ((1u << ExponentBits) - 1) << MantissaBits;
    constexpr std::uint64_t hidden = 1ull << 52;
    const std::uint64_t bits = bit_cast<std::uint64_t>(x);
    const std::uint32_t sign = static_cast<std::uint32_t>(bits >> 63)
                               << (ExponentBits + MantissaBits);
    const int biased = static_cast<int>((bits >> 52) & 0x7ff);
    const std::uint64_t mantissa = bits & (hidden - 1);
    if (biased == 0x7ff) {
        return sign | infinity | (mantissa != 0 ? 1u << (MantissaBits - 1) : 0u);
    }
    if (biased == 0) return sign;  // a subnormal double is below half of any small subnormal
    const int exponent = biased - 1023;
    const bool normal = exponent >= 1 - bias;
    int shift = 52 - MantissaBits + (normal ? 0 : 1 - bias - exponent);
    if (shift > 63) shift = 63;
    const std::uint64_t significand = mantissa | hidden;
    const std::uint64_t remainder = significand & ((1ull << shift) - 1);
    const std::uint64_t half = 1ull << (shift - 1);
    std::uint64_t rounded = significand >> shift;
    // As a sum and not a condition: which way a value rounds cannot be foreseen.
    rounded += static_cast<std::uint64_t>(remainder > half) |
               (static_cast<std::uint64_t>(remainder == half) & rounded & 1);
    // A carry out of the mantissa runs into the exponent, which is what it should do.
    std::uint64_t magnitude = rounded;
    if (normal) {
        magnitude += static_cast<std::uint64_t>(exponent + bias) << MantissaBits;
        magnitude -= 1ull << MantissaBits;
    }
    if (magnitude > infinity) magnitude = infinity;
    return sign | static_cast<std::uint32_t>(magnitude);
}

// ---- floating types: `Bits` as stored, `Wide` in which a difference is taken ------------------

struct BFloat16 {
    using Bits = std::uint16_t;
    using Wide = float;
    HOTGRAFT_HD static float decode(Bits bits) {
        return bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
    }
    HOTGRAFT_HD static Bits encode(double x) { return static_cast<Bits>(encode_small<8, 7>(x)); }
};

struct Float16 {
    using Bits = std::uint16_t;
    using Wide = float;
    HOTGRAFT_HD static float decode(Bits bits) {
        // Shift the exponent and mantissa into a float's place, then multiply the bias away: this
        // also gives subnormals their value. The top exponent is put back by hand.
        const std::uint32_t body = static_cast<std::uint32_t>(bits & 0x7fffu) << 13;
        const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
        const float scaled = bit_cast<float>(body) * 0x1p112f;
        std::uint32_t wide = bit_cast<std::uint32_t>(scaled);
        wide = (bits & 0x7c00u) == 0x7c00u ? body | 0x7f800000u : wide;
        return bit_cast<float>(wide | sign);
    }
    HOTGRAFT_HD static Bits encode(double x) { return static_cast<Bits>(encode_small<5, 10>(x)); }
};

struct Float32 {
    using Bits = std::uint32_t;
    using Wide = double;
    HOTGRAFT_HD static double decode(Bits bits) { return bit_cast<float>(bits); }
    HOTGRAFT_HD static Bits encode(double x) {
        if (x != x) return bit_cast<std::uint64_t>(x) >> 63 ? 0xffc00000u : 0x7fc00000u;
        return bit_cast<Bits>(static_cast<float>(x));  // one IEEE conversion, to nearest even
    }
};

struct Float64 {
    using Bits = std::uint64_t;
    using Wide = double;
    HOTGRAFT_HD static double decode(Bits bits) { return bit_cast<double>(bits); }
    HOTGRAFT_HD static Bits encode(double x) {
        const Bits bits = bit_cast<Bits>(x);
        return x == x ? bits : (bits & 1ull << 63) | 0x7ff8000000000000ull;
    }
};

// fp8 is stored with a scale kept elsewhere, so it has no `encode`: it is moved and ranked only.
template <int ExponentBits, int MantissaBits, bool Finite>
struct Float8 {
    using Bits = std::uint8_t;
    using Wide = float;
    HOTGRAFT_HD static float decode(Bits bits) {
        constexpr int bias = (1 << (ExponentBits - 1)) - 1;
        const int exponent = (bits >> MantissaBits) & ((1 << ExponentBits) - 1);
        const int mantissa = bits & ((1 << MantissaBits) - 1);
        const float sign = (bits & 0x80) ? -1.0f : 1.0f;
        const float quiet_nan = bit_cast<float>(0x7fc00000u);
        if (Finite && (bits & 0x7f) == 0x7f) return quiet_nan;
        if (!Finite && exponent == (1 << ExponentBits) - 1) {
            return mantissa ? quiet_nan : sign * bit_cast<float>(0x7f800000u);
        }
        const int significand = exponent ? mantissa + (1 << MantissaBits) : mantissa;
        const int scale = (exponent ? exponent : 1) - bias - MantissaBits;
        const float power = bit_cast<float>(static_cast<std::uint32_t>(127 + scale) << 23);
        return sign * static_cast<float>(significand) * power;
    }
};
using Float8E4M3 = Float8<4, 3, true>;
using Float8E5M2 = Float8<5, 2, false>;

template <class T>
struct Integer {
    using Bits = std::make_unsigned_t<T>;
    using Wide = T;
    HOTGRAFT_HD static T decode(Bits bits) { return static_cast<T>(bits); }
};

// ---- |difference| ------------------------------------------------------------------------------
// The score that `select` ranks by: the difference in float for 8- and 16-bit floats, in double for
// fp32 and fp64, exact and then rounded once to double for integers. Never negative, or NaN.

template <class V>
HOTGRAFT_HD inline double score(typename V::Bits a, typename V::Bits b) {
    const auto x = V::decode(a);
    const auto y = V::decode(b);
    if constexpr (std::is_integral_v<typename V::Wide>) {
        const auto wide_x = static_cast<std::uint64_t>(x);
        const auto wide_y = static_cast<std::uint64_t>(y);
        return static_cast<double>(x > y ? wide_x - wide_y : wide_y - wide_x);
    } else {
        return static_cast<double>(std::fabs(x - y));
    }
}

enum class ValueType : std::int32_t {
    bf16,
    f16,
    f32,
    f64,
    f8_e4m3,
    f8_e5m2,
    i8,
    i16,
    i32,
    i64,
    u8,
    u16,
    u32,
    u64,
};

// Calls f with the value type's description; returns what f returns.
template <class F>
decltype(auto) dispatch_value(ValueType type, F&& f) {
    switch (type) {
        case ValueType::bf16: return f(BFloat16{});
        case ValueType::f16: return f(Float16{});
        case ValueType::f32: return f(Float32{});
        case ValueType::f64: return f(Float64{});
        case ValueType::f8_e4m3: return f(Float8E4M3{});
        case ValueType::f8_e5m2: return f(Float8E5M2{});
        case ValueType::i8: return f(Integer<std::int8_t>{});
        case ValueType::i16: return f(Integer<std::int16_t>{});
        case ValueType::i32: return f(Integer<std::int32_t>{});
        case ValueType::i64: return f(Integer<std::int64_t>{});
        case ValueType::u8: return f(Integer<std::uint8_t>{});
        case ValueType::u16: return f(Integer<std::uint16_t>{});
        case ValueType::u32: return f(Integer<std::uint32_t>{});
        case ValueType::u64: break;
    }
    return f(Integer<std::uint64_t>{});
}

inline int item_size_of(ValueType type) {
    return dispatch_value(
        type, [](auto value) { return static_cast<int>(sizeof(typename decltype(value)::Bits)); });
}

// The same for the four types that `merge` and `round` compute in.
template <class F>
decltype(auto) dispatch_float(ValueType type, F&& f) {
    switch (type) {
        case ValueType::bf16: return f(BFloat16{});
        case ValueType::f16: return f(Float16{});
        case ValueType::f32: return f(Float32{});
        default: break;
    }
    return f(Float64{});
}

}  // namespace hotgraft
