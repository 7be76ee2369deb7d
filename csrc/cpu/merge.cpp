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
Bits fresh_bits(const Source& source, std::int64_t entry) {
    return static_cast<const Bits*>(source.fresh)[entry];
}

template <class Bits>
Bits old_bits(const Source& source, std::int64_t entry) {
    return static_cast<const Bits*>(source.old)[entry];
}

// base + d, or the copy that it stands for.
template <class V>
typename V::Bits alone(const Source& source, std::int64_t entry, bool& finite) {
    using Bits = typename V::Bits;
    const Bits bits = fresh_bits<Bits>(source, entry);
    if (source.weight == 1.0) return bits;
    if constexpr (std::is_floating_point_v<typename V::Wide>) {
        const double base = V::decode(old_bits<Bits>(source, entry));
        const double d = source.weight * (static_cast<double>(V::decode(bits)) - base);
        const Bits result = V::encode(base + d);
        finite = std::isfinite(static_cast<double>(V::decode(result)));
        return result;
    }
    return bits;
}

template <class V>
typename V::Bits combine(const std::vector<Source>& sources, const std::vector<Cover>& cover,
                         Policy policy, bool& finite) {
    using Bits = typename V::Bits;
    const double base = V::decode(old_bits<Bits>(sources[cover[0].source], cover[0].entry));
    const auto d = [&](const Cover& c) {
        const Source& source = sources[c.source];
        return source.weight *
               (static_cast<double>(V::decode(fresh_bits<Bits>(source, c.entry))) - base);
    };
    double sum = 0;
    for (const Cover& c : cover) sum += d(c);
    double change = sum;
    if (policy == Policy::mean) {
        change = sum / static_cast<double>(cover.size());
    } else if (policy == Policy::sign) {
        if (sum == 0) return old_bits<Bits>(sources[cover[0].source], cover[0].entry);
        double agreeing = 0;
        std::int64_t count = 0;
        for (const Cover& c : cover) {
            const double one = d(c);
            if ((one > 0 && sum > 0) || (one < 0 && sum < 0)) agreeing += one, ++count;
        }
        change = agreeing / static_cast<double>(count);
    }
    const Bits result = V::encode(base + change);
    finite = std::isfinite(static_cast<double>(V::decode(result)));
    return result;
}

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
            std::vector<Bits> results;
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
                         Bits result = base;
                         if (cover.size() == 1) {
                             result = alone<V>(sources[cover[0].source], cover[0].entry, finite);
                         } else if (policy == Policy::priority) {
                             const Cover* winner = &cover[0];
                             for (const Cover& c : cover) {
                                 if (order[c.source] > order[winner->source]) winner = &c;
                             }
                             result = alone<V>(sources[winner->source], winner->entry, finite);
                         } else if (policy == Policy::refuse) {
                             results.clear();
                             for (const Cover& c : cover) {
                                 bool one = true;
                                 results.push_back(alone<V>(sources[c.source], c.entry, one));
                                 finite &= one;
                             }
                             result = results[0];
                             for (std::size_t i = 0; i < cover.size(); ++i) {
                                 for (std::size_t j = i + 1; j < cover.size(); ++j) {
                                     if (results[i] != results[j]) {
                                         ++mine.conflicts[cover[i].source * k + cover[j].source];
                                     }
                                 }
                             }
                         } else if constexpr (std::is_floating_point_v<typename V::Wide>) {
                             result = combine<V>(sources, cover, policy, finite);
                         }
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
    // Types without arithmetic are merged as bits; their weights are 1 and the policy only chooses.
    switch (type) {
        case ValueType::bf16: run(BFloat16{}); break;
        case ValueType::f16: run(Float16{}); break;
        case ValueType::f32: run(Float32{}); break;
        case ValueType::f64: run(Float64{}); break;
        case ValueType::i8:
        case ValueType::u8:
        case ValueType::f8_e4m3:
        case ValueType::f8_e5m2: run(Integer<std::uint8_t>{}); break;
        case ValueType::i16:
        case ValueType::u16: run(Integer<std::uint16_t>{}); break;
        case ValueType::i32:
        case ValueType::u32: run(Integer<std::uint32_t>{}); break;
        case ValueType::i64:
        case ValueType::u64: run(Integer<std::uint64_t>{}); break;
    }
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
