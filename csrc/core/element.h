// What happens to one entry, written once for every backend.
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

}  // namespace hotgraft
