// select and merge of the CUDA kernels, on the CPU: the code of core/ranks.h, core/select.h and
// core/merge.h over whole grids, one item after another, against csrc/cpu and plain loops. Under
// AddressSanitizer and UBSan.
#include <algorithm>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/merge.h"
#include "core/ranks.h"
#include "core/select.h"
#include "cpu/merge.h"
#include "cpu/select.h"
#include "imitation.h"

using namespace hotgraft;
using imitation::mark;
using imitation::use_marked;

namespace {

// ---- ranks -------------------------------------------------------------------------------------

struct Scratch {
    std::vector<std::int64_t> memory;
    Ranks ranks;

    explicit Scratch(std::int64_t n)
        : memory(Ranks::scratch_size(n) / sizeof(std::int64_t), -1),
          ranks(Ranks::in(memory.data(), n)) {}
};

void ranks() {
    for (std::int64_t n : {0, 1, 31, 32, 33, 8191, 8192, 8193, 3 * 8192, 50'000}) {
        std::vector<char> marked(n);
        for (char& one : marked) one = below(3) == 0;
        Scratch scratch(n);
        mark([&](std::int64_t i) { return marked[i] != 0; }, scratch.ranks);
        std::int64_t before = 0;
        for (std::int64_t i = 0; i < n; ++i) {
            CHECK(scratch.ranks.marked(i) == (marked[i] != 0));
            CHECK(scratch.ranks.before(i) == before);
            before += marked[i];
        }
        CHECK(scratch.ranks.before(n) == before && *scratch.ranks.total == before);
    }
    // The last items of 2^31: only their tile's words are there.
    constexpr std::int64_t n = std::int64_t{1} << 31, last = n / Ranks::tile - 1;
    CHECK(Ranks::tiles_for(n) == last + 1 && Ranks::tiles_for(n + 1) == last + 2);
    CHECK(Ranks::scratch_size(n) == 8 + (last + 1) * 257 * 8);
    Scratch tile(Ranks::tile);
    mark([](std::int64_t i) { return i % 2 == 1; }, tile.ranks);
    const std::vector<std::int64_t> offsets(1, std::int64_t{1} << 30);
    const Ranks far{n, tile.ranks.total, const_cast<std::int64_t*>(offsets.data()) - last,
                    tile.ranks.words - last * Ranks::words_a_tile};
    CHECK(far.marked(n - 1) && !far.marked(n - 2));
    CHECK(far.before(n - 1) == (std::int64_t{1} << 30) + Ranks::tile / 2 - 1);
}

// What a warp's ballot in a round says becomes the word of the thread whose lane has the round's
// number: every item is tested once, and its bit lies where `marked` looks for it.
void blocks_and_threads() {
    for (std::int64_t tiles : {1, 3}) {
        std::vector<int> tested(tiles * Ranks::tile);
        for (std::int64_t block = 0; block < tiles; ++block) {
            for (int thread = 0; thread < Ranks::words_a_tile; ++thread) {
                const int lane = thread % Ranks::items_a_word;
                for (int round = 0; round < Ranks::items_a_word; ++round) {
                    const std::int64_t item = Ranks::item_of(block, thread, round);
                    ++tested[item];
                    const std::int64_t word = Ranks::word_of(block, thread - lane + round);
                    CHECK(item / Ranks::items_a_word == word && item % Ranks::items_a_word == lane);
                    CHECK(item / Ranks::tile == block);
                }
            }
        }
        for (const int times : tested) CHECK(times == 1);
    }
    constexpr std::int64_t last = (std::int64_t{1} << 31) / Ranks::tile;
    CHECK(Ranks::item_of(last, 0, 0) == std::int64_t{1} << 31);
}

// ---- select ------------------------------------------------------------------------------------

// Two arrays of a type, of which `same` in 10 items are equal; values near each other tie.
template <class T>
struct Pair {
    std::vector<T> a, b;
    Pair(std::int64_t n, int same, bool tied) : a(n), b(n) {
        const T mask = static_cast<T>(tied ? T{3} : static_cast<T>(~T{0}));
        for (std::int64_t i = 0; i < n; ++i) {
            a[i] = static_cast<T>(random_bits()) & mask;
            b[i] = below(10) < same ? a[i] : static_cast<T>(random_bits()) & mask;
        }
    }
};

template <class T>
void differences_of() {
    for (std::int64_t n : {0, 1, 40, 8192, 20'001}) {
        for (int same : {0, 9, 10}) {
            const Pair<T> pair(n, same, false);
            Scratch scratch(n);
            mark(Differs<T>{{pair.a.data(), pair.b.data(), {}}}, scratch.ranks);
            std::vector<std::int32_t> wanted, found(*scratch.ranks.total);
            for (std::int64_t i = 0; i < n; ++i) {
                if (pair.a[i] != pair.b[i]) wanted.push_back(static_cast<std::int32_t>(i));
            }
            use_marked(WritePosition{found.data()}, scratch.ranks);
            CHECK(found == wanted);
        }
    }
}

void differences() {
    differences_of<std::uint8_t>();
    differences_of<std::uint16_t>();
    differences_of<std::uint32_t>();
    differences_of<std::uint64_t>();
}

// Every type: bins, and the lowest NaN, as csrc/cpu counts them.
void counts() {
    constexpr std::int64_t n = 9'000;
    for (int code = 0; code <= static_cast<int>(ValueType::u64); ++code) {
        const auto type = static_cast<ValueType>(code);
        dispatch_value(type, [&](auto value) {
            using T = typename decltype(value)::Bits;
            const Pair<T> pair(n, 2, code % 2);
            const Items<T> items{pair.a.data(), pair.b.data(), type};
            std::uint64_t prefix = 0;
            for (const int shift : {48, 32, 16, 0}) {
                std::vector<cpu::ScoreCounts> wanted(1);
                std::memset(wanted.data(), 0, sizeof(cpu::ScoreCounts));
                const std::int64_t nan = cpu::count_scores(type, items.a, items.b, n, shift, prefix,
                                                           n + 1, wanted.data(), 1, cpu::Isa::best);
                Number lowest_nan = ~Number{0};
                std::vector<std::int64_t> bins(1 << 16);
                const Binned<T> binned{items, shift, prefix, &lowest_nan};
                std::uint64_t fullest = 0;
                for (std::int64_t i = 0; i < n; ++i) {
                    const int bin = binned(i);
                    if (bin < 0) continue;
                    if (++bins[bin] > bins[fullest]) fullest = bin;
                }
                CHECK(static_cast<std::int64_t>(lowest_nan) == nan);
                if (nan < 0) CHECK(std::equal(bins.begin(), bins.end(), wanted[0].bins));
                prefix = prefix << 16 | fullest;
            }
        });
    }
}

// Every type: what reaches a score, with few ties, all of them, or none.
void collects() {
    constexpr std::int64_t n = 9'000;
    for (int code = 0; code <= static_cast<int>(ValueType::u64); ++code) {
        const auto type = static_cast<ValueType>(code);
        dispatch_value(type, [&](auto value) {
            using V = decltype(value);
            using T = typename V::Bits;
            const Pair<T> pair(n, 3, true);
            const Items<T> items{pair.a.data(), pair.b.data(), type};
            const std::int64_t some =
                std::find_if(pair.a.begin(), pair.a.end(),
                             [&](const T& x) { return x != pair.b[&x - pair.a.data()]; }) -
                pair.a.begin();
            for (const std::uint64_t lowest : {items.key_at(some), items.key_at(some) + 1}) {
                for (const std::int64_t ties : {std::int64_t{0}, std::int64_t{1}, std::int64_t{77},
                                                n, std::int64_t{1} << 62}) {
                    Scratch scratch(n), more(n);
                    Reaches<T> test{items, lowest + (ties == 0), ties, {}};
                    if (0 < ties && ties < n) {
                        test.equals = more.ranks;
                        mark(Equals<T>{items, lowest}, more.ranks);
                    }
                    mark(test, scratch.ranks);
                    std::vector<std::int32_t> positions(*scratch.ranks.total), at;
                    std::vector<std::uint64_t> keys(*scratch.ranks.total), wanted;
                    use_marked(WriteScore<T>{items, positions.data(), keys.data()}, scratch.ranks);
                    for (const auto& piece :
                         cpu::collect(type, items.a, items.b, n, lowest, ties, 1, cpu::Isa::best)) {
                        at.insert(at.end(), piece.positions.begin(), piece.positions.end());
                        wanted.insert(wanted.end(), piece.keys.begin(), piece.keys.end());
                    }
                    CHECK(positions == at && keys == wanted);
                }
            }
        });
    }
}

// ---- merge -------------------------------------------------------------------------------------

template <class Bits>
struct Graft {
    std::vector<std::int32_t> positions;
    std::vector<Bits> fresh, old;
};

// Some rows of `cells` positions each, in every source at other places of its arrays.
template <class V>
void check_merge(ValueType type, Policy policy, std::int64_t k, std::int64_t rows,
                 std::int64_t cells, bool wrong) {
    using Bits = typename V::Bits;
    constexpr bool computes = std::is_floating_point_v<typename V::Wide>;
    std::vector<Graft<Bits>> grafts(k);
    std::vector<cpu::Range> ranges(rows * k);
    std::vector<Bits> base(rows * cells);
    // No NaN among them: which of two a sum keeps is nobody's to say.
    constexpr auto tame = static_cast<Bits>(~(Bits{1} << (8 * sizeof(Bits) - 2)));
    for (Bits& bits : base) bits = static_cast<Bits>(random_bits()) & tame;
    for (std::int64_t source = 0; source < k; ++source) {
        Graft<Bits>& graft = grafts[source];
        for (std::int64_t r = 0; r < rows; ++r) {
            const std::int64_t row = source % 2 ? rows - 1 - r : r, share = below(4);
            cpu::Range& range = ranges[row * k + source];
            range = {static_cast<std::int64_t>(graft.positions.size()), 0};
            for (std::int64_t cell = 0; cell < cells; ++cell) {
                if (below(3) >= share) continue;
                const Bits held = base[row * cells + cell];
                graft.positions.push_back(static_cast<std::int32_t>(INT32_MAX - cells + 1 + cell));
                graft.old.push_back(wrong && below(20) == 0 ? held ^ 1 : held);
                graft.fresh.push_back(below(2) ? held : static_cast<Bits>(held + below(3)));
                ++range.count;
            }
        }
    }
    std::vector<std::int64_t> order(k);
    std::vector<cpu::Source> sources;
    std::vector<MergeInput> inputs;
    for (std::int64_t i = 0; i < k; ++i) {
        const Graft<Bits>& graft = grafts[i];
        const double weights[] = {1.0, 0.5, 1.0, -1.0, 1e300};
        const double weight = computes ? weights[below(5)] : 1.0;
        order[i] = (i * 2 + 1) % k;
        if (k % 2 == 0) order[i] = k - 1 - i;
        sources.push_back({graft.positions.data(), graft.fresh.data(), graft.old.data(), weight});
        inputs.push_back(
            {graft.positions.data(), graft.fresh.data(), graft.old.data(), weight, order[i]});
    }

    std::vector<std::int64_t> row_counts(rows), offsets(rows);
    cpu::count_union(sources, ranges.data(), rows, row_counts.data(), 1);
    std::int64_t total = 0;
    for (std::int64_t row = 0; row < rows; ++row) offsets[row] = total, total += row_counts[row];
    Graft<Bits> wanted{std::vector<std::int32_t>(total), std::vector<Bits>(total),
                       std::vector<Bits>(total)};
    const cpu::MergeReport report =
        cpu::merge(sources, ranges.data(), rows, offsets.data(), type, policy, order.data(),
                   wanted.positions.data(), wanted.fresh.data(), wanted.old.data(), 1);

    std::vector<Span> spans;
    std::int64_t n = 0;
    for (const cpu::Range& range : ranges) spans.push_back({range.first, n}), n += range.count;
    spans.push_back({0, n});
    const Union all{spans.data(), inputs.data(), rows, k};
    Scratch scratch(n);
    mark(Leads{all}, scratch.ranks);
    CHECK(*scratch.ranks.total == total);
    std::vector<std::int64_t> counted(rows);
    const CountRow count{all, scratch.ranks, counted.data()};
    for (std::int64_t row = 0; row < rows; ++row) count(row);
    CHECK(counted == row_counts);

    std::vector<Number> numbers(4 + k * k);
    auto* counts = reinterpret_cast<MergeCounts*>(numbers.data());
    counts->first_base_mismatch = counts->first_overflow = ~Number{0};
    Graft<Bits> found{std::vector<std::int32_t>(total), std::vector<Bits>(total),
                      std::vector<Bits>(total)};
    use_marked(Resolve<V>{all, scratch.ranks, policy, counts, found.positions.data(),
                          found.fresh.data(), found.old.data()},
               scratch.ranks);
    CHECK(found.positions == wanted.positions);
    CHECK(found.old == wanted.old);
    CHECK(found.fresh == wanted.fresh);
    const auto place = [](const cpu::Place& at) {
        return at.row < 0 ? ~Number{0} : static_cast<Number>(at.row) << 32 | at.position;
    };
    CHECK(counts->base_mismatches == static_cast<Number>(report.base_mismatches));
    CHECK(counts->first_base_mismatch == place(report.first_base_mismatch));
    CHECK(counts->overflows == static_cast<Number>(report.overflows));
    CHECK(counts->first_overflow == place(report.first_overflow));
    for (std::int64_t i = 0; i < k * k; ++i) {
        CHECK(counts->conflicts()[i] == static_cast<Number>(report.conflicts[i]));
    }
}

void merges() {
    for (int code = 0; code <= static_cast<int>(ValueType::u64); ++code) {
        const auto type = static_cast<ValueType>(code);
        dispatch_merge(type, [&](auto value) {
            using V = decltype(value);
            for (int policy = 0; policy <= static_cast<int>(Policy::sign); ++policy) {
                for (const std::int64_t k : {1, 2, 3, 7}) {
                    const auto which = static_cast<Policy>(policy);
                    check_merge<V>(type, which, k, 5, 40, false);
                    check_merge<V>(type, which, k, 3, 1, false);
                    check_merge<V>(type, which, k, 4, 30, true);
                }
                check_merge<V>(type, static_cast<Policy>(policy), 3, 0, 1, false);
                check_merge<V>(type, static_cast<Policy>(policy), 2, 9, 3000, false);
            }
        });
    }
}

}  // namespace

int main() {
    const Test tests[] = {
        {"ranks", ranks},
        {"blocks_and_threads", blocks_and_threads},
        {"differences", differences},
        {"counts", counts},
        {"collects", collects},
        {"merges", merges},
    };
    return run_tests(tests);
}
