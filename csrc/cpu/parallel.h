// A small pool of threads that share out ranges of work.
#pragma once

#include <cstdint>
#include <functional>

namespace hotgraft::cpu {

// Cores this process may run on.
int max_workers();

// Calls body(begin, end, worker) on pieces of [0, n), each of `grain` items but the last, from up
// to `workers` threads, the calling one among them; returns when all are done. Pieces are claimed
// in ascending order; an exception in a piece is rethrown, and what became of the other pieces is
// not said. `worker` is in [0, workers). With n <= grain everything runs on the caller.
void parallel_for(std::int64_t n, std::int64_t grain, int workers,
                  const std::function<void(std::int64_t, std::int64_t, int)>& body);

// The same by the other threads alone, and nobody waits: what is not begun when the next job comes
// is dropped. Wakes the threads for that job, too. No body may throw.
void hint(std::int64_t n, std::int64_t grain, int workers,
          std::function<void(std::int64_t, std::int64_t, int)> body);

// Returns when no thread runs a piece of a hint any more, so that its memory may go.
void drop_hints();

}  // namespace hotgraft::cpu
