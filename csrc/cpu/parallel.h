// A small pool of threads that share out ranges of work.
#pragma once

#include <cstdint>
#include <functional>

namespace hotgraft::cpu {

// Cores this process may run on.
int max_workers();

// Wakes the threads that a job of so many workers will want. They stay awake for some 100 us, so
// that waking them overlaps with what the caller still has to do.
void rouse(int workers);

// Calls body(begin, end, worker) on pieces of [0, n), each of `grain` items but the last, from up
// to `workers` threads, the calling one among them; returns when all are done. Pieces are claimed
// in ascending order; an exception in a piece is rethrown, and what became of the other pieces is
// not said. `worker` is in [0, workers). With n <= grain everything runs on the caller.
void parallel_for(std::int64_t n, std::int64_t grain, int workers,
                  const std::function<void(std::int64_t, std::int64_t, int)>& body);

}  // namespace hotgraft::cpu
