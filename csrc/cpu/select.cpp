#include "cpu/select.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstring>
#include <mutex>

#include "core/element.h"
#include "cpu/environment.h"
#include "cpu/parallel.h"

namespace hotgraft::cpu {
namespace {

constexpr std::int64_t piece = 1 << 16;   // entries a thread claims at a time
constexpr std::int64_t window = 1 << 22;  // entries between two looks at what is left of the ties
constexpr std::int64_t pieces_a_thread = 16;  // whose findings a thread copies at a time
constexpr int block = 64;  // entries tested together before one is looked at alone

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
// `any_reaches`: some entry's bits differ and its score is not below the threshold (a NaN score is
// not below anything). One generic loop without branches that the compiler vectorises, instantiated
// once for each instruction set.

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

template <class V>
auto pick_any_reaches(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return any_reaches_avx512<V>;
    if (isa == Isa::avx2) return any_reaches_avx2<V>;
#endif
    (void)isa;
    return any_reaches_scalar<V>;
}

// masks[i]: which of the 64 bytes from 64 i on differ, the first in the lowest bit. Returns whether
// any does.
constexpr std::int64_t line = 64;
using Masks = bool (*)(const unsigned char* a, const unsigned char* b, std::int64_t lines,
                       std::uint64_t* masks);

bool differing_bytes_scalar(const unsigned char* a, const unsigned char* b, std::int64_t lines,
                            std::uint64_t* masks) {
    constexpr std::uint64_t ones = 0x0101010101010101;
    std::uint64_t any = 0;
    for (std::int64_t i = 0; i < lines; ++i) {
        std::uint64_t mask = 0;
        for (int word = 0; word < 8; ++word) {
            const std::int64_t at = i * line + word * 8;
            const std::uint64_t x =
                Elements<std::uint64_t>(a + at)[0] ^ Elements<std::uint64_t>(b + at)[0];
            // The lowest bit of each byte says whether the byte is not 0; the product lines the
            // eight of them up at its top.
            const std::uint64_t flags = ((((x & ones * 0x7f) + ones * 0x7f) | x) >> 7) & ones;
            mask |= (flags * 0x0102040810204080) >> 56 << (word * 8);
        }
        masks[i] = mask;
        any |= mask;
    }
    return any != 0;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) bool differing_bytes_avx2(const unsigned char* a,
                                                          const unsigned char* b,
                                                          std::int64_t lines,
                                                          std::uint64_t* masks) {
    std::uint64_t any = 0;
    const auto half = [](const unsigned char* x,
                         const unsigned char* y) __attribute__((target("avx2"))) {
        const __m256i equal =
            _mm256_cmpeq_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(y)));
        return ~static_cast<std::uint32_t>(_mm256_movemask_epi8(equal));
    };
    for (std::int64_t i = 0; i < lines; ++i, a += line, b += line) {
        masks[i] = half(a, b) | static_cast<std::uint64_t>(half(a + 32, b + 32)) << 32;
        any |= masks[i];
    }
    return any != 0;
}

__attribute__((target("avx512f,avx512bw"))) bool differing_bytes_avx512(const unsigned char* a,
                                                                        const unsigned char* b,
                                                                        std::int64_t lines,
                                                                        std::uint64_t* masks) {
    std::uint64_t any = 0;
    for (std::int64_t i = 0; i < lines; ++i) {
        masks[i] = _mm512_cmpneq_epi8_mask(_mm512_loadu_si512(a + i * line),
                                           _mm512_loadu_si512(b + i * line));
        any |= masks[i];
    }
    return any != 0;
}
#endif

Masks pick_differing_bytes(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return differing_bytes_avx512;
    if (isa == Isa::avx2) return differing_bytes_avx2;
#endif
    (void)isa;
    return differing_bytes_scalar;
}

// Differing bytes to differing items: the bit of an item's first byte, where any of its own is set.
template <class T>
std::uint64_t differing_items(std::uint64_t bytes) {
    for (std::size_t reach = 1; reach < sizeof(T); reach *= 2) bytes |= bytes >> reach;
    constexpr std::uint64_t firsts[] = {~0ull, 0x5555555555555555, 0, 0x1111111111111111, 0, 0,
                                        0,     0x0101010101010101};
    return bytes & firsts[sizeof(T) - 1];
}

// What one thread notes of one piece.
template <class T>
struct Notes {
    std::unique_ptr<std::int32_t[]> positions{new std::int32_t[piece]};
    std::unique_ptr<T[]> fresh{new T[piece]}, old{new T[piece]};
    std::int64_t count = 0;

    HOTGRAFT_INLINE void add(std::int64_t i, T a, T b) {
        positions[count] = static_cast<std::int32_t>(i);
        fresh[count] = b;
        old[count++] = a;
    }
};

template <class T>
void note(Elements<T> a, Elements<T> b, std::int64_t begin, std::int64_t end, Masks differing_bytes,
          Notes<T>& notes) {
    constexpr std::int64_t lines = 64;  // whose masks are taken together
    constexpr std::int64_t items = line / sizeof(T);
    std::uint64_t masks[lines];
    std::int64_t i = begin;
    while (i + items <= end) {
        const std::int64_t here = std::min(lines, (end - i) / items);
        if (differing_bytes((a + i).bytes, (b + i).bytes, here, masks)) {
            for (std::int64_t l = 0; l < here; ++l) {
                std::uint64_t left = masks[l] ? differing_items<T>(masks[l]) : 0;
                for (; left; left &= left - 1) {
                    const std::int64_t at =
                        i + l * items + __builtin_ctzll(left) / static_cast<int>(sizeof(T));
                    notes.add(at, a[at], b[at]);
                }
            }
        }
        i += here * items;
    }
    for (; i < end; ++i) {
        if (a[i] != b[i]) notes.add(i, a[i], b[i]);
    }
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

Difference::Difference(const void* a, const void* b, std::int64_t n, int item_size, int workers,
                       Isa isa)
    : item_size_(item_size), pieces_((n + piece - 1) / piece) {
    const Masks differing_bytes = pick_differing_bytes(resolve(isa));
    dispatch_size(item_size, [&](auto zero) {
        using T = decltype(zero);
        std::vector<std::unique_ptr<Notes<T>>> notebooks(std::max(workers, 1));
        parallel_for(n, piece, workers, [&](std::int64_t begin, std::int64_t end, int worker) {
            if (!notebooks[worker]) notebooks[worker].reset(new Notes<T>);
            Notes<T>& notes = *notebooks[worker];
            notes.count = 0;
            note<T>(Elements<T>(a), Elements<T>(b), begin, end, differing_bytes, notes);
            if (!notes.count) return;
            Piece& found = pieces_[begin / piece];
            found.count = notes.count;
            found.data.reset(
                new unsigned char[notes.count * (sizeof(std::int32_t) + 2 * sizeof(T))]);
            unsigned char* to = found.data.get();
            const auto keep = [&](const void* from, std::size_t size) {
                std::memcpy(to, from, notes.count * size);
                to += notes.count * size;
            };
            keep(notes.positions.get(), sizeof(std::int32_t));
            keep(notes.fresh.get(), sizeof(T));
            keep(notes.old.get(), sizeof(T));
        });
    });
    for (Piece& found : pieces_) {
        found.first = count_;
        count_ += found.count;
    }
}

void Difference::write(std::int32_t* positions, void* fresh, void* old, int workers) const {
    parallel_for(static_cast<std::int64_t>(pieces_.size()), pieces_a_thread, workers,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     for (std::int64_t i = begin; i < end; ++i) {
                         const Piece& found = pieces_[i];
                         const unsigned char* from = found.data.get();
                         const auto put = [&](void* to, std::int64_t size) {
                             if (!found.count) return;
                             std::memcpy(static_cast<unsigned char*>(to) + found.first * size, from,
                                         found.count * size);
                             from += found.count * size;
                         };
                         put(positions, sizeof(std::int32_t));
                         put(fresh, item_size_);
                         put(old, item_size_);
                     }
                 });
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
