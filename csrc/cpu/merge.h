// merge: the union of several grafts' entries, each resolved to bits under a policy.
//
// Inputs are flat arrays a graft; `ranges` says where in them each union row lies. Within a row
// positions ascend and are unique. Policies and their arithmetic are those of core/policy.h. What
// is written for a position that cannot be resolved says nothing; the report says why.
#pragma once

#include <cstdint>
#include <vector>

#include "core/policy.h"
#include "core/value.h"

namespace hotgraft::cpu {

using hotgraft::Policy;

struct Source {
    const std::int32_t* positions;
    const void* fresh;  // the bits to write
    const void* old;    // the bits of the base
    double weight;
};

struct Range {
    std::int64_t first, count;
};

struct Place {
    std::int64_t row = -1;
    std::int32_t position = 0;
};

struct MergeReport {
    std::vector<std::int64_t> conflicts;  // [k][k], upper triangle: entries on which two sources
                                          // disagree under `refuse`
    std::int64_t base_mismatches = 0;     // entries on which the sources' old bits differ
    Place first_base_mismatch;
    std::int64_t overflows = 0;  // entries whose resolved value is not finite
    Place first_overflow;
};

// Entries of each row's union: counts[row].
void count_union(const std::vector<Source>& sources, const Range* ranges, std::int64_t rows,
                 std::int64_t* counts, int workers);

// Fills the union's flat arrays; offsets[row] is where the row's entries begin. `order[i]` is the
// rank of source i under `priority`: the highest wins.
MergeReport merge(const std::vector<Source>& sources, const Range* ranges, std::int64_t rows,
                  const std::int64_t* offsets, ValueType type, Policy policy,
                  const std::int64_t* order, std::int32_t* positions, void* fresh, void* old,
                  int workers);

// Converts n floating values between types, each rounded once. Returns how many finite values
// became infinite.
std::int64_t round(ValueType from, const void* in, ValueType to, void* out, std::int64_t n);

}  // namespace hotgraft::cpu
