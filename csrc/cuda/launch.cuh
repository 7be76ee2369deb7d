// How every kernel is launched: on a stream, and answered by a code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/status.h"

namespace hotgraft::cuda {

template <class... Parameters, class... Arguments>
Code launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, Stream stream,
            const Arguments&... arguments) {
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    cudaLaunchConfig_t config{};
    config.gridDim = static_cast<unsigned>(blocks);
    config.blockDim = static_cast<unsigned>(threads);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Calls f with a zero of the unsigned type of 1, 2, 4 or 8 bytes.
template <class F>
Code for_size(int item_size, F&& f) {
    switch (item_size) {
        case 1: return f(std::uint8_t{});
        case 2: return f(std::uint16_t{});
        case 4: return f(std::uint32_t{});
        case 8: return f(std::uint64_t{});
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace hotgraft::cuda
