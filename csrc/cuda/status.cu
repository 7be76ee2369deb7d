#include <cuda_runtime.h>

#include "cuda/status.h"

namespace hotgraft::cuda {

const char* name_of(Code code) { return cudaGetErrorName(static_cast<cudaError_t>(code)); }

const char* sentence_of(Code code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

const char* toolkit() { return HOTGRAFT_CUDA_TOOLKIT; }

const char* architectures() { return HOTGRAFT_CUDA_ARCHITECTURES; }

Status status() {
    Status found{};
    // Each leaves 0 where it fails; what fails without a driver is the counting.
    cudaDriverGetVersion(&found.driver);
    cudaRuntimeGetVersion(&found.runtime);
    found.code = cudaGetDeviceCount(&found.devices);
    if (found.code != cudaSuccess) found.devices = 0;
    return found;
}

}  // namespace hotgraft::cuda
