#include "cpu/move.h"

#include <algorithm>
#include <mutex>

#include "core/element.h"
#include "cpu/parallel.h"

namespace hotgraft::cpu {
namespace {

// Entries that run ahead of the one being moved, so that its cache line and page walk are under
// way.
constexpr std::int64_t lookahead = 64;
// Entries a thread claims at a time: some 10 us of work.
constexpr std::int64_t grain = 4096;
// Entries that one thread prefetches: as many cache lines as a core's second level holds.
constexpr std::int64_t prefetched = 32768;
// Entries of that that it claims at a time: what a verb that comes meanwhile waits for, some 2 us.
constexpr std::int64_t prefetch_grain = 256;

// Applies `element` to the entries [begin, end). A second cursor walks `lookahead` entries in
// front, across segments, and prefetches.
template <class T, class Element>
void visit(const Table& table, std::int64_t begin, std::int64_t end, Element& element) {
    const std::int32_t* positions = table.positions;
    const Segment* here = table.segments + segment_of(table, begin);
    const Segment* ahead = here;
    std::int64_t entry = begin, front = begin;
    const auto stop = [end](const Segment* s) { return std::min(end, s->first + s->count); };
    const auto prefetch = [&](std::int64_t index) {
        const T* cell = reinterpret_cast<const T*>(ahead->base) + positions[index];
        __builtin_prefetch(cell, Element::writes ? 1 : 0, 3);
    };

    for (; front < std::min(end, begin + lookahead); ++front) {
        if (front == stop(ahead)) ++ahead;
        prefetch(front);
    }
    while (entry < end) {
        if (entry == stop(here)) ++here;
        if (front < end && front == stop(ahead)) ++ahead;
        T* base = reinterpret_cast<T*>(here->base);
        const T* base_ahead = reinterpret_cast<const T*>(ahead->base);
        // Until one of the cursors leaves its segment.
        std::int64_t run = stop(here) - entry;
        if (front < end) run = std::min(run, stop(ahead) - front);
        const std::int64_t distance = front - entry;
        const std::int64_t last = entry + run;
        if (front < end) {
            for (; entry < last; ++entry) {
                __builtin_prefetch(base_ahead + positions[entry + distance],
                                   Element::writes ? 1 : 0, 3);
                element(base + positions[entry], entry);
            }
            front += run;
        } else {
            for (; entry < last; ++entry) element(base + positions[entry], entry);
        }
    }
}

}  // namespace

void gather(const Table& table, int item_size, void* values, int workers) {
    dispatch_size(item_size, [&](auto zero) {
        using T = decltype(zero);
        parallel_for(table.n_entries, grain, workers,
                     [&](std::int64_t begin, std::int64_t end, int) {
                         Gather<T> element{static_cast<T*>(values)};
                         visit<T>(table, begin, end, element);
                     });
    });
}

void scatter(const Table& table, int item_size, const void* values, int workers) {
    dispatch_size(item_size, [&](auto zero) {
        using T = decltype(zero);
        parallel_for(table.n_entries, grain, workers,
                     [&](std::int64_t begin, std::int64_t end, int) {
                         Scatter<T> element{static_cast<const T*>(values)};
                         visit<T>(table, begin, end, element);
                     });
    });
}

Mismatch compare(const Table& table, int item_size, const void* values, int workers) {
    Mismatch total{0, INT64_MAX};
    std::mutex mutex;
    dispatch_size(item_size, [&](auto zero) {
        using T = decltype(zero);
        parallel_for(table.n_entries, grain, workers,
                     [&](std::int64_t begin, std::int64_t end, int) {
                         Compare<T> element{static_cast<const T*>(values)};
                         visit<T>(table, begin, end, element);
                         if (element.mismatches) {
                             std::lock_guard<std::mutex> lock(mutex);
                             total.count += element.mismatches;
                             total.first = std::min(total.first, element.first);
                         }
                     });
    });
    if (!total.count) total.first = -1;
    return total;
}

void prefetch(const Table& table, int item_size, const void* values, int workers) {
    const std::int64_t n = std::min(table.n_entries, prefetched * (workers - 1));
    hint(n, prefetch_grain, workers,
         [table, item_size, values](std::int64_t begin, std::int64_t end, int) {
             const Segment* segment = table.segments + segment_of(table, begin);
             for (std::int64_t entry = begin; entry < end; ++entry) {
                 if (entry == segment->first + segment->count) ++segment;
                 // Addresses as numbers: of cells and values that may be there no more.
                 const std::uint64_t offset = std::uint64_t(table.positions[entry]) * item_size;
                 const auto value = reinterpret_cast<std::uintptr_t>(values) + entry * item_size;
                 __builtin_prefetch(reinterpret_cast<const void*>(segment->base + offset), 1, 3);
                 __builtin_prefetch(reinterpret_cast<const void*>(value), 0, 3);
             }
         });
}

}  // namespace hotgraft::cpu
