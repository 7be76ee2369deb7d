// Stands in for csrc/cuda where it was not built: every call answers with a code that says so.
#include "cuda/merge.h"
#include "cuda/move.h"
#include "cuda/select.h"
#include "cuda/status.h"

namespace hotgraft::cuda {

const char* name_of(Code) { return "hotgraftCudaNotBuilt"; }

const char* sentence_of(Code) {
    return "this build has no CUDA kernels: nvcc was not found when it was made";
}

const char* toolkit() { return nullptr; }
const char* architectures() { return nullptr; }
Status status() { return {not_built, 0, 0, 0}; }

Code gather(const grid::Table&, int, void*, Stream) { return not_built; }
Code scatter(const Move&, const Move*, int, Stream) { return not_built; }
Code compare(const Move&, int, std::int64_t*, Stream) { return not_built; }
Code load_moves() { return not_built; }

std::int64_t scratch_size(std::int64_t n) { return Ranks::scratch_size(n); }

Code mark_differing(const void*, const void*, std::int64_t, int, void*, Stream) {
    return not_built;
}

Code write_positions(const void*, std::int64_t, std::int32_t*, Stream) { return not_built; }

Code count_scores(ValueType, const void*, const void*, std::int64_t, int, std::uint64_t,
                  std::int64_t*, std::int64_t*, Stream) {
    return not_built;
}

Code mark_reaching(ValueType, const void*, const void*, std::int64_t, std::uint64_t, std::int64_t,
                   void*, void*, Stream) {
    return not_built;
}

Code write_scores(ValueType, const void*, const void*, const void*, std::int64_t, std::int32_t*,
                  std::uint64_t*, Stream) {
    return not_built;
}

Code merge(const Union&, std::int64_t, ValueType, Policy, void*, std::int64_t*, MergeCounts*,
           std::int32_t*, void*, void*, Stream) {
    return not_built;
}

}  // namespace hotgraft::cuda
