// The passes of core/ranks.h: mark items, add up, do something with each marked one.
#pragma once

#include "core/ranks.h"
#include "cuda/launch.cuh"

namespace hotgraft::cuda {

constexpr unsigned all_lanes = ~0u;
constexpr int warp = 32;

// What the threads of a block before this one hold, and what all hold together. Every thread of the
// block calls it.
template <int threads, class N>
__device__ N sum_before(N mine, N& total) {
    __shared__ N warps[threads / warp];
    const int lane = threadIdx.x % warp, index = threadIdx.x / warp;
    N upto = mine;
    for (int step = 1; step < warp; step *= 2) {
        const N other = __shfl_up_sync(all_lanes, upto, step);
        if (lane >= step) upto += other;
    }
    if (lane == warp - 1) warps[index] = upto;
    __syncthreads();
    N before = 0;
    total = 0;
    for (int i = 0; i < threads / warp; ++i) {
        if (i < index) before += warps[i];
        total += warps[i];
    }
    __syncthreads();  // before another call writes `warps`
    return before + upto - mine;
}

__device__ inline std::int64_t item_of(int round) {
    return Ranks::item_of(blockIdx.x, threadIdx.x, round);
}

// Stores a thread's word and how many marks precede it in the tile; every thread of the block.
__device__ inline void store_word(const Ranks& ranks, std::uint32_t bits) {
    int total;
    const int before = sum_before<Ranks::words_a_tile>(__popc(bits), total);
    ranks.words[Ranks::word_of(blockIdx.x, threadIdx.x)] = {bits,
                                                            static_cast<std::uint32_t>(before)};
    if (threadIdx.x == 0) ranks.offsets[blockIdx.x] = total;
}

// Marks the items that pass the test. A warp makes as many words as it has lanes; each keeps one.
template <class Test>
__global__ void __launch_bounds__(Ranks::words_a_tile) mark_kernel(Test test, Ranks ranks) {
    const int lane = threadIdx.x % warp;
    std::uint32_t mine = 0;
#pragma unroll 1
    for (int round = 0; round < Ranks::items_a_word; round += Test::ahead) {
        bool passed[Test::ahead];
        for (int i = 0; i < Test::ahead; ++i) {
            const std::int64_t item = item_of(round + i);
            // The last item stands in for those beyond it, so that no load waits for a condition.
            passed[i] = test(item < ranks.n ? item : ranks.n - 1) && item < ranks.n;
        }
        for (int i = 0; i < Test::ahead; ++i) {
            const std::uint32_t bits = __ballot_sync(all_lanes, passed[i]);
            if (lane == round + i) mine = bits;
        }
    }
    store_word(ranks, mine);
}

// The same in two passes where the test is long: a thread an item, so that as many as can run at
// once; then the words' other halves.
template <class Test>
__global__ void __launch_bounds__(Ranks::words_a_tile) test_kernel(Test test, Ranks ranks) {
    const std::int64_t item = blockIdx.x * std::int64_t{Ranks::words_a_tile} + threadIdx.x;
    const bool passed = item < ranks.n && test(item);
    const std::uint32_t bits = __ballot_sync(all_lanes, passed);
    if (threadIdx.x % warp == 0) ranks.words[item / Ranks::items_a_word].bits = bits;
}

static __global__ void __launch_bounds__(Ranks::words_a_tile) count_words_kernel(Ranks ranks) {
    store_word(ranks, ranks.words[Ranks::word_of(blockIdx.x, threadIdx.x)].bits);
}

constexpr int adders = 1024;

// Turns the tiles' counts into offsets. One block: tiles are few.
static __global__ void __launch_bounds__(adders) add_up_kernel(Ranks ranks, std::int64_t tiles) {
    std::int64_t done = 0;
    for (std::int64_t first = 0; first < tiles; first += adders) {
        const std::int64_t tile = first + threadIdx.x;
        std::int64_t total;
        const std::int64_t before =
            sum_before<adders>(tile < tiles ? ranks.offsets[tile] : 0, total);
        if (tile < tiles) ranks.offsets[tile] = done + before;
        done += total;
    }
    if (threadIdx.x == 0) *ranks.total = done;
}

// Calls use(item, rank) for every marked item. A thread has Use::items of them.
template <class Use>
__global__ void __launch_bounds__(Ranks::words_a_tile) use_kernel(Use use, Ranks ranks) {
    const std::int64_t first = blockIdx.x * std::int64_t{Ranks::words_a_tile * Use::items};
    for (int round = 0; round < Use::items; ++round) {
        const std::int64_t item = first + round * Ranks::words_a_tile + threadIdx.x;
        if (item < ranks.n && ranks.marked(item)) use(item, ranks.before(item));
    }
}

template <class Test>
Code mark(const Test& test, const Ranks& ranks, Stream stream) {
    constexpr int threads = Ranks::words_a_tile;
    const std::int64_t tiles = Ranks::tiles_for(ranks.n);
    Code code;
    if constexpr (Test::ahead > 0) {
        code = launch(mark_kernel<Test>, tiles, threads, stream, test, ranks);
    } else {
        const std::int64_t blocks = tiles * (Ranks::tile / threads);
        code = launch(test_kernel<Test>, blocks, threads, stream, test, ranks);
        if (!code) code = launch(count_words_kernel, tiles, threads, stream, ranks);
    }
    return code ? code : launch(add_up_kernel, 1, adders, stream, ranks, tiles);
}

template <class Use>
Code use_marked(const Use& use, const Ranks& ranks, Stream stream) {
    constexpr std::int64_t items = Ranks::words_a_tile * Use::items;
    return launch(use_kernel<Use>, (ranks.n + items - 1) / items, Ranks::words_a_tile, stream, use,
                  ranks);
}

}  // namespace hotgraft::cuda
