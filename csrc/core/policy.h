// What becomes of a position that grafts cover: the arithmetic of docs/design.md, for every
// backend.
//
// Sums are taken in double, in the order of the sources, and rounded once; a value that comes from
// one graft at weight 1 is a copy of its bits. A `Cover` is what a backend knows of a position: its
// `each(f)` calls f with the claim of every source that covers it, in the order of the sources, and
// may be called several times.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/value.h"

namespace hotgraft {

enum class Policy : std::int32_t { refuse, priority, sum, mean, sign };

// What one source says about a position.
template <class Bits>
struct Claim {
    std::int64_t source;
    Bits fresh, old;
    double weight;
    std::int64_t order;  // under `priority` the highest wins
};

// base + d, or the copy that it stands for.
template <class V>
HOTGRAFT_HD inline typename V::Bits alone(const Claim<typename V::Bits>& claim, bool& finite) {
    if (claim.weight == 1.0) return claim.fresh;
    if constexpr (std::is_floating_point_v<typename V::Wide>) {
        const double base = V::decode(claim.old);
        const double d = claim.weight * (static_cast<double>(V::decode(claim.fresh)) - base);
        const auto result = V::encode(base + d);
        finite = std::isfinite(static_cast<double>(V::decode(result)));
        return result;
    } else {
        return claim.fresh;
    }
}

// base + what `sum`, `mean` or `sign` make of the d of `covering` sources.
template <class V, class Cover>
HOTGRAFT_HD inline typename V::Bits combine(const Cover& cover, std::int64_t covering,
                                            typename V::Bits old, Policy policy, bool& finite) {
    using Bits = typename V::Bits;
    const double base = V::decode(old);
    const auto d = [base](const Claim<Bits>& claim) {
        return claim.weight * (static_cast<double>(V::decode(claim.fresh)) - base);
    };
    double sum = 0;
    cover.each([&](const Claim<Bits>& claim) { sum += d(claim); });
    double change = sum;
    if (policy == Policy::mean) {
        change = sum / static_cast<double>(covering);
    } else if (policy == Policy::sign) {
        if (sum == 0) return old;
        double agreeing = 0;
        std::int64_t count = 0;
        cover.each([&](const Claim<Bits>& claim) {
            const double one = d(claim);
            if ((one > 0 && sum > 0) || (one < 0 && sum < 0)) agreeing += one, ++count;
        });
        change = agreeing / static_cast<double>(count);
    }
    const Bits result = V::encode(base + change);
    finite = std::isfinite(static_cast<double>(V::decode(result)));
    return result;
}

// The bits of a position that several sources cover. Under `refuse` every two of them that disagree
// are reported by conflict(earlier, later).
template <class V, class Cover, class Conflict>
HOTGRAFT_HD inline typename V::Bits resolve(const Cover& cover, std::int64_t covering,
                                            typename V::Bits old, Policy policy, bool& finite,
                                            Conflict&& conflict) {
    using Bits = typename V::Bits;
    if (policy == Policy::priority) {
        Claim<Bits> winner{-1, 0, 0, 1.0, 0};
        cover.each([&](const Claim<Bits>& claim) {
            if (winner.source < 0 || claim.order > winner.order) winner = claim;
        });
        return alone<V>(winner, finite);
    }
    if (policy == Policy::refuse) {
        Bits result = old;
        bool first = true;
        cover.each([&](const Claim<Bits>& claim) {
            bool one = true, unsaid = true;
            const Bits mine = alone<V>(claim, one);
            finite &= one;
            if (first) result = mine;
            first = false;
            cover.each([&](const Claim<Bits>& later) {
                if (later.source > claim.source && alone<V>(later, unsaid) != mine) {
                    conflict(claim.source, later.source);
                }
            });
        });
        return result;
    }
    if constexpr (std::is_floating_point_v<typename V::Wide>) {
        return combine<V>(cover, covering, old, policy, finite);
    } else {
        return old;
    }
}

// Calls f with the description of the values that `type` is merged as. Types without arithmetic are
// merged as bits; their weights are 1 and the policy only chooses.
template <class F>
decltype(auto) dispatch_merge(ValueType type, F&& f) {
    switch (type) {
        case ValueType::bf16: return f(BFloat16{});
        case ValueType::f16: return f(Float16{});
        case ValueType::f32: return f(Float32{});
        case ValueType::f64: return f(Float64{});
        case ValueType::i8:
        case ValueType::u8:
        case ValueType::f8_e4m3:
        case ValueType::f8_e5m2: return f(Integer<std::uint8_t>{});
        case ValueType::i16:
        case ValueType::u16: return f(Integer<std::uint16_t>{});
        case ValueType::i32:
        case ValueType::u32: return f(Integer<std::uint32_t>{});
        case ValueType::i64:
        case ValueType::u64: break;
    }
    return f(Integer<std::uint64_t>{});
}

}  // namespace hotgraft
