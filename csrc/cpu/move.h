// gather, scatter, compare, and prefetch for them: one pass over a table, prefetched, shared among
// threads.
//
// Contract: the table's contents are valid (checked once, when it was made); `values` holds
// n_entries items of item_size 1, 2, 4 or 8 bytes. Entries of one table never share a cell.
#pragma once

#include <cstdint>

#include "core/table.h"

namespace hotgraft::cpu {

struct Mismatch {
    std::int64_t count;  // cells that differ
    std::int64_t first;  // the lowest differing entry, or -1
};

void gather(const Table& table, int item_size, void* values, int workers);
void scatter(const Table& table, int item_size, const void* values, int workers);
Mismatch compare(const Table& table, int item_size, const void* values, int workers);

// Has the other threads bring the first cells and values near while the caller does something else.
// Cells need not be there any more: nothing is read from or written to them. The table must live
// until the next verb or `drop_hints`.
void prefetch(const Table& table, int item_size, const void* values, int workers);

}  // namespace hotgraft::cpu
