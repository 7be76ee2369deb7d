// Ranks: which of n items are marked, and how many are marked before a given one.
//
// Made on a GPU in two passes. The first marks: a block a tile of items, a warp of threads 32 items
// at a time, which become a word of bits; with each word goes the number of marks before it in its
// tile. The second adds up the tiles. From then on a rank is two loads and a count of bits, which
// is what compaction and merging need.
#pragma once

#include <cstdint>

#include "core/table.h"

namespace hotgraft {

HOTGRAFT_HD inline int count_bits(std::uint32_t word) {
#ifdef __CUDA_ARCH__
    return __popc(word);
#else
    return __builtin_popcount(word);
#endif
}

struct Ranks {
    static constexpr int items_a_word = 32;
    static constexpr int words_a_tile = 256;  // also the threads of a block
    static constexpr std::int64_t tile = items_a_word * words_a_tile;

    struct Word {
        std::uint32_t bits;
        std::uint32_t before;  // marks before it in its tile
    };

    std::int64_t n;         // items
    std::int64_t* total;    // marks
    std::int64_t* offsets;  // [tiles]: marks before each tile
    Word* words;            // [tiles * words_a_tile]

    HOTGRAFT_HD static std::int64_t tiles_for(std::int64_t n) { return (n + tile - 1) / tile; }

    HOTGRAFT_HD static std::int64_t scratch_size(std::int64_t n) {
        return sizeof(std::int64_t) * (1 + tiles_for(n) * (1 + words_a_tile));
    }

    // Ranks of n items in scratch_size(n) bytes, of which the first 8 receive the total.
    static Ranks in(void* scratch, std::int64_t n) {
        auto* numbers = static_cast<std::int64_t*>(scratch);
        return {n, numbers, numbers + 1, reinterpret_cast<Word*>(numbers + 1 + tiles_for(n))};
    }

    // The item that a thread of a block tests in one of items_a_word rounds: the threads of a warp
    // share a word, so that they read side by side, and a warp's rounds are as many words. The
    // thread whose lane has the round's number keeps the word.
    HOTGRAFT_HD static std::int64_t item_of(std::int64_t block, int thread, int round) {
        const int lane = thread % items_a_word;
        const std::int64_t first_word = block * words_a_tile + (thread - lane);
        return (first_word + round) * items_a_word + lane;
    }

    // The word that a thread of a block keeps.
    HOTGRAFT_HD static std::int64_t word_of(std::int64_t block, int thread) {
        return block * words_a_tile + thread;
    }

    HOTGRAFT_HD bool marked(std::int64_t item) const {
        return words[item / items_a_word].bits >> (item % items_a_word) & 1;
    }

    // Marks before `item`, which may be n.
    HOTGRAFT_HD std::int64_t before(std::int64_t item) const {
        if (item == n) return *total;
        const Word word = words[item / items_a_word];
        const std::uint32_t lower = (1u << (item % items_a_word)) - 1;
        return offsets[item / tile] + word.before + count_bits(word.bits & lower);
    }
};
static_assert(sizeof(Ranks::Word) == sizeof(std::int64_t), "scratch is counted in these");

}  // namespace hotgraft
