#include "cuda/compact.cuh"
#include "cuda/merge.h"

namespace hotgraft::cuda {
namespace {

constexpr int counters = 128;

__global__ void __launch_bounds__(counters) count_kernel(CountRow count) {
    const std::int64_t row = blockIdx.x * std::int64_t{counters} + threadIdx.x;
    if (row < count.all.rows) count(row);
}

}  // namespace

Code merge(const Union& all, std::int64_t n, ValueType type, Policy policy, void* scratch,
           std::int64_t* row_counts, MergeCounts* counts, std::int32_t* positions, void* fresh,
           void* old, Stream stream) {
    const Ranks leaders = Ranks::in(scratch, n);
    if (const Code code = mark(Leads{all}, leaders, stream)) return code;
    const CountRow rows{all, leaders, row_counts};
    const std::int64_t blocks = (all.rows + counters - 1) / counters;
    if (const Code code = launch(count_kernel, blocks, counters, stream, rows)) return code;
    return dispatch_merge(type, [&](auto value) {
        using V = decltype(value);
        using Bits = typename V::Bits;
        const Resolve<V> resolve{all,
                                 leaders,
                                 policy,
                                 counts,
                                 positions,
                                 static_cast<Bits*>(fresh),
                                 static_cast<Bits*>(old)};
        return use_marked(resolve, leaders, stream);
    });
}

}  // namespace hotgraft::cuda
