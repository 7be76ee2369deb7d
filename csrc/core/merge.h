// merge on a GPU, entry by entry.
//
// The entries of all sources form one list, row by row and in a row source by source: `spans` says
// where in it each source's part of each row begins. An entry *leads* if no earlier source has its
// position; the leaders are the union. With their ranks (core/ranks.h) a leader finds its place in
// the union by itself: in each span of its row, the leaders that lie below its position precede it.
// Nothing is kept a source, so that there may be any number of them: what is needed again is looked
// up again, by binary search.
#pragma once

#include <cstdint>

#include "core/atomic.h"
#include "core/policy.h"
#include "core/ranks.h"

namespace hotgraft {

struct Span {
    std::int64_t first;  // in the source's arrays
    std::int64_t start;  // in the list of all entries
};

struct MergeInput {
    const std::int32_t* positions;
    const void* fresh;
    const void* old;
    double weight;
    std::int64_t order;
};
static_assert(sizeof(Span) == 16 && sizeof(MergeInput) == 40, "Python builds these of int64");

// What a merge counts. The places are row << 32 | position, all ones where there is none.
struct MergeCounts {
    Number base_mismatches, first_base_mismatch, overflows, first_overflow;

    // [k * k], upper triangle: entries on which two sources disagree under `refuse`.
    HOTGRAFT_HD Number* conflicts() { return reinterpret_cast<Number*>(this + 1); }
};

struct Union {
    const Span* spans;         // [rows * k + 1]; the last one's start is the number of entries
    const MergeInput* inputs;  // [k]
    std::int64_t rows, k;      // rows * k < 2^31

    HOTGRAFT_HD std::int64_t count(std::int64_t span) const {
        return spans[span + 1].start - spans[span].start;
    }

    HOTGRAFT_HD std::int64_t span_of(std::int64_t item) const {
        std::int64_t low = 0, high = rows * k - 1;
        while (low < high) {
            const std::int64_t middle = high - (high - low) / 2;
            if (spans[middle].start <= item) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return low;
    }

    // How many of a span's entries lie below a position.
    HOTGRAFT_HD std::int64_t below(std::int64_t span, std::int64_t source,
                                   std::int32_t position) const {
        const std::int32_t* positions = inputs[source].positions + spans[span].first;
        std::int64_t low = 0, high = count(span);
        while (low < high) {
            const std::int64_t middle = low + (high - low) / 2;
            if (positions[middle] < position) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }

    // Whether the span's entry `at`, if there is one, has the position.
    HOTGRAFT_HD bool holds(std::int64_t span, std::int64_t source, std::int64_t at,
                           std::int32_t position) const {
        return at < count(span) && inputs[source].positions[spans[span].first + at] == position;
    }

    template <class Bits>
    HOTGRAFT_HD Claim<Bits> claim(std::int64_t source, std::int64_t entry) const {
        const MergeInput& input = inputs[source];
        return {source, static_cast<const Bits*>(input.fresh)[entry],
                static_cast<const Bits*>(input.old)[entry], input.weight, input.order};
    }
};

// An entry of the list: whose it is.
struct Item {
    std::int64_t span, row, source, entry;
    std::int32_t position;

    HOTGRAFT_HD Item(const Union& all, std::int64_t item)
        : span(all.span_of(item)),
          row(static_cast<std::uint32_t>(span) / static_cast<std::uint32_t>(all.k)),
          source(span - row * all.k),
          entry(all.spans[span].first + item - all.spans[span].start),
          position(all.inputs[source].positions[entry]) {}
};

// The claims on one position of a row.
template <class Bits>
struct Lookup {
    const Union& all;
    std::int64_t row;
    std::int32_t position;

    template <class F>
    HOTGRAFT_HD void each(F&& f) const {
        for (std::int64_t source = 0; source < all.k; ++source) {
            const std::int64_t span = row * all.k + source;
            const std::int64_t at = all.below(span, source, position);
            if (all.holds(span, source, at, position)) {
                f(all.claim<Bits>(source, all.spans[span].first + at));
            }
        }
    }
};

struct Leads {
    static constexpr int ahead = 0;  // it searches long
    Union all;
    HOTGRAFT_HD bool operator()(std::int64_t item) const {
        const Item mine(all, item);
        for (std::int64_t source = 0; source < mine.source; ++source) {
            const std::int64_t span = mine.row * all.k + source;
            const std::int64_t at = all.below(span, source, mine.position);
            if (all.holds(span, source, at, mine.position)) return false;
        }
        return true;
    }
};

// Entries of a row's union.
struct CountRow {
    Union all;
    Ranks leaders;
    std::int64_t* counts;
    HOTGRAFT_HD void operator()(std::int64_t row) const {
        counts[row] = leaders.before(all.spans[(row + 1) * all.k].start) -
                      leaders.before(all.spans[row * all.k].start);
    }
};

// Resolves the position of an entry that leads, and writes it to its place in the union.
template <class V>
struct Resolve {
    static constexpr int items = 1;
    using Bits = typename V::Bits;
    Union all;
    Ranks leaders;
    Policy policy;
    MergeCounts* counts;
    std::int32_t* positions;
    Bits* fresh;
    Bits* old;

    HOTGRAFT_HD void operator()(std::int64_t item, std::int64_t) const {
        const Item mine(all, item);
        const Claim<Bits> first = all.template claim<Bits>(mine.source, mine.entry);
        std::int64_t out = leaders.before(all.spans[mine.row * all.k].start);
        std::int64_t covering = 0;
        bool same_base = true;
        for (std::int64_t source = 0; source < all.k; ++source) {
            const std::int64_t span = mine.row * all.k + source;
            const std::int64_t at = all.below(span, source, mine.position);
            const std::int64_t start = all.spans[span].start;
            out += leaders.before(start + at) - leaders.before(start);
            if (!all.holds(span, source, at, mine.position)) continue;
            ++covering;
            const auto* held = static_cast<const Bits*>(all.inputs[source].old);
            same_base &= held[all.spans[span].first + at] == first.old;
        }
        const Number place = static_cast<Number>(mine.row) << 32 | mine.position;
        if (!same_base) {
            add(&counts->base_mismatches, 1);
            lower(&counts->first_base_mismatch, place);
        }
        bool finite = true;
        const auto conflict = [&](std::int64_t earlier, std::int64_t later) {
            add(counts->conflicts() + earlier * all.k + later, 1);
        };
        const Lookup<Bits> cover{all, mine.row, mine.position};
        fresh[out] = covering == 1
                         ? alone<V>(first, finite)
                         : resolve<V>(cover, covering, first.old, policy, finite, conflict);
        if (!finite) {
            add(&counts->overflows, 1);
            lower(&counts->first_overflow, place);
        }
        positions[out] = mine.position;
        old[out] = first.old;
    }
};

}  // namespace hotgraft
