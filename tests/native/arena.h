// Memory for moves to be tested on.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"
#include "core/table.h"

// Segments, each with a heap block of its own, and the table over them.
template <class T>
struct Arena {
    std::vector<std::unique_ptr<T[]>> blocks;
    std::vector<std::int64_t> sizes;
    std::vector<hotgraft::Segment> segments;
    std::vector<std::int32_t> positions;
    std::vector<T*> cells;  // of every entry

    // `shift` moves the base address and the positions against each other; the cells stay.
    void add(std::int64_t size, std::int64_t count, std::int64_t shift = 0) {
        blocks.push_back(std::make_unique<T[]>(size));
        sizes.push_back(size);
        T* block = blocks.back().get();
        for (std::int64_t i = 0; i < size; ++i) block[i] = static_cast<T>(random_bits());
        const auto base = reinterpret_cast<std::uint64_t>(block) - shift * sizeof(T);
        segments.push_back({base, static_cast<std::int64_t>(positions.size()), count});
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t at = i * size / count;
            positions.push_back(static_cast<std::int32_t>(at + shift));
            cells.push_back(block + at);
        }
    }

    hotgraft::Table table() const {
        return {segments.data(), static_cast<std::int64_t>(segments.size()), positions.data(),
                static_cast<std::int64_t>(positions.size())};
    }

    std::vector<T> everything() const {
        std::vector<T> all;
        for (std::size_t i = 0; i < blocks.size(); ++i) {
            all.insert(all.end(), blocks[i].get(), blocks[i].get() + sizes[i]);
        }
        return all;
    }
};
