#include "cpu/merge.h"

#include <algorithm>
#include <mutex>

#include "cpu/environment.h"
#include "cpu/parallel.h"

namespace hotgraft::cpu {
namespace {

// Walks the union of one row: calls f(position, cover) where cover lists (source, entry) for every
// source that has the position, in the order of the sources.
struct Cover {
    std::int64_t source, entry;
};

template <class F>
void walk(const std::vector<Source>& sources, const Range* ranges, F&& f) {
    const std::size_t k = sources.size();
    std::vector<std::int64_t> next(k), stop(k);
    for (std::size_t i = 0; i < k; ++i) {
        next[i] = ranges[i].first;
        stop[i] = ranges[i].first + ranges[i].count;
    }
    std::vector<Cover> cover;
    cover.reserve(k);
    for (;;) {
        // A linear minimum: k is a handful, and a heap would cost more.
        std::int64_t lowest = INT64_MAX;
        for (std::size_t i = 0; i < k; ++i) {
            if (next[i] < stop[i])
                lowest = std::min<std::int64_t>(lowest, sources[i].positions[next[i]]);
        }
        if (lowest == INT64_MAX) return;
        cover.clear();
        for (std::size_t i = 0; i < k; ++i) {
            if (next[i] < stop[i] && sources[i].positions[next[i]] == lowest) {
                cover.push_back({static_cast<std::int64_t>(i), next[i]++});
            }
        }
        f(static_cast<std::int32_t>(lowest), cover);
    }
}

template <class Bits>
Bits old_bits(const Source& source, std::int64_t entry) {
    return static_cast<const Bits*>(source.old)[entry];
}

// The claims on one position, as core/policy.h wants them.
template <class Bits>
struct Claims {
    const Source* sources;
    const Cover* cover;
    const Cover* end;
    const std::int64_t* order;

    Claim<Bits> claim(const Cover& c) const {
        const Source& source = sources[c.source];
        return {c.source, static_cast<const Bits*>(source.fresh)[c.entry],
                old_bits<Bits>(source, c.entry), source.weight, order[c.source]};
    }

    template <class F>
    void each(F&& f) const {
        for (const Cover* c = cover; c != end; ++c) f(claim(*c));
    }
};

void lower(Place& first, std::int64_t row, std::int32_t position) {
    if (first.row < 0 || row < first.row || (row == first.row && position < first.position)) {
        first = {row, position};
    }
}

// Rows are independent; a handful a piece keeps the threads even.
constexpr std::int64_t rows_a_piece = 4;

}  // namespace

void count_union(const std::vector<Source>& sources, const Range* ranges, std::int64_t rows,
                 std::int64_t* counts, int workers) {
    parallel_for(rows, rows_a_piece, workers, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t row = begin; row < end; ++row) {
            std::int64_t count = 0;
            walk(sources, ranges + row * static_cast<std::int64_t>(sources.size()),
                 [&](std::int32_t, const std::vector<Cover>&) { ++count; });
            counts[row] = count;
        }
    });
}

MergeReport merge(const std::vector<Source>& sources, const Range* ranges, std::int64_t rows,
                  const std::int64_t* offsets, ValueType type, Policy policy,
                  const std::int64_t* order, std::int32_t* positions, void* fresh, void* old,
                  int workers) {
    const auto k = static_cast<std::int64_t>(sources.size());
    MergeReport total;
    total.conflicts.assign(k * k, 0);
    std::mutex mutex;

    const auto run = [&](auto value) {
        using V = decltype(value);
        using Bits = typename V::Bits;
        parallel_for(rows, rows_a_piece, workers, [&](std::int64_t begin, std::int64_t end, int) {
            const DefaultEnvironment environment;
            MergeReport mine;
            mine.conflicts.assign(k * k, 0);
            const auto conflict = [&](std::int64_t earlier, std::int64_t later) {
                ++mine.conflicts[earlier * k + later];
            };
            for (std::int64_t row = begin; row < end; ++row) {
                std::int64_t out = offsets[row];
                walk(sources, ranges + row * k,
                     [&](std::int32_t position, const std::vector<Cover>& cover) {
                         const Bits base = old_bits<Bits>(sources[cover[0].source], cover[0].entry);
                         bool same_base = true;
                         for (const Cover& c : cover)
                             same_base &= old_bits<Bits>(sources[c.source], c.entry) == base;
                         if (!same_base) {
                             ++mine.base_mismatches;
                             lower(mine.first_base_mismatch, row, position);
                         }
                         bool finite = true;
                         const Claims<Bits> claims{sources.data(), cover.data(),
                                                   cover.data() + cover.size(), order};
                         const Bits result =
                             cover.size() == 1
                                 ? alone<V>(claims.claim(cover[0]), finite)
                                 : resolve<V>(claims, static_cast<std::int64_t>(cover.size()), base,
                                              policy, finite, conflict);
                         if (!finite) {
                             ++mine.overflows;
                             lower(mine.first_overflow, row, position);
                         }
                         positions[out] = position;
                         static_cast<Bits*>(fresh)[out] = result;
                         static_cast<Bits*>(old)[out] = base;
                         ++out;
                     });
            }
            std::lock_guard<std::mutex> lock(mutex);
            for (std::int64_t i = 0; i < k * k; ++i) total.conflicts[i] += mine.conflicts[i];
            total.base_mismatches += mine.base_mismatches;
            total.overflows += mine.overflows;
            const auto keep = [](Place& first, const Place& other) {
                if (other.row >= 0) lower(first, other.row, other.position);
            };
            keep(total.first_base_mismatch, mine.first_base_mismatch);
            keep(total.first_overflow, mine.first_overflow);
        });
    };
    dispatch_merge(type, run);
    return total;
}

std::int64_t round(ValueType from, const void* in, ValueType to, void* out, std::int64_t n) {
    const DefaultEnvironment environment;
    std::int64_t overflows = 0;
    dispatch_float(from, [&](auto source) {
        using From = decltype(source);
        dispatch_float(to, [&](auto target) {
            using To = decltype(target);
            const auto* values = static_cast<const typename From::Bits*>(in);
            auto* results = static_cast<typename To::Bits*>(out);
            for (std::int64_t i = 0; i < n; ++i) {
                const double wide = From::decode(values[i]);
                results[i] = To::encode(wide);
                const double narrow = To::decode(results[i]);
                overflows += std::isfinite(wide) && !std::isfinite(narrow);
            }
        });
    });
    return overflows;
}

}  // namespace hotgraft::cpu
