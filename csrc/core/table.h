// The segment table: the ABI between Python and every backend.
//
// A plan for a whole model is one table per item size. Entry e of the table
// lies in the one segment s with  s.first <= e < s.first + s.count, and its
// cell is the element at  s.base + positions[e] * item_size.  Positions are
// int32 and relative to their segment; addresses and counts are 64-bit, so a
// tensor beyond 2^31 elements is only another segment.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HOTGRAFT_HD __host__ __device__
#else
#define HOTGRAFT_HD
#endif

namespace hotgraft {

struct Segment {
    std::uint64_t base;  // address of the cell at position 0
    std::int64_t first;  // index of the segment's first entry in the table
    std::int64_t count;  // entries in the segment, never 0
};
static_assert(sizeof(Segment) == 24, "Python builds this layout as int64[n][3]");

struct Table {
    const Segment* segments;  // [n_segments], ascending and gap-free in `first`
    std::int64_t n_segments;
    const std::int32_t* positions;  // [n_entries]
    std::int64_t n_entries;
};

// Index of the segment that holds `entry`; 0 <= entry < n_entries.
HOTGRAFT_HD inline std::int64_t segment_of(const Table& table, std::int64_t entry) {
    std::int64_t low = 0, high = table.n_segments - 1;
    while (low < high) {
        const std::int64_t middle = low + (high - low + 1) / 2;
        if (table.segments[middle].first <= entry) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return low;
}

}  // namespace hotgraft
