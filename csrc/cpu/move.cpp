#include "cpu/move.h"

#include <algorithm>
#include <mutex>

#include "core/element.h"
#include "cpu/parallel.h"

namespace hotgraft::cpu {
namespace {

// Entries that run ahead of the one being moved, so that its cache line and page walk are under
// way.
constexpr std::int64_t lookahead = 32;
// Entries a thread claims at a time: some 10 us of work.
constexpr std::int64_t grain = 4096;

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

template <class F>
void dispatch_size(int item_size, F&& f) {
    switch (item_size) {
        case 1: return f(std::uint8_t{});
        case 2: return f(std::uint16_t{});
        case 4: return f(std::uint32_t{});
        default: return f(std::uint64_t{});
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

}  // namespace hotgraft::cpu
