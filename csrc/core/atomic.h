// What many threads of a GPU may do to one number; on the CPU, where tests run the same code one
// thread after another, the plain operation.
#pragma once

#include <cstdint>

#include "core/table.h"

namespace hotgraft {

using Number = unsigned long long;  // the type that CUDA's atomic functions take
static_assert(sizeof(Number) == 8);

HOTGRAFT_HD inline void add(Number* to, Number amount) {
#ifdef __CUDA_ARCH__
    atomicAdd(to, amount);
#else
    *to += amount;
#endif
}

HOTGRAFT_HD inline void lower(Number* to, Number bound) {
#ifdef __CUDA_ARCH__
    atomicMin(to, bound);
#else
    if (bound < *to) *to = bound;
#endif
}

HOTGRAFT_HD inline void raise(Number* to, Number bound) {
#ifdef __CUDA_ARCH__
    atomicMax(to, bound);
#else
    if (bound > *to) *to = bound;
#endif
}

}  // namespace hotgraft
