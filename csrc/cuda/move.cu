#include "core/atomic.h"
#include "cuda/launch.cuh"
#include "cuda/move.h"

namespace hotgraft::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(grid::threads) gather_kernel(grid::Table table, T* values) {
    grid::gather(table, values, blockIdx.x, threadIdx.x);
}

template <class T>
__global__ void __launch_bounds__(grid::threads) scatter_kernel(grid::Scatter<T> moves) {
    moves(blockIdx.x, threadIdx.x);
}

template <class T>
__global__ void __launch_bounds__(grid::threads)
    compare_kernel(grid::Move<T> move, Number* differing, Number* from_end) {
    const unsigned different = grid::compare(move, blockIdx.x, threadIdx.x);
    const unsigned lanes = __ballot_sync(~0u, different != 0);
    if (lanes == 0) return;
    const unsigned count = __reduce_add_sync(~0u, __popc(different));
    // The warp's entries ascend from lane to lane, so its first lane that differs has the lowest.
    if (threadIdx.x % 32 == __ffs(lanes) - 1) {
        const auto share = grid::share_of(move.table.n_entries, blockIdx.x, threadIdx.x);
        add(differing, count);
        raise(from_end, move.table.n_entries - (share.first + __ffs(different) - 1));
    }
}

template <class T>
grid::Move<T> typed(const Move& move) {
    return {move.table, static_cast<const T*>(move.values)};
}

}  // namespace

Code gather(const grid::Table& table, int item_size, void* values, Stream stream) {
    return dispatch_size(item_size, [&](auto zero) {
        using T = decltype(zero);
        return launch(gather_kernel<T>, grid::blocks_for(table.n_entries), grid::threads, stream,
                      table, static_cast<T*>(values));
    });
}

Code scatter(const Move& first, const Move* second, int item_size, Stream stream) {
    return dispatch_size(item_size, [&](auto zero) {
        using T = decltype(zero);
        const std::int64_t split = grid::blocks_for(first.table.n_entries);
        const grid::Scatter<T> moves{typed<T>(first), typed<T>(second ? *second : first), split};
        const std::int64_t more = second ? grid::blocks_for(second->table.n_entries) : 0;
        return launch(scatter_kernel<T>, split + more, grid::threads, stream, moves);
    });
}

Code compare(const Move& move, int item_size, std::int64_t* report, Stream stream) {
    return dispatch_size(item_size, [&](auto zero) {
        using T = decltype(zero);
        auto* numbers = reinterpret_cast<Number*>(report);
        return launch(compare_kernel<T>, grid::blocks_for(move.table.n_entries), grid::threads,
                      stream, typed<T>(move), numbers, numbers + 1);
    });
}

Code load_moves() {
    Code code = cudaSuccess;
    for (int item_size : {1, 2, 4, 8}) {
        if (code != cudaSuccess) return code;
        code = dispatch_size(item_size, [](auto zero) -> Code {
            using T = decltype(zero);
            cudaFuncAttributes unused;
            for (const cudaError_t one : {cudaFuncGetAttributes(&unused, gather_kernel<T>),
                                          cudaFuncGetAttributes(&unused, scatter_kernel<T>),
                                          cudaFuncGetAttributes(&unused, compare_kernel<T>)}) {
                if (one != cudaSuccess) return one;
            }
            return cudaSuccess;
        });
    }
    return code;
}

}  // namespace hotgraft::cuda
