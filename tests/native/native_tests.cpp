// The verbs without Python, built under AddressSanitizer and UBSan: every buffer is exactly as long
// as it must be, so an access beside it ends the program.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "arena.h"
#include "check.h"
#include "core/value.h"
#include "cpu/merge.h"
#include "cpu/move.h"
#include "cpu/parallel.h"
#include "cpu/select.h"

using namespace hotgraft;
using namespace hotgraft::cpu;

namespace {

std::vector<Isa> instruction_sets() {
    std::vector<Isa> here;
    for (Isa isa : {Isa::best, Isa::scalar, Isa::avx2, Isa::avx512}) {
        if (isa_runs_here(isa)) here.push_back(isa);
    }
    return here;
}

// ---- moves -------------------------------------------------------------------------------------

template <class T>
void check_moves(const Arena<T>& arena, int workers) {
    const auto n = static_cast<std::int64_t>(arena.positions.size());
    const Table table = arena.table();
    const int size = sizeof(T);
    const std::vector<T> before = arena.everything();

    std::vector<T> held(n), fresh(n);
    gather(table, size, held.data(), workers);
    for (std::int64_t e = 0; e < n; ++e) CHECK(held[e] == *arena.cells[e]);
    CHECK(compare(table, size, held.data(), workers).count == 0);
    CHECK(compare(table, size, held.data(), workers).first == -1);

    for (T& value : fresh) value = static_cast<T>(random_bits());
    std::int64_t differ = 0, first = -1;
    for (std::int64_t e = n - 1; e >= 0; --e) {
        if (fresh[e] != held[e]) ++differ, first = e;
    }
    const Mismatch found = compare(table, size, fresh.data(), workers);
    CHECK(found.count == differ && found.first == first);
    CHECK(arena.everything() == before);

    scatter(table, size, fresh.data(), workers);
    for (std::int64_t e = 0; e < n; ++e) CHECK(*arena.cells[e] == fresh[e]);
    scatter(table, size, held.data(), workers);
    CHECK(arena.everything() == before);
}

template <class T>
void moves_of() {
    for (int workers : {1, 2, 3}) {
        for (std::int64_t n = 1; n < 80; ++n) {
            Arena<T> one, many, far;
            one.add(2 * n + 1, n);
            for (std::int64_t i = 0; i < n; ++i) many.add(1 + below(4), 1);
            far.add(n, n, (std::int64_t{1} << 31) - n);
            check_moves(one, workers);
            check_moves(many, workers);
            check_moves(far, workers);
        }
        Arena<T> large;
        for (std::int64_t count : {4095, 4096, 4097, 1, 2, 31, 32, 33, 9000}) {
            large.add(3 * count, count);
        }
        check_moves(large, workers);
    }
}

void moves() {
    moves_of<std::uint8_t>();
    moves_of<std::uint16_t>();
    moves_of<std::uint32_t>();
    moves_of<std::uint64_t>();
}

void segments_are_found() {
    Arena<std::uint16_t> arena;
    std::vector<std::int64_t> owner;
    for (std::int64_t i = 0; i < 40; ++i) {
        const std::int64_t count = 1 + below(5);
        arena.add(8, count);
        owner.insert(owner.end(), count, i);
    }
    for (std::size_t e = 0; e < owner.size(); ++e) {
        CHECK(segment_of(arena.table(), static_cast<std::int64_t>(e)) == owner[e]);
    }
}

// ---- select ------------------------------------------------------------------------------------

// n items that begin `start` bytes into a heap block which ends with them: not aligned, no slack.
struct Items {
    Items(std::int64_t n, int item_size, int start)
        : block(new unsigned char[start + n * item_size]), data(block.get() + start) {
        std::memset(block.get(), 0, start + n * item_size);
    }
    std::unique_ptr<unsigned char[]> block;
    unsigned char* data;
};

void differences() {
    std::vector<std::int64_t> sizes(150);
    for (std::size_t i = 0; i < sizes.size(); ++i) sizes[i] = static_cast<std::int64_t>(i);
    sizes.insert(sizes.end(), {(1 << 16) - 1, 1 << 16, (1 << 16) + 1, 3 * (1 << 16) + 65});
    for (int item_size : {1, 2, 4, 8}) {
        for (std::int64_t n : sizes) {
            const Items a(n, item_size, static_cast<int>(n % 9)), b(n, item_size, 1);
            std::vector<std::int32_t> wanted;
            for (std::int64_t i = 0; i < n; ++i) {
                if (below(9) && n > 3) continue;
                b.data[i * item_size + below(item_size)] = 0x80;
                wanted.push_back(static_cast<std::int32_t>(i));
            }
            for (Isa isa : instruction_sets()) {
                const int workers = static_cast<int>(1 + n % 3);
                const Difference found(a.data, b.data, n, item_size, workers, isa);
                CHECK(found.count() == static_cast<std::int64_t>(wanted.size()));
                std::vector<std::int32_t> positions(wanted.size());
                const Items fresh(found.count(), item_size, 2), old(found.count(), item_size, 3);
                found.write(positions.data(), fresh.data, old.data, workers);
                CHECK(positions == wanted);
                for (std::int64_t e = 0; e < found.count(); ++e) {
                    const std::int64_t at = std::int64_t{wanted[e]} * item_size;
                    CHECK(!std::memcmp(fresh.data + e * item_size, b.data + at, item_size));
                    CHECK(!std::memcmp(old.data + e * item_size, a.data + at, item_size));
                }
            }
        }
    }
}

// Ties inside one window of 2^22 entries, across two, and at their edges: the first ones are kept.
void ties() {
    constexpr std::int64_t window = 1 << 22, n = 2 * window + 3;
    const Items a(n, 1, 0), b(n, 1, 0);
    std::vector<std::int32_t> where;
    for (std::int64_t i :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{65535}, std::int64_t{65536}, window - 1,
          window, window + 1, 2 * window - 1, 2 * window, n - 1}) {
        where.push_back(static_cast<std::int32_t>(i));
        b.data[i] = 3;
    }
    b.data[window / 2] = 9;
    const auto tied = bit_cast<std::uint64_t>(3.0);
    for (Isa isa : instruction_sets()) {
        for (std::int64_t wanted = 0; wanted <= 12; ++wanted) {
            std::vector<std::int32_t> all;
            std::int64_t larger = 0;
            for (const Scored& piece :
                 collect(ValueType::u8, a.data, b.data, n, tied, wanted, 3, isa)) {
                CHECK(piece.positions.size() == piece.keys.size());
                for (std::size_t i = 0; i < piece.keys.size(); ++i) {
                    if (piece.keys[i] == tied) all.push_back(piece.positions[i]);
                    larger += piece.keys[i] == bit_cast<std::uint64_t>(9.0);
                }
            }
            const auto kept = std::min<std::size_t>(wanted, where.size());
            CHECK(larger == 1);
            CHECK(all == std::vector<std::int32_t>(where.begin(), where.begin() + kept));
        }
    }
}

// Every type: the histogram's bins add up, and the k-th largest lies where a sort puts it.
void histograms() {
    for (int code = 0; code <= static_cast<int>(ValueType::u64); ++code) {
        const auto type = static_cast<ValueType>(code);
        dispatch_value(type, [&](auto value) {
            using V = decltype(value);
            using Bits = typename V::Bits;
            const std::int64_t n = 70'003, k = 500;
            const Items a(n, sizeof(Bits), 1), b(n, sizeof(Bits), 3);
            std::vector<std::uint64_t> keys;
            for (std::int64_t i = 0; i < n; ++i) {
                if (below(7)) continue;
                // The lower half of the type's patterns holds no NaN of either sign.
                const auto bits =
                    static_cast<Bits>(random_bits() & (static_cast<Bits>(~Bits{0}) >> 2));
                std::memcpy(b.data + i * sizeof(Bits), &bits, sizeof(Bits));
                if (bits) keys.push_back(bit_cast<std::uint64_t>(score<V>(0, bits)));
            }
            std::sort(keys.rbegin(), keys.rend());
            for (Isa isa : instruction_sets()) {
                std::vector<ScoreCounts> counts(3);
                std::memset(counts.data(), 0, counts.size() * sizeof(ScoreCounts));
                CHECK(count_scores(type, a.data, b.data, n, 48, 0, k, counts.data(), 3, isa) == -1);
                std::int64_t above = 0;
                int bin = 1 << bin_bits;
                while (above < k) {
                    --bin;
                    for (const ScoreCounts& c : counts) above += c.bins[bin];
                }
                CHECK(keys[k - 1] >> 48 == static_cast<std::uint64_t>(bin));
            }
        });
    }
}

// ---- merge and round ---------------------------------------------------------------------------

void merges() {
    const std::int64_t rows = 37, each = 5;
    std::vector<std::int32_t> left(rows * each), right(rows * each);
    std::vector<float> fresh(rows * each, 3.0f), old(rows * each, 1.0f);
    std::vector<Range> ranges;
    for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t i = 0; i < each; ++i) {
            left[row * each + i] = static_cast<std::int32_t>(2 * i);
            right[row * each + i] = static_cast<std::int32_t>(3 * i);
        }
        ranges.push_back({row * each, each});
        ranges.push_back({row * each, row % 2 ? each : 0});
    }
    const std::vector<Source> sources = {{left.data(), fresh.data(), old.data(), 1.0},
                                         {right.data(), fresh.data(), old.data(), 0.5}};
    const std::int64_t order[] = {0, 1};
    for (int workers : {1, 2, 3}) {
        for (Policy policy :
             {Policy::refuse, Policy::priority, Policy::sum, Policy::mean, Policy::sign}) {
            std::vector<std::int64_t> counts(rows), offsets(rows);
            count_union(sources, ranges.data(), rows, counts.data(), workers);
            std::int64_t total = 0;
            for (std::int64_t row = 0; row < rows; ++row) {
                CHECK(counts[row] == (row % 2 ? 8 : 5));  // 0 and 6 are shared
                offsets[row] = total;
                total += counts[row];
            }
            std::vector<std::int32_t> positions(total);
            std::vector<float> out(total), base(total);
            const MergeReport report =
                merge(sources, ranges.data(), rows, offsets.data(), ValueType::f32, policy, order,
                      positions.data(), out.data(), base.data(), workers);
            CHECK(report.base_mismatches == 0 && report.overflows == 0);
            CHECK(report.conflicts[1] == (policy == Policy::refuse ? 2 * (rows / 2) : 0));
            const float shared = policy == Policy::sum        ? 4.0f
                                 : policy == Policy::priority ? 2.0f
                                 : policy == Policy::refuse   ? 3.0f
                                                              : 2.5f;
            CHECK(out[offsets[1]] == shared);
            CHECK(std::is_sorted(positions.begin() + offsets[1], positions.begin() + offsets[2]));
        }
    }
}

void rounding() {
    CHECK(BFloat16::encode(1 + 0x1p-8 + 0x1p-40) == 0x3f81);
    CHECK(BFloat16::encode(-0x1p-134) == 0x8000);
    CHECK(Float16::encode(65520.0) == 0x7c00 && Float16::encode(65519.0) == 0x7bff);
    CHECK(Float32::encode(std::numeric_limits<double>::quiet_NaN()) == 0x7fc00000u);
    for (std::uint32_t bits = 0; bits < 1u << 16; ++bits) {
        const auto half = static_cast<std::uint16_t>(bits);
        const float b = BFloat16::decode(half), h = Float16::decode(half);
        CHECK(std::isnan(b) ? (BFloat16::encode(b) & 0x7fff) == 0x7fc0
                            : BFloat16::encode(b) == half);
        CHECK(std::isnan(h) ? (Float16::encode(h) & 0x7fff) == 0x7e00 : Float16::encode(h) == half);
    }
    for (int i = 0; i < 200'000; ++i) {  // any double at all, for the sanitizers to watch
        const auto x = bit_cast<double>(static_cast<std::uint64_t>(random_bits()));
        BFloat16::encode(x), Float16::encode(x);
    }
}

// ---- the pool ----------------------------------------------------------------------------------

void every_item_once(std::int64_t n, std::int64_t grain, int workers) {
    std::vector<std::atomic<int>> visits(n);
    parallel_for(n, grain, workers, [&](std::int64_t begin, std::int64_t end, int worker) {
        CHECK(0 <= worker && worker < std::max(workers, 1));
        CHECK(begin % std::max<std::int64_t>(grain, 1) == 0 && begin < end && end <= n);
        for (std::int64_t i = begin; i < end; ++i) ++visits[i];
    });
    for (const auto& count : visits) CHECK(count == 1);
}

void pool() {
    CHECK(max_workers() >= 1);
    for (std::int64_t n : {0, 1, 2, 7, 100, 1001}) {
        for (std::int64_t grain : {-1, 0, 1, 3, 1000, 5000}) {
            for (int workers : {-1, 0, 1, 2, 5}) every_item_once(n, grain, workers);
        }
    }
}

void exceptions() {
    for (int workers : {1, 2, 4}) {
        for (std::int64_t bad : {0, 50, 99}) {
            bool thrown = false;
            try {
                parallel_for(100, 1, workers, [&](std::int64_t begin, std::int64_t, int) {
                    if (begin == bad) throw std::runtime_error("piece");
                });
            } catch (const std::runtime_error& error) {
                thrown = std::strcmp(error.what(), "piece") == 0;
            }
            CHECK(thrown);
            every_item_once(500, 3, workers);
        }
    }
}

void several_callers() {
    std::vector<std::thread> callers;
    for (int i = 0; i < 6; ++i) {
        callers.emplace_back([] {
            for (int round = 0; round < 200; ++round) every_item_once(300, 7, 3);
        });
    }
    for (std::thread& caller : callers) caller.join();
}

void calls_from_inside() {
    std::atomic<int> items{0};
    parallel_for(8, 1, 3, [&](std::int64_t, std::int64_t, int) {
        parallel_for(50, 5, 3, [&](std::int64_t begin, std::int64_t end, int) {
            items += static_cast<int>(end - begin);
        });
    });
    CHECK(items == 400);
}

// Whatever is hinted at, the memory may go after `drop_hints`, and the next job is done in full.
void hints() {
    for (int round = 0; round < 300; ++round) {
        std::vector<int> visits(1000);
        hint(1000, 1 + round % 50, 1 + round % 4,
             [&visits](std::int64_t begin, std::int64_t end, int) {
                 for (std::int64_t i = begin; i < end; ++i) ++visits[i];
             });
        if (round % 3 == 0) every_item_once(100, 7, 3);
        if (round % 5 == 0) hint(10, 1, 3, [](std::int64_t, std::int64_t, int) {});
        drop_hints();
        for (int count : visits) CHECK(count <= 1);
    }
    drop_hints();
}

// Prefetching touches no cell: there need not be any.
void prefetches() {
    std::vector<std::int32_t> positions(70'000);
    for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<std::int32_t>(i);
    const Segment segments[] = {{8, 0, 30'000}, {~std::uint64_t{0} - 4096, 30'000, 40'000}};
    const Table table{segments, 2, positions.data(), 70'000};
    for (int item_size : {1, 2, 4, 8}) {
        prefetch(table, item_size, nullptr, 3);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        drop_hints();
    }
}

// A forked child has none of the pool's threads; it must not wait for them, and nor its own child.
void fork_safety() {
    every_item_once(500, 3, 3);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);  // a child that hangs is killed, which the parent sees
        every_item_once(500, 3, 3);
        const pid_t grandchild = fork();
        if (grandchild == 0) {
            every_item_once(500, 3, 4);
            _exit(0);
        }
        int status = 1;
        waitpid(grandchild, &status, 0);
        _exit(status == 0 ? 0 : 1);
    }
    CHECK(child > 0);
    int status = 1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
    every_item_once(500, 3, 3);
}

}  // namespace

int main() {
    const Test tests[] = {
        {"moves", moves},
        {"segments are found", segments_are_found},
        {"hints", hints},
        {"prefetches", prefetches},
        {"differences", differences},
        {"ties", ties},
        {"histograms", histograms},
        {"merges", merges},
        {"rounding", rounding},
        {"pool", pool},
        {"exceptions", exceptions},
        {"several callers", several_callers},
        {"calls from inside", calls_from_inside},
        {"fork safety", fork_safety},
    };
    return run_tests(tests);
}
