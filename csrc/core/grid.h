// Who moves what on a GPU: from block and thread to entries, and what a thread does with them.
//
// A block moves a tile, a thread `each` consecutive entries of it: it loads their positions and
// values 16 bytes at a time, works out all cells, and only then touches them, so that all accesses
// are under way at once. A share that the table's end cuts short repeats its last entry, which
// changes nothing and saves a condition an entry.
//
// The kernels of csrc/cuda are calls of these functions; tests/native runs them over whole grids on
// the CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/table.h"

namespace hotgraft::grid {

constexpr int each = 8;                        // entries of a thread
constexpr int threads = 256;                   // of a block
constexpr std::int64_t tile = each * threads;  // TILE in python/hotgraft/kernels/device.py

// A table in device memory.
struct Table {
    const Segment* segments;
    const std::int32_t* tiles;  // [blocks + 1], the segment of each tile's first entry; at the end,
                                // the last segment
    const std::int32_t* positions;
    std::int64_t n_entries;
};

// A table, and what goes into its cells.
template <class T>
struct Move {
    Table table;
    const T* values;
};

HOTGRAFT_HD inline std::int64_t blocks_for(std::int64_t n_entries) {
    return (n_entries + tile - 1) / tile;
}

// ---- a thread's share ---------------------------------------------------------------------------

struct Share {
    std::int64_t first;  // entry
    int count;           // in [0, each]
};

HOTGRAFT_HD inline Share share_of(std::int64_t n_entries, std::int64_t block, int thread) {
    const std::int64_t first = block * tile + thread * each;
    const std::int64_t left = n_entries - first;
    return {first, left >= each ? each : left > 0 ? static_cast<int>(left) : 0};
}

// What a GPU moves in one access: 16 bytes, or 8 where a thread has no more.
template <class T>
constexpr int access = sizeof(T) * each < 16 ? sizeof(T) * each : 16;

template <class T>
HOTGRAFT_HD inline bool is_whole(const T* at, int count) {
    return count == each && reinterpret_cast<std::uintptr_t>(at) % access<T> == 0;
}

template <class T>
HOTGRAFT_HD inline void load_whole(const T* from, T (&to)[each]) {
#ifdef __CUDA_ARCH__
    using Vector = std::conditional_t<access<T> == 16, uint4, uint2>;
    Vector vectors[sizeof(to) / sizeof(Vector)];
    for (int i = 0; i < static_cast<int>(sizeof(to) / sizeof(Vector)); ++i) {
        vectors[i] = reinterpret_cast<const Vector*>(from)[i];
    }
    std::memcpy(to, vectors, sizeof(to));
#else
    std::memcpy(to, from, sizeof(to));
#endif
}

template <class T>
HOTGRAFT_HD inline void load_some(const T* from, int count, T (&to)[each]) {
    for (int i = 0; i < each; ++i) to[i] = from[i < count ? i : count - 1];
}

template <class T>
HOTGRAFT_HD inline void store(const T (&from)[each], T* to, int count) {
    if (is_whole(to, count)) {
#ifdef __CUDA_ARCH__
        using Vector = std::conditional_t<access<T> == 16, uint4, uint2>;
        Vector vectors[sizeof(from) / sizeof(Vector)];
        std::memcpy(vectors, from, sizeof(from));
        for (int i = 0; i < static_cast<int>(sizeof(from) / sizeof(Vector)); ++i) {
            reinterpret_cast<Vector*>(to)[i] = vectors[i];
        }
#else
        std::memcpy(to, from, sizeof(from));
#endif
    } else {
        for (int i = 0; i < each; ++i) {
            if (i < count) to[i] = from[i];
        }
    }
}

template <class T>
HOTGRAFT_HD inline T* cell(std::uint64_t base, std::int32_t position) {
    const std::uint64_t address =
        base + std::uint64_t{sizeof(T)} * static_cast<std::uint32_t>(position);
#ifdef __CUDA_ARCH__
    return static_cast<T*>(__cvta_global_to_generic(address));  // in no other kind of memory
#else
    return reinterpret_cast<T*>(address);
#endif
}

// The cells of a share's entries. Its first one lies in a segment between tiles[block] and
// tiles[block + 1]; from there on segments follow one another.
template <class T>
HOTGRAFT_HD inline void find_cells(const Table& table, std::int64_t block, Share share,
                                   const std::int32_t (&positions)[each], T* (&cells)[each]) {
    std::int32_t low = table.tiles[block], high = table.tiles[block + 1];
    while (low < high) {
        const std::int32_t middle = high - (high - low) / 2;
        if (table.segments[middle].first <= share.first) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const Segment* segment = table.segments + low;
    const std::int64_t left = segment->first + segment->count - share.first;
    for (int i = 0; i < each; ++i) cells[i] = cell<T>(segment->base, positions[i]);
    if (left >= share.count) return;
    // Rarely: the entries from `next` on lie in other segments.
    int next = static_cast<int>(left);
    std::uint64_t base = segment->base;
    for (int i = 1; i < each; ++i) {
        if (i == next) {
            ++segment;
            base = segment->base;
            next = segment->count < share.count - i ? i + static_cast<int>(segment->count) : each;
        }
        cells[i] = cell<T>(base, positions[i]);
    }
}

// ---- the moves, one thread of one block ---------------------------------------------------------

template <class T>
HOTGRAFT_HD inline void gather(const Table& table, T* values, std::int64_t block, int thread) {
    const Share share = share_of(table.n_entries, block, thread);
    if (share.count == 0) return;
    std::int32_t positions[each];
    const T* cells[each];
    T held[each];
    const std::int32_t* from = table.positions + share.first;
    if (is_whole(from, share.count)) {
        load_whole(from, positions);
    } else {
        load_some(from, share.count, positions);
    }
    find_cells(table, block, share, positions, cells);
    for (int i = 0; i < each; ++i) held[i] = *cells[i];
    store(held, values + share.first, share.count);
}

// Positions and values: under one condition, so that none waits for the others.
template <class T>
HOTGRAFT_HD inline void load(const Move<T>& move, Share share, std::int32_t (&positions)[each],
                             T (&values)[each]) {
    const std::int32_t* from = move.table.positions + share.first;
    const T* values_from = move.values + share.first;
    if (is_whole(from, share.count) && is_whole(values_from, share.count)) {
        load_whole(from, positions);
        load_whole(values_from, values);
    } else {
        load_some(from, share.count, positions);
        load_some(values_from, share.count, values);
    }
}

template <class T>
HOTGRAFT_HD inline void scatter(const Move<T>& move, std::int64_t block, int thread) {
    const Share share = share_of(move.table.n_entries, block, thread);
    if (share.count == 0) return;
    std::int32_t positions[each];
    T* cells[each];
    T wanted[each];
    load(move, share, positions, wanted);
    find_cells(move.table, block, share, positions, cells);
    for (int i = 0; i < each; ++i) *cells[i] = wanted[i];
}

// One or two moves in one grid: the blocks of the first, then those of the second.
template <class T>
struct Scatter {
    Move<T> first, second;
    std::int64_t split;  // the second one's first block

    HOTGRAFT_HD void operator()(std::int64_t block, int thread) const {
        if (block < split) {
            scatter(first, block, thread);
        } else {
            scatter(second, block - split, thread);
        }
    }
};

// Which of the share's cells do not hold what is wanted: a bit an entry.
template <class T>
HOTGRAFT_HD inline std::uint32_t compare(const Move<T>& move, std::int64_t block, int thread) {
    const Share share = share_of(move.table.n_entries, block, thread);
    if (share.count == 0) return 0;
    std::int32_t positions[each];
    const T* cells[each];
    T wanted[each], held[each];
    load(move, share, positions, wanted);
    find_cells(move.table, block, share, positions, cells);
    for (int i = 0; i < each; ++i) held[i] = *cells[i];
    std::uint32_t different = 0;
    for (int i = 0; i < each; ++i) {
        different |= static_cast<std::uint32_t>(held[i] != wanted[i]) << i;
    }
    return different & ((1u << share.count) - 1);
}

}  // namespace hotgraft::grid
