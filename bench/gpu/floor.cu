/* The floor on a GPU: the least that any program has to do, as raw kernels over flat addresses.
 *
 * A scatter of two-byte items: no table, no segments, no binary search. `each` entries a thread,
 * their loads and stores independent of one another. Compiled when the bench runs.
 */
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int threads = 256;

template <int each>
__global__ void __launch_bounds__(threads)
    scatter(uint16_t* const* addresses, const uint16_t* values, int64_t n) {
    // A block's share is contiguous; its threads take turns, so that loads are coalesced.
    const int64_t first = blockIdx.x * static_cast<int64_t>(threads) * each + threadIdx.x;
    uint16_t* cells[each];
    uint16_t wanted[each];
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const int64_t entry = first + i * threads < n ? first + i * threads : n - 1;
        cells[i] = addresses[entry];
        wanted[i] = values[entry];
    }
#pragma unroll
    for (int i = 0; i < each; ++i) *cells[i] = wanted[i];
}

template <int each>
void launch(uint16_t* const* addresses, const uint16_t* values, int64_t n, cudaStream_t stream) {
    const int64_t share = static_cast<int64_t>(threads) * each;
    const auto blocks = static_cast<unsigned>((n + share - 1) / share);
    scatter<each><<<blocks, threads, 0, stream>>>(addresses, values, n);
}

}  // namespace

/* Enqueues the scatter with 1, 4 or 8 entries a thread; returns the error code of the launch. */
extern "C" int floor_scatter(uint16_t* const* addresses, const uint16_t* values, int64_t n,
                             int each, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (n <= 0) return cudaSuccess;
    if (each == 1) {
        launch<1>(addresses, values, n, on);
    } else if (each == 4) {
        launch<4>(addresses, values, n, on);
    } else if (each == 8) {
        launch<8>(addresses, values, n, on);
    } else {
        return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
