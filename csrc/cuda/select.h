// select on a GPU: the differing items of two arrays, their scores counted, the best collected.
//
// What is found is first marked and ranked in scratch memory (core/ranks.h), whose first 8 bytes
// then hold how many there are; who has made room for them calls `write_...` with the same scratch.
// Arrays begin at multiples of the item size; n <= 2^31.
#pragma once

#include <cstdint>

#include "core/value.h"
#include "cuda/status.h"

namespace hotgraft::cuda {

// Bytes of scratch for n items.
std::int64_t scratch_size(std::int64_t n);

Code mark_differing(const void* a, const void* b, std::int64_t n, int item_size, void* scratch,
                    Stream stream);

// Ascending positions of the marked items.
Code write_positions(const void* scratch, std::int64_t n, std::int32_t* positions, Stream stream);

// bins[65536] += the differing items whose score's bits above shift + 16 equal `prefix`, by their
// next 16 bits. lowest_nan, all ones at first, receives the lowest item whose difference is NaN.
Code count_scores(ValueType type, const void* a, const void* b, std::int64_t n, int shift,
                  std::uint64_t prefix, std::int64_t* bins, std::int64_t* lowest_nan,
                  Stream stream);

// Marks the differing items that score at least `lowest`; of those that score just that only the
// first `ties`. `more_scratch` is scratch, too, wanted where 0 < ties < n.
Code mark_reaching(ValueType type, const void* a, const void* b, std::int64_t n,
                   std::uint64_t lowest, std::int64_t ties, void* scratch, void* more_scratch,
                   Stream stream);

// Ascending positions of the marked items, and their scores' bits.
Code write_scores(ValueType type, const void* a, const void* b, const void* scratch, std::int64_t n,
                  std::int32_t* positions, std::uint64_t* keys, Stream stream);

}  // namespace hotgraft::cuda
