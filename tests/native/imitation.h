// The glue of the CUDA kernels, imitated on the CPU: blocks and threads one after another, and what
// a warp or a block does together. What a thread does is the kernels' own code, in csrc/core.
#pragma once

#include <cstdint>

#include "core/atomic.h"
#include "core/grid.h"
#include "core/ranks.h"

namespace hotgraft::imitation {

template <class F>
void for_threads(std::int64_t blocks, F&& f) {
    for (std::int64_t block = 0; block < blocks; ++block) {
        for (int thread = 0; thread < grid::threads; ++thread) f(block, thread);
    }
}

// As compare_kernel: of each warp the first lane that differs has the lowest entry.
template <class T>
void compare(const grid::Move<T>& move, Number* differing, Number* from_end) {
    const std::int64_t n = move.table.n_entries;
    std::int64_t told = -1;  // the last warp that reported a place
    for_threads(grid::blocks_for(n), [&](std::int64_t block, int thread) {
        const std::uint32_t different = grid::compare(move, block, thread);
        if (!different) return;
        add(differing, count_bits(different));
        const std::int64_t warp = block * grid::threads + thread / 32 * 32;
        if (told == warp) return;
        told = warp;
        const auto share = grid::share_of(n, block, thread);
        raise(from_end, n - (share.first + __builtin_ctz(different)));
    });
}

// As mark_kernel and add_up_kernel.
template <class Test>
void mark(const Test& test, const Ranks& ranks) {
    std::int64_t total = 0;
    for (std::int64_t tile = 0; tile < Ranks::tiles_for(ranks.n); ++tile) {
        std::uint32_t before = 0;
        for (std::int64_t w = 0; w < Ranks::words_a_tile; ++w) {
            const std::int64_t word = tile * Ranks::words_a_tile + w;
            std::uint32_t bits = 0;
            for (int lane = 0; lane < Ranks::items_a_word; ++lane) {
                const std::int64_t item = word * Ranks::items_a_word + lane;
                const bool passed = test(item < ranks.n ? item : ranks.n - 1) && item < ranks.n;
                bits |= static_cast<std::uint32_t>(passed) << lane;
            }
            ranks.words[word] = {bits, before};
            before += count_bits(bits);
        }
        ranks.offsets[tile] = total;
        total += before;
    }
    *ranks.total = total;
}

template <class Use>
void use_marked(const Use& use, const Ranks& ranks) {
    for (std::int64_t item = 0; item < ranks.n; ++item) {
        if (ranks.marked(item)) use(item, ranks.before(item));
    }
}

}  // namespace hotgraft::imitation
