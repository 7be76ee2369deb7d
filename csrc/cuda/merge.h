// merge on a GPU: the union of several grafts' entries, row by row, resolved under a policy.
//
// What goes in and out is described in core/merge.h and cpu/merge.h; all of it is in device memory.
#pragma once

#include <cstdint>

#include "core/merge.h"
#include "cuda/status.h"

namespace hotgraft::cuda {

// Enqueues the whole merge. `n` entries in all go in; positions, fresh and old have room for as
// many out, though the union may be less: the first 8 bytes of scratch (select.h: scratch_size)
// receive how many. row_counts[rows] receives each row's. The counts begin at 0, their places at
// all ones.
Code merge(const Union& all, std::int64_t n, ValueType type, Policy policy, void* scratch,
           std::int64_t* row_counts, MergeCounts* counts, std::int32_t* positions, void* fresh,
           void* old, Stream stream);

}  // namespace hotgraft::cuda
