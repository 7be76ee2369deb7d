// How every kernel is launched: on a stream, and answered by a code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/element.h"
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

}  // namespace hotgraft::cuda
