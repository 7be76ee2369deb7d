// The moves of the CUDA kernels, on the CPU: the code of core/grid.h over whole grids, one thread
// after another, against plain loops. Under AddressSanitizer and UBSan; every buffer is exactly as
// long as it must be.
#include <algorithm>
#include <memory>
#include <vector>

#include "arena.h"
#include "check.h"
#include "core/grid.h"
#include "imitation.h"

using namespace hotgraft;
using imitation::for_threads;

namespace {

// ---- moves -------------------------------------------------------------------------------------

// An arena with the tiles that a grid wants.
template <class T>
struct Tiled : Arena<T> {
    std::vector<std::int32_t> tiles;

    std::int64_t n() const { return static_cast<std::int64_t>(this->positions.size()); }

    grid::Table table() {
        tiles.clear();
        std::int32_t segment = 0;
        for (std::int64_t first = 0; first < n(); first += grid::tile) {
            while (this->segments[segment].first + this->segments[segment].count <= first) {
                ++segment;
            }
            tiles.push_back(segment);
        }
        tiles.push_back(static_cast<std::int32_t>(this->segments.size()) - 1);
        return {this->segments.data(), tiles.data(), this->positions.data(), n()};
    }
};

// n random values that begin `skew` items behind a multiple of 16 bytes.
template <class T>
struct Values {
    std::unique_ptr<T[]> memory;
    T* data;
    std::int64_t n;

    Values(std::int64_t n, int skew) : memory(new T[n + skew]), data(memory.get() + skew), n(n) {
        CHECK(reinterpret_cast<std::uintptr_t>(memory.get()) % 16 == 0);
        for (std::int64_t i = 0; i < n; ++i) data[i] = static_cast<T>(random_bits());
    }
    std::vector<T> all() const { return {data, data + n}; }
};

struct Mismatch {
    Number count = 0, from_end = 0;
};

template <class T>
Mismatch compare(const grid::Move<T>& move) {
    Mismatch found;
    imitation::compare(move, &found.count, &found.from_end);
    return found;
}

template <class T>
void check_moves(Tiled<T>& arena, int skew) {
    const grid::Table table = arena.table();
    const std::int64_t n = arena.n();
    const std::vector<T> before = arena.everything();
    Values<T> held(n, skew), fresh(n, skew);
    for_threads(grid::blocks_for(n), [&](std::int64_t block, int thread) {
        grid::gather(table, held.data, block, thread);
    });
    for (std::int64_t e = 0; e < n; ++e) CHECK(held.data[e] == *arena.cells[e]);
    CHECK(compare<T>({table, held.data}).count == 0);

    Number differ = 0, from_end = 0;
    for (std::int64_t e = n - 1; e >= 0; --e) {
        if (below(3)) fresh.data[e] = held.data[e];
        if (fresh.data[e] != held.data[e]) ++differ, from_end = n - e;
    }
    const Mismatch found = compare<T>({table, fresh.data});
    CHECK(found.count == differ && found.from_end == from_end);
    CHECK(arena.everything() == before);

    const auto scatter = [&](const grid::Scatter<T>& moves, std::int64_t blocks) {
        for_threads(blocks, moves);
    };
    const std::int64_t blocks = grid::blocks_for(n);
    scatter({{table, fresh.data}, {}, blocks}, blocks);
    std::vector<T> wanted;
    for (std::int64_t e = 0; e < n; ++e) CHECK(*arena.cells[e] == fresh.data[e]);

    // With another table in the same launch, before it and after it.
    Tiled<T> other;
    other.add(5000, 3000), other.add(1, 1);
    const grid::Table second = other.table();
    const std::int64_t more = grid::blocks_for(other.n());
    for (const bool first : {true, false}) {
        const Values<T> mine(n, skew), theirs(other.n(), 0);
        const grid::Move<T> a{table, mine.data}, b{second, theirs.data};
        if (first) {
            scatter({a, b, blocks}, blocks + more);
        } else {
            scatter({b, a, more}, blocks + more);
        }
        for (std::int64_t e = 0; e < n; ++e) CHECK(*arena.cells[e] == mine.data[e]);
        for (std::int64_t e = 0; e < other.n(); ++e) CHECK(*other.cells[e] == theirs.data[e]);
    }
    scatter({{table, held.data}, {}, blocks}, blocks);
    CHECK(arena.everything() == before);
}

template <class T>
void moves_of() {
    constexpr std::int64_t tile = grid::tile, farthest = INT32_MAX;
    for (int skew = 0; skew < 2; ++skew) {
        for (std::int64_t n : {std::int64_t{1}, std::int64_t{7}, std::int64_t{8}, std::int64_t{9},
                               tile - 1, tile, tile + 1, 3 * tile}) {
            Tiled<T> one;
            one.add(2 * n, n);
            check_moves(one, skew);
        }
        Tiled<T> tiny;  // several segments a thread, and tiles that many share
        for (std::int64_t i = 0; i < 3000; ++i) tiny.add(20, 1 + i % 17 % 5);
        check_moves(tiny, skew);
        Tiled<T> edges;  // segments that end where tiles and shares do, and one over several tiles
        for (std::int64_t count : {tile, tile - 8, std::int64_t{8}, 3 * tile + 1, tile - 1}) {
            edges.add(4 * count, count);
        }
        check_moves(edges, skew);
        Tiled<T> far;  // the last element of a segment of 2^31
        far.add(100, 100, farthest - 99);
        far.add(1, 1, farthest);
        far.add(tile, 1000, farthest + 1 - tile);
        check_moves(far, skew);
    }
}

void moves() {
    moves_of<std::uint8_t>();
    moves_of<std::uint16_t>();
    moves_of<std::uint32_t>();
    moves_of<std::uint64_t>();
}

// Every entry has one thread, in tables of any size.
void shares() {
    for (std::int64_t n : {std::int64_t{1}, grid::tile * 5 + 13, (std::int64_t{1} << 33) + 3}) {
        const std::int64_t blocks = grid::blocks_for(n);
        std::int64_t next = std::max<std::int64_t>(0, blocks - 3) * grid::tile;
        for (std::int64_t block = std::max<std::int64_t>(0, blocks - 3); block < blocks; ++block) {
            for (int thread = 0; thread < grid::threads; ++thread) {
                const grid::Share share = grid::share_of(n, block, thread);
                CHECK(share.count == 0 || share.first == next);
                next += share.count;
            }
        }
        CHECK(next == n);
    }
}

}  // namespace

int main() {
    const Test tests[] = {
        {"moves", moves},
        {"shares", shares},
    };
    return run_tests(tests);
}
