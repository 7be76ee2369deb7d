#include "core/select.h"
#include "cuda/compact.cuh"
#include "cuda/select.h"

namespace hotgraft::cuda {
namespace {

// Adds each item to its bin. The lanes of a warp that have the same bin, which most have, add once.
template <class T>
__global__ void __launch_bounds__(Ranks::words_a_tile)
    count_kernel(Binned<T> binned, std::int64_t n, Number* bins) {
    for (int round = 0; round < Ranks::items_a_word; ++round) {
        const std::int64_t item = item_of(round);
        const int bin = item < n ? binned(item) : -1;
        const unsigned peers = __match_any_sync(all_lanes, bin);
        if (bin >= 0 && threadIdx.x % warp == __ffs(peers) - 1) add(bins + bin, __popc(peers));
    }
}

template <class T>
Items<T> items(ValueType type, const void* a, const void* b) {
    return {static_cast<const T*>(a), static_cast<const T*>(b), type};
}

// Scratch that is only read from here on.
Ranks ranks_in(const void* scratch, std::int64_t n) {
    return Ranks::in(const_cast<void*>(scratch), n);
}

}  // namespace

std::int64_t scratch_size(std::int64_t n) { return Ranks::scratch_size(n); }

Code mark_differing(const void* a, const void* b, std::int64_t n, int item_size, void* scratch,
                    Stream stream) {
    return dispatch_size(item_size, [&](auto zero) {
        using T = decltype(zero);
        const Differs<T> test{items<T>(ValueType{}, a, b)};
        return mark(test, Ranks::in(scratch, n), stream);
    });
}

Code write_positions(const void* scratch, std::int64_t n, std::int32_t* positions, Stream stream) {
    return use_marked(WritePosition{positions}, ranks_in(scratch, n), stream);
}

Code count_scores(ValueType type, const void* a, const void* b, std::int64_t n, int shift,
                  std::uint64_t prefix, std::int64_t* bins, std::int64_t* lowest_nan,
                  Stream stream) {
    return dispatch_size(item_size_of(type), [&](auto zero) {
        using T = decltype(zero);
        const Binned<T> binned{items<T>(type, a, b), shift, prefix,
                               reinterpret_cast<Number*>(lowest_nan)};
        return launch(count_kernel<T>, Ranks::tiles_for(n), Ranks::words_a_tile, stream, binned, n,
                      reinterpret_cast<Number*>(bins));
    });
}

Code mark_reaching(ValueType type, const void* a, const void* b, std::int64_t n,
                   std::uint64_t lowest, std::int64_t ties, void* scratch, void* more_scratch,
                   Stream stream) {
    return dispatch_size(item_size_of(type), [&](auto zero) {
        using T = decltype(zero);
        Reaches<T> test{items<T>(type, a, b), lowest + (ties == 0), ties, {}};
        if (0 < ties && ties < n) {
            test.equals = Ranks::in(more_scratch, n);
            const Code code = mark(Equals<T>{test.items, lowest}, test.equals, stream);
            if (code) return code;
        }
        return mark(test, Ranks::in(scratch, n), stream);
    });
}

Code write_scores(ValueType type, const void* a, const void* b, const void* scratch, std::int64_t n,
                  std::int32_t* positions, std::uint64_t* keys, Stream stream) {
    return dispatch_size(item_size_of(type), [&](auto zero) {
        using T = decltype(zero);
        return use_marked(WriteScore<T>{items<T>(type, a, b), positions, keys},
                          ranks_in(scratch, n), stream);
    });
}

}  // namespace hotgraft::cuda
