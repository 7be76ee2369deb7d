// What the CUDA build is and what it finds here; and how every call into csrc/cuda answers.
//
// A call enqueues and returns a code: 0, or what CUDA says (a cudaError_t), or `not_built`. Nothing
// here allocates device memory or waits for a device. Launches go to the stream given, on the
// device that is current.
#pragma once

namespace hotgraft::cuda {

using Code = int;
using Stream = void*;  // a cudaStream_t

constexpr Code not_built = -1;

const char* name_of(Code code);
const char* sentence_of(Code code);

// The toolkit's version and the architectures compiled for; null where CUDA was not built.
const char* toolkit();
const char* architectures();

struct Status {
    Code code;    // 0: kernels can run
    int driver;   // the CUDA version the driver knows, as 1000 major + 10 minor; 0: no driver
    int runtime;  // the one built with
    int devices;
};
Status status();

}  // namespace hotgraft::cuda
