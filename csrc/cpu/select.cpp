#include "cpu/select.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "cpu/environment.h"
#include "cpu/parallel.h"

namespace hotgraft::cpu {
namespace {

constexpr std::int64_t piece = 1 << 16;   // entries a thread claims at a time
constexpr std::int64_t window = 1 << 22;  // entries between two looks at what is left of the ties
constexpr int block = 64;                 // entries tested together before one is looked at alone

#define HOTGRAFT_INLINE inline __attribute__((always_inline))

// Elements at any address: a mapped file need not align its tensors.
template <class T>
struct Elements {
    const unsigned char* bytes;

    explicit Elements(const void* start) : bytes(static_cast<const unsigned char*>(start)) {}
    HOTGRAFT_INLINE T operator[](std::int64_t i) const {
        T element;
        std::memcpy(&element, bytes + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
        return element;
    }
    Elements operator+(std::int64_t i) const {
        return Elements(bytes + i * static_cast<std::int64_t>(sizeof(T)));
    }
};

// ---- the streaming tests -----------------------------------------------------------------------
// Each is one generic loop without branches that the compiler vectorises, instantiated once for
// each instruction set. `any_differs`: some item's bits differ. `any_reaches`: some entry's bits
// differ and its score is not below the threshold (a NaN score is not below anything).

template <class T>
HOTGRAFT_INLINE bool any_differs_body(Elements<T> a, Elements<T> b) {
    T different = 0;
    for (int i = 0; i < block; ++i) different |= static_cast<T>(a[i] ^ b[i]);
    return different != 0;
}

template <class V>
HOTGRAFT_INLINE bool any_reaches_body(Elements<typename V::Bits> a, Elements<typename V::Bits> b,
                                      double threshold) {
    using Wide = typename V::Wide;
    if constexpr (std::is_integral_v<Wide>) {
        return any_differs_body(a, b);
    } else {
        const Wide least = static_cast<Wide>(threshold);
        std::uint32_t reached = 0;
        for (int i = 0; i < block; ++i) {
            const bool below = std::fabs(V::decode(a[i]) - V::decode(b[i])) < least;
            reached |=
                static_cast<std::uint32_t>(!below) & static_cast<std::uint32_t>(a[i] != b[i]);
        }
        return reached != 0;
    }
}

#define HOTGRAFT_ISA(suffix, attribute)                                                   \
    template <class T>                                                                    \
    attribute bool any_differs_##suffix(Elements<T> a, Elements<T> b) {                   \
        return any_differs_body(a, b);                                                    \
    }                                                                                     \
    template <class V>                                                                    \
    attribute bool any_reaches_##suffix(Elements<typename V::Bits> a,                     \
                                        Elements<typename V::Bits> b, double threshold) { \
        return any_reaches_body<V>(a, b, threshold);                                      \
    }

HOTGRAFT_ISA(scalar, )
#if defined(__x86_64__)
HOTGRAFT_ISA(avx2, __attribute__((target("avx2"))))
HOTGRAFT_ISA(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif
#undef HOTGRAFT_ISA

Isa resolve(Isa isa) {
    if (isa != Isa::best) return isa;
    if (isa_runs_here(Isa::avx512)) return Isa::avx512;
    return isa_runs_here(Isa::avx2) ? Isa::avx2 : Isa::scalar;
}

template <class T>
auto pick_any_differs(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return any_differs_avx512<T>;
    if (isa == Isa::avx2) return any_differs_avx2<T>;
#endif
    (void)isa;
    return any_differs_scalar<T>;
}

template <class V>
auto pick_any_reaches(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return any_reaches_avx512<V>;
    if (isa == Isa::avx2) return any_reaches_avx2<V>;
#endif
    (void)isa;
    return any_reaches_scalar<V>;
}

// Calls f(position, key) for the entries of [begin, end) whose bits differ, ascending, passing over
// blocks in which none scores `threshold()` bits or more; what f gets may still be below it.
template <class V, class Threshold, class F>
void scan(Elements<typename V::Bits> a, Elements<typename V::Bits> b, std::int64_t begin,
          std::int64_t end, Isa isa, Threshold&& threshold, F&& f) {
    const auto any_reaches = pick_any_reaches<V>(isa);
    const auto look = [&](std::int64_t i) {
        if (a[i] != b[i]) f(i, bit_cast<std::uint64_t>(score<V>(a[i], b[i])));
    };
    std::int64_t i = begin;
    for (; i + block <= end; i += block) {
        if (!any_reaches(a + i, b + i, bit_cast<double>(threshold()))) continue;
        for (int j = 0; j < block; ++j) look(i + j);
    }
    for (; i < end; ++i) look(i);
}

constexpr std::uint64_t infinity_key = 0x7ffull << 52;

}  // namespace

bool isa_runs_here(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    }
    if (isa == Isa::avx2) return __builtin_cpu_supports("avx2");
#endif
    return isa == Isa::best || isa == Isa::scalar;
}

std::vector<std::vector<std::int32_t>> difference(const void* a, const void* b, std::int64_t n,
                                                  int item_size, int workers, Isa isa) {
    std::vector<std::vector<std::int32_t>> found((n + piece - 1) / piece);
    const auto run = [&](auto zero) {
        using T = decltype(zero);
        const Elements<T> left(a);
        const Elements<T> right(b);
        const auto any_differs = pick_any_differs<T>(resolve(isa));
        parallel_for(n, piece, workers, [&](std::int64_t begin, std::int64_t end, int) {
            std::vector<std::int32_t>& here = found[begin / piece];
            // Without a branch an item: every position is noted, and kept if the bits differ.
            std::int32_t hits[block];
            const auto look = [&](std::int64_t i, std::int64_t count) {
                int n = 0;
                for (std::int64_t j = i; j < i + count; ++j) {
                    hits[n] = static_cast<std::int32_t>(j);
                    n += left[j] != right[j];
                }
                here.insert(here.end(), hits, hits + n);
            };
            std::int64_t i = begin;
            for (; i + block <= end; i += block) {
                if (any_differs(left + i, right + i)) look(i, block);
            }
            look(i, end - i);
        });
    };
    switch (item_size) {
        case 1: run(std::uint8_t{}); break;
        case 2: run(std::uint16_t{}); break;
        case 4: run(std::uint32_t{}); break;
        default: run(std::uint64_t{}); break;
    }
    return found;
}

std::int64_t count_scores(ValueType type, const void* a, const void* b, std::int64_t n, int shift,
                          std::uint64_t prefix, std::int64_t k, ScoreCounts* counts, int workers,
                          Isa isa) {
    isa = resolve(isa);
    std::int64_t first_nan = INT64_MAX;
    std::mutex mutex;
    dispatch_value(type, [&](auto value) {
        using V = decltype(value);
        const Elements<typename V::Bits> left(a);
        const Elements<typename V::Bits> right(b);
        parallel_for(n, piece, workers, [&](std::int64_t begin, std::int64_t end, int worker) {
            const DefaultEnvironment environment;
            ScoreCounts& mine = counts[worker];
            std::int64_t nan_here = INT64_MAX;
            const auto threshold = [&] { return ((prefix << bin_bits) | mine.floor) << shift; };
            scan<V>(left, right, begin, end, isa, threshold,
                    [&](std::int64_t i, std::uint64_t key) {
                        if (key > infinity_key) nan_here = std::min(nan_here, i);
                        const std::uint64_t digits = key >> shift;
                        if (digits >> bin_bits != prefix) return;
                        const std::uint64_t bin = digits & ((1u << bin_bits) - 1);
                        if (bin < mine.floor) return;
                        ++mine.bins[bin];
                        ++mine.counted;
                        while (mine.counted - mine.bins[mine.floor] >= k) {
                            mine.counted -= mine.bins[mine.floor++];
                        }
                    });
            if (nan_here != INT64_MAX) {
                std::lock_guard<std::mutex> lock(mutex);
                first_nan = std::min(first_nan, nan_here);
            }
        });
    });
    return first_nan == INT64_MAX ? -1 : first_nan;
}

std::vector<Scored> collect(ValueType type, const void* a, const void* b, std::int64_t n,
                            std::uint64_t lowest, std::int64_t ties, int workers, Isa isa) {
    isa = resolve(isa);
    std::vector<Scored> found((n + piece - 1) / piece);
    dispatch_value(type, [&](auto value) {
        using V = decltype(value);
        const Elements<typename V::Bits> left(a);
        const Elements<typename V::Bits> right(b);
        // Window by window, so that the entries held are bounded however many tie.
        for (std::int64_t start = 0; start < n; start += window) {
            const std::int64_t size = std::min(window, n - start);
            parallel_for(size, piece, workers, [&](std::int64_t begin, std::int64_t end, int) {
                const DefaultEnvironment environment;
                begin += start, end += start;
                Scored& here = found[begin / piece];
                std::int64_t ties_here = 0;
                const std::uint64_t threshold = lowest + (ties > 0 ? 0 : 1);
                scan<V>(
                    left, right, begin, end, isa, [&] { return threshold; },
                    [&](std::int64_t i, std::uint64_t key) {
                        if (key < threshold) return;
                        if (key == lowest && ++ties_here > ties) return;
                        here.positions.push_back(static_cast<std::int32_t>(i));
                        here.keys.push_back(key);
                    });
            });
            for (std::int64_t p = start / piece; p < (start + size + piece - 1) / piece; ++p) {
                std::size_t kept = 0;
                for (std::size_t i = 0; i < found[p].keys.size(); ++i) {
                    if (found[p].keys[i] == lowest && --ties < 0) continue;
                    found[p].keys[kept] = found[p].keys[i];
                    found[p].positions[kept++] = found[p].positions[i];
                }
                found[p].keys.resize(kept);
                found[p].positions.resize(kept);
                ties = std::max<std::int64_t>(ties, 0);
            }
        }
    });
    return found;
}

}  // namespace hotgraft::cpu
