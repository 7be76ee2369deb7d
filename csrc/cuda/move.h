// gather, scatter and compare on a GPU: one launch for a whole table.
//
// Contract: that of cpu/move.h; `item_size` is 1, 2, 4 or 8; tables, values and cells are on the
// current device. Positions and values that begin at multiples of 16 bytes move fastest.
#pragma once

#include <cstdint>

#include "core/grid.h"
#include "cuda/status.h"

namespace hotgraft::cuda {

// Values as bytes of unsaid type.
struct Move {
    grid::Table table;
    const void* values;
};

Code gather(const grid::Table& table, int item_size, void* values, Stream stream);

// One move or two in one launch; `second` may be null. The two share no cell.
Code scatter(const Move& first, const Move* second, int item_size, Stream stream);

// report[0] += cells that differ; report[1] = the highest (n_entries - entry) among them, if that
// is more than it holds.
Code compare(const Move& move, int item_size, std::int64_t* report, Stream stream);

// Loads the kernels above to the current device. A first launch would do it too, but must not
// happen while a stream is captured.
Code load_moves();

}  // namespace hotgraft::cuda
