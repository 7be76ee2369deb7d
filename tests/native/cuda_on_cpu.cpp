// csrc/cuda imitated on the CPU, behind its own bindings: a module with a submodule `cuda` that
// takes addresses in the CPU's memory. It lets the whole way from Python to what a thread does be
// judged without a GPU.
#include <pybind11/pybind11.h>

#include "bindings/cuda.h"
#include "core/element.h"
#include "core/select.h"
#include "cuda/merge.h"
#include "cuda/move.h"
#include "cuda/select.h"
#include "cuda/status.h"
#include "imitation.h"

namespace hotgraft::cuda {

using namespace imitation;

const char* name_of(Code) { return "imitated"; }
const char* sentence_of(Code) { return "imitated on the CPU"; }
const char* toolkit() { return nullptr; }
const char* architectures() { return nullptr; }
Status status() { return {not_built, 0, 0, 0}; }

// ---- moves --------------------------------------------------------------------------------------

Code gather(const grid::Table& table, int item_size, void* values, Stream) {
    dispatch_size(item_size, [&](auto zero) {
        for_threads(grid::blocks_for(table.n_entries), [&](std::int64_t block, int thread) {
            grid::gather(table, static_cast<decltype(zero)*>(values), block, thread);
        });
    });
    return 0;
}

template <class T>
grid::Move<T> typed(const Move& move) {
    return {move.table, static_cast<const T*>(move.values)};
}

Code scatter(const Move& first, const Move* second, int item_size, Stream) {
    dispatch_size(item_size, [&](auto zero) {
        using T = decltype(zero);
        const std::int64_t split = grid::blocks_for(first.table.n_entries);
        const std::int64_t more = second ? grid::blocks_for(second->table.n_entries) : 0;
        const grid::Move<T> other = typed<T>(second ? *second : first);
        for_threads(split + more, grid::Scatter<T>{typed<T>(first), other, split});
    });
    return 0;
}

Code compare(const Move& move, int item_size, std::int64_t* report, Stream) {
    auto* numbers = reinterpret_cast<Number*>(report);
    dispatch_size(item_size, [&](auto zero) {
        imitation::compare(typed<decltype(zero)>(move), numbers, numbers + 1);
    });
    return 0;
}

Code load_moves() { return 0; }

// ---- select -------------------------------------------------------------------------------------

std::int64_t scratch_size(std::int64_t n) { return Ranks::scratch_size(n); }

template <class T>
Items<T> items(ValueType type, const void* a, const void* b) {
    return {static_cast<const T*>(a), static_cast<const T*>(b), type};
}

Ranks ranks_in(const void* scratch, std::int64_t n) {
    return Ranks::in(const_cast<void*>(scratch), n);
}

Code mark_differing(const void* a, const void* b, std::int64_t n, int item_size, void* scratch,
                    Stream) {
    dispatch_size(item_size, [&](auto zero) {
        using T = decltype(zero);
        mark(Differs<T>{items<T>(ValueType{}, a, b)}, Ranks::in(scratch, n));
    });
    return 0;
}

Code write_positions(const void* scratch, std::int64_t n, std::int32_t* positions, Stream) {
    use_marked(WritePosition{positions}, ranks_in(scratch, n));
    return 0;
}

Code count_scores(ValueType type, const void* a, const void* b, std::int64_t n, int shift,
                  std::uint64_t prefix, std::int64_t* bins, std::int64_t* lowest_nan, Stream) {
    dispatch_value(type, [&](auto value) {
        using T = typename decltype(value)::Bits;
        const Binned<T> binned{items<T>(type, a, b), shift, prefix,
                               reinterpret_cast<Number*>(lowest_nan)};
        for (std::int64_t i = 0; i < n; ++i) {
            const int bin = binned(i);
            if (bin >= 0) ++bins[bin];
        }
    });
    return 0;
}

Code mark_reaching(ValueType type, const void* a, const void* b, std::int64_t n,
                   std::uint64_t lowest, std::int64_t ties, void* scratch, void* more_scratch,
                   Stream) {
    dispatch_value(type, [&](auto value) {
        using T = typename decltype(value)::Bits;
        Reaches<T> test{items<T>(type, a, b), lowest + (ties == 0), ties, {}};
        if (0 < ties && ties < n) {
            test.equals = Ranks::in(more_scratch, n);
            mark(Equals<T>{test.items, lowest}, test.equals);
        }
        mark(test, Ranks::in(scratch, n));
    });
    return 0;
}

Code write_scores(ValueType type, const void* a, const void* b, const void* scratch, std::int64_t n,
                  std::int32_t* positions, std::uint64_t* keys, Stream) {
    dispatch_value(type, [&](auto value) {
        using T = typename decltype(value)::Bits;
        use_marked(WriteScore<T>{items<T>(type, a, b), positions, keys}, ranks_in(scratch, n));
    });
    return 0;
}

// ---- merge --------------------------------------------------------------------------------------

Code merge(const Union& all, std::int64_t n, ValueType type, Policy policy, void* scratch,
           std::int64_t* row_counts, MergeCounts* counts, std::int32_t* positions, void* fresh,
           void* old, Stream) {
    const Ranks leaders = Ranks::in(scratch, n);
    mark(Leads{all}, leaders);
    const CountRow count{all, leaders, row_counts};
    for (std::int64_t row = 0; row < all.rows; ++row) count(row);
    dispatch_merge(type, [&](auto value) {
        using V = decltype(value);
        using Bits = typename V::Bits;
        use_marked(Resolve<V>{all, leaders, policy, counts, positions, static_cast<Bits*>(fresh),
                              static_cast<Bits*>(old)},
                   leaders);
    });
    return 0;
}

}  // namespace hotgraft::cuda

PYBIND11_MODULE(cuda_on_cpu, m) { hotgraft::bindings::define_cuda(m); }
