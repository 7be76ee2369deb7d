// What the native tests share. The first failed check ends the program with its line.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>

#define CHECK(held)                                                        \
    do {                                                                   \
        if (!(held)) {                                                     \
            std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #held); \
            std::exit(1);                                                  \
        }                                                                  \
    } while (false)

inline std::mt19937_64 random_bits(7);

inline std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(random_bits() % n); }

using Test = std::pair<const char*, void (*)()>;

// Runs the tests, each after its name is printed.
template <int n>
int run_tests(const Test (&tests)[n]) {
    for (const auto& [name, test] : tests) {
        std::printf("%s\n", name);
        std::fflush(stdout);
        test();
    }
    std::printf("all passed\n");
    return 0;
}
