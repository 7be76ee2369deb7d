// select on a GPU, item by item: what is marked, counted and written (see core/ranks.h).
//
// The instances are one an item size; which type the bits have is asked at run time, which costs a
// branch that all threads take alike.
#pragma once

#include <cstdint>

#include "core/atomic.h"
#include "core/ranks.h"
#include "core/value.h"

namespace hotgraft {

// The bits of a score, which order as scores do. A NaN has the quiet one's: GPUs keep no payloads.
template <class V>
HOTGRAFT_HD inline std::uint64_t key(typename V::Bits a, typename V::Bits b) {
    const double value = score<V>(a, b);
    return value == value ? bit_cast<std::uint64_t>(value) : 0x7ff8000000000000ull;
}

constexpr std::uint64_t infinity_key = 0x7ff0000000000000ull;

// Two arrays of items, to be compared.
template <class T>
struct Items {
    const T *a, *b;
    ValueType type;

    HOTGRAFT_HD bool differ(std::int64_t i) const { return a[i] != b[i]; }

    HOTGRAFT_HD std::uint64_t key_at(std::int64_t i) const {
        const T x = a[i], y = b[i];
        if constexpr (sizeof(T) == 1) {
            if (type == ValueType::f8_e4m3) return key<Float8E4M3>(x, y);
            if (type == ValueType::f8_e5m2) return key<Float8E5M2>(x, y);
            if (type == ValueType::i8) return key<Integer<std::int8_t>>(x, y);
        } else if constexpr (sizeof(T) == 2) {
            if (type == ValueType::bf16) return key<BFloat16>(x, y);
            if (type == ValueType::f16) return key<Float16>(x, y);
            if (type == ValueType::i16) return key<Integer<std::int16_t>>(x, y);
        } else if constexpr (sizeof(T) == 4) {
            if (type == ValueType::f32) return key<Float32>(x, y);
            if (type == ValueType::i32) return key<Integer<std::int32_t>>(x, y);
        } else {
            if (type == ValueType::f64) return key<Float64>(x, y);
            if (type == ValueType::i64) return key<Integer<std::int64_t>>(x, y);
        }
        return key<Integer<T>>(x, y);
    }
};

// ---- what is marked -----------------------------------------------------------------------------
// `ahead`: how many items a thread looks at together; 0 where it has only one.

template <class T>
struct Differs {
    static constexpr int ahead = 8;
    Items<T> items;
    HOTGRAFT_HD bool operator()(std::int64_t i) const { return items.differ(i); }
};

template <class T>
struct Equals {
    static constexpr int ahead = 4;
    Items<T> items;
    std::uint64_t wanted;
    HOTGRAFT_HD bool operator()(std::int64_t i) const {
        return items.differ(i) && items.key_at(i) == wanted;
    }
};

// At least `lowest`; where `equals` has words, of those that equal it only the first `ties`.
template <class T>
struct Reaches {
    static constexpr int ahead = 4;
    Items<T> items;
    std::uint64_t lowest;
    std::int64_t ties;
    Ranks equals;
    HOTGRAFT_HD bool operator()(std::int64_t i) const {
        if (!items.differ(i)) return false;
        const std::uint64_t here = items.key_at(i);
        if (here != lowest || equals.words == nullptr) return here >= lowest;
        return equals.before(i) < ties;
    }
};

// ---- what is done with the marked items ---------------------------------------------------------

// `items`: how many a thread goes through.

struct WritePosition {
    static constexpr int items = 32;
    std::int32_t* positions;
    HOTGRAFT_HD void operator()(std::int64_t item, std::int64_t rank) const {
        positions[rank] = static_cast<std::int32_t>(item);
    }
};

template <class T>
struct WriteScore {
    static constexpr int items = 32;
    Items<T> scored;
    std::int32_t* positions;
    std::uint64_t* keys;
    HOTGRAFT_HD void operator()(std::int64_t item, std::int64_t rank) const {
        positions[rank] = static_cast<std::int32_t>(item);
        keys[rank] = scored.key_at(item);
    }
};

// ---- what is counted ----------------------------------------------------------------------------

template <class T>
struct Binned {
    static constexpr int digits = 16;
    Items<T> items;
    int shift;
    std::uint64_t prefix;
    Number* lowest_nan;

    // The bin that an item counts in, or -1.
    HOTGRAFT_HD int operator()(std::int64_t i) const {
        if (!items.differ(i)) return -1;
        const std::uint64_t here = items.key_at(i);
        if (here > infinity_key) lower(lowest_nan, static_cast<Number>(i));
        const std::uint64_t leading = here >> shift;
        if (leading >> digits != prefix) return -1;
        return static_cast<int>(leading & ((1u << digits) - 1));
    }
};

}  // namespace hotgraft
