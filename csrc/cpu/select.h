// select: which entries of two equally long arrays differ, and which differ most.
//
// The exact top-k of |difference| over many tensors reads the data as a stream, never copies it and
// needs memory for the result and one histogram a worker:
//   1. `count_scores` over every tensor adds up how many entries score in which bin (a bin is the
//      leading bits of the score as a double; non-negative doubles order like integers);
//   2. the caller finds the bin that holds the k-th entry, and may refine it by more bits;
//   3. `collect` over every tensor returns the entries at or above that bin.
// Only entries whose bits differ take part. The score is defined in core/value.h.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/value.h"

namespace hotgraft::cpu {

// Instruction set of the streaming loops; `best` asks the processor.
enum class Isa : std::int32_t { best, scalar, avx2, avx512 };
bool isa_runs_here(Isa isa);

// The entries of [0, n), n <= 2^31, at which the items' bits differ, found in one read.
class Difference {
  public:
    Difference(const void* a, const void* b, std::int64_t n, int item_size, int workers, Isa isa);

    std::int64_t count() const { return count_; }
    int item_size() const { return item_size_; }

    // Their ascending positions, and the items of b (new) and of a (old) there; all [count].
    void write(std::int32_t* positions, void* fresh, void* old, int workers) const;

  private:
    struct Piece {
        std::int64_t first, count;              // which of the entries
        std::unique_ptr<unsigned char[]> data;  // positions, new, old
    };
    int item_size_;
    std::int64_t count_ = 0;
    std::vector<Piece> pieces_;
};

constexpr int bin_bits = 16;

// One worker's counts. `floor` is a score that k of the entries it has seen already reach: lower
// ones cannot be among the k best of all, so they are skipped. All fields start at 0.
struct ScoreCounts {
    std::int64_t bins[1 << bin_bits];
    std::int64_t counted;  // entries in bins from `floor` up
    std::uint64_t floor;   // a bin
};

// Adds to counts[worker] the entries whose score's bits above shift + bin_bits equal `prefix`, by
// their next bin_bits bits. Returns the position of the lowest NaN difference, or -1.
std::int64_t count_scores(ValueType type, const void* a, const void* b, std::int64_t n, int shift,
                          std::uint64_t prefix, std::int64_t k, ScoreCounts* counts, int workers,
                          Isa isa);

struct Scored {
    std::vector<std::int32_t> positions;
    std::vector<std::uint64_t> keys;  // the scores' bits
};

// Ascending entries whose score's bits are at least `lowest`; of those that equal `lowest` only the
// first `ties`.
std::vector<Scored> collect(ValueType type, const void* a, const void* b, std::int64_t n,
                            std::uint64_t lowest, std::int64_t ties, int workers, Isa isa);

}  // namespace hotgraft::cpu
