// What the CPU loops do with one entry. (A GPU thread moves eight at once: core/grid.h.)
//
// Moves are typeless: T is an unsigned integer of the item's size, so NaN
// payloads, infinities and the sign of zero survive.
#pragma once

#include <cstdint>

#include "core/table.h"

namespace hotgraft {

template <class T>
struct Gather {
    static constexpr bool writes = false;
    T* values;  // [n_entries], receives the cells
    HOTGRAFT_HD void operator()(const T* cell, std::int64_t entry) const { values[entry] = *cell; }
};

template <class T>
struct Scatter {
    static constexpr bool writes = true;
    const T* values;  // [n_entries], goes into the cells
    HOTGRAFT_HD void operator()(T* cell, std::int64_t entry) const { *cell = values[entry]; }
};

// Counts the cells that do not hold what is wanted and keeps the lowest such entry.
template <class T>
struct Compare {
    static constexpr bool writes = false;
    const T* values;  // [n_entries], what the cells should hold
    std::int64_t mismatches = 0;
    std::int64_t first = INT64_MAX;
    HOTGRAFT_HD void operator()(const T* cell, std::int64_t entry) {
        if (*cell != values[entry]) {
            ++mismatches;
            if (entry < first) first = entry;
        }
    }
};

// Calls f with a zero of the unsigned type of 1, 2, 4 or 8 bytes.
template <class F>
decltype(auto) dispatch_size(int item_size, F&& f) {
    switch (item_size) {
        case 1: return f(std::uint8_t{});
        case 2: return f(std::uint16_t{});
        case 4: return f(std::uint32_t{});
        default: return f(std::uint64_t{});
    }
}

}  // namespace hotgraft
