#include "bindings/cuda.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/merge.h"
#include "cuda/move.h"
#include "cuda/select.h"
#include "cuda/status.h"

namespace hotgraft::bindings {
namespace {

namespace py = pybind11;

using Address = std::uintptr_t;  // of device memory, or a stream's handle

void require(bool held, const char* sentence) {
    if (!held) throw py::value_error(sentence);
}

template <class T>
T* at(Address address) {
    require(address % alignof(T) == 0, "an address is no multiple of its items' size");
    return reinterpret_cast<T*>(address);
}

// Enqueues without the GIL, since a launch waits where a stream is full, and raises what went
// wrong.
template <class F>
void enqueue(F&& f) {
    cuda::Code code;
    {
        py::gil_scoped_release released;
        code = f();
    }
    if (code) {
        throw std::runtime_error(std::string(cuda::name_of(code)) + " (" + std::to_string(code) +
                                 "): " + cuda::sentence_of(code));
    }
}

void check_item_size(int item_size) {
    require(item_size == 1 || item_size == 2 || item_size == 4 || item_size == 8,
            "item_size must be 1, 2, 4 or 8");
}

void check_items(Address a, Address b, std::int64_t n, int item_size) {
    check_item_size(item_size);
    require(n >= 0 && n <= (std::int64_t{1} << 31), "n must be in [0, 2^31]: split larger tensors");
    require(a % item_size == 0 && b % item_size == 0,
            "the arrays must begin at multiples of their items' size");
}

ValueType value_type(int code) {
    require(code >= 0 && code <= static_cast<int>(ValueType::u64), "unknown value type code");
    return static_cast<ValueType>(code);
}

int size_of(ValueType type) {
    return dispatch_value(
        type, [](auto value) { return static_cast<int>(sizeof(typename decltype(value)::Bits)); });
}

// ---- moves --------------------------------------------------------------------------------------

// segments, tiles, positions, n_entries
using TableArguments = std::tuple<Address, Address, Address, std::int64_t>;

cuda::Move move_of(const TableArguments& arguments, Address values, int item_size) {
    const auto [segments, tiles, positions, n_entries] = arguments;
    check_item_size(item_size);
    require(segments && tiles && positions && values, "an address is 0");
    require(n_entries > 0, "a table has entries");
    require(values % item_size == 0, "values must begin at a multiple of item_size");
    return {{at<const Segment>(segments), at<const std::int32_t>(tiles),
             at<const std::int32_t>(positions), n_entries},
            reinterpret_cast<const void*>(values)};
}

void gather(const TableArguments& table, int item_size, Address values, Address stream) {
    const cuda::Move move = move_of(table, values, item_size);
    enqueue([&] {
        return cuda::gather(move.table, item_size, const_cast<void*>(move.values),
                            reinterpret_cast<cuda::Stream>(stream));
    });
}

void scatter(const std::vector<std::pair<TableArguments, Address>>& arguments, int item_size,
             Address stream) {
    require(arguments.size() == 1 || arguments.size() == 2, "one or two moves in a launch");
    cuda::Move moves[2];
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        moves[i] = move_of(arguments[i].first, arguments[i].second, item_size);
    }
    enqueue([&] {
        return cuda::scatter(moves[0], arguments.size() == 2 ? &moves[1] : nullptr, item_size,
                             reinterpret_cast<cuda::Stream>(stream));
    });
}

void compare(const TableArguments& table, int item_size, Address values, Address report,
             Address stream) {
    const cuda::Move move = move_of(table, values, item_size);
    auto* numbers = at<std::int64_t>(report);
    enqueue([&] {
        return cuda::compare(move, item_size, numbers, reinterpret_cast<cuda::Stream>(stream));
    });
}

// ---- select -------------------------------------------------------------------------------------

void mark_differing(Address a, Address b, std::int64_t n, int item_size, Address scratch,
                    Address stream) {
    check_items(a, b, n, item_size);
    enqueue([&, to = at<std::int64_t>(scratch)] {
        return cuda::mark_differing(reinterpret_cast<const void*>(a),
                                    reinterpret_cast<const void*>(b), n, item_size, to,
                                    reinterpret_cast<cuda::Stream>(stream));
    });
}

void write_positions(Address scratch, std::int64_t n, Address positions, Address stream) {
    enqueue([&, from = at<std::int64_t>(scratch), to = at<std::int32_t>(positions)] {
        return cuda::write_positions(from, n, to, reinterpret_cast<cuda::Stream>(stream));
    });
}

void count_scores(int type, Address a, Address b, std::int64_t n, int shift, std::uint64_t prefix,
                  Address bins, Address lowest_nan, Address stream) {
    const ValueType value = value_type(type);
    check_items(a, b, n, size_of(value));
    require(shift >= 0 && shift <= 48 && shift % 16 == 0, "shift must be 48, 32, 16 or 0");
    enqueue([&, to = at<std::int64_t>(bins), nan = at<std::int64_t>(lowest_nan)] {
        return cuda::count_scores(value, reinterpret_cast<const void*>(a),
                                  reinterpret_cast<const void*>(b), n, shift, prefix, to, nan,
                                  reinterpret_cast<cuda::Stream>(stream));
    });
}

void mark_reaching(int type, Address a, Address b, std::int64_t n, std::uint64_t lowest,
                   std::int64_t ties, Address scratch, Address more_scratch, Address stream) {
    const ValueType value = value_type(type);
    check_items(a, b, n, size_of(value));
    require(ties >= 0, "ties must not be negative");
    require(more_scratch || ties == 0 || ties >= n, "so many ties want more_scratch");
    enqueue([&, to = at<std::int64_t>(scratch), more = at<std::int64_t>(more_scratch)] {
        return cuda::mark_reaching(value, reinterpret_cast<const void*>(a),
                                   reinterpret_cast<const void*>(b), n, lowest, ties, to, more,
                                   reinterpret_cast<cuda::Stream>(stream));
    });
}

void write_scores(int type, Address a, Address b, std::int64_t n, Address scratch,
                  Address positions, Address keys, Address stream) {
    const ValueType value = value_type(type);
    check_items(a, b, n, size_of(value));
    enqueue([&, from = at<std::int64_t>(scratch), to = at<std::int32_t>(positions),
             keys_to = at<std::uint64_t>(keys)] {
        return cuda::write_scores(value, reinterpret_cast<const void*>(a),
                                  reinterpret_cast<const void*>(b), from, n, to, keys_to,
                                  reinterpret_cast<cuda::Stream>(stream));
    });
}

// ---- merge --------------------------------------------------------------------------------------

void merge(Address spans, Address inputs, std::int64_t rows, std::int64_t k, std::int64_t n,
           int type, int policy, Address scratch, Address row_counts, Address counts,
           Address positions, Address fresh, Address old, Address stream) {
    const ValueType value = value_type(type);
    require(policy >= 0 && policy <= static_cast<int>(Policy::sign), "unknown policy code");
    require(rows >= 0 && k > 0 && n >= 0, "a merge has sources, and no negative sizes");
    require(rows <= INT32_MAX / k, "rows times sources must be below 2^31");
    const Address size = size_of(value);
    require(fresh % size == 0 && old % size == 0, "new and old must begin at multiples of a value");
    const Union all{at<const Span>(spans), at<const MergeInput>(inputs), rows, k};
    enqueue([&, scratch_at = at<std::int64_t>(scratch), rows_at = at<std::int64_t>(row_counts),
             counts_at = at<MergeCounts>(counts), positions_at = at<std::int32_t>(positions)] {
        return cuda::merge(all, n, value, static_cast<Policy>(policy), scratch_at, rows_at,
                           counts_at, positions_at, reinterpret_cast<void*>(fresh),
                           reinterpret_cast<void*>(old), reinterpret_cast<cuda::Stream>(stream));
    });
}

py::tuple status() {
    const cuda::Status found = cuda::status();
    return py::make_tuple(found.code, cuda::name_of(found.code), cuda::sentence_of(found.code),
                          found.driver, found.runtime, found.devices);
}

}  // namespace

void define_cuda(py::module_& native) {
    py::module_ m = native.def_submodule(
        "cuda", "The verbs on a GPU: addresses in, work enqueued. Contents are not checked here.");
    m.def("gather", &gather, py::arg("table"), py::arg("item_size"), py::arg("values"),
          py::arg("stream"));
    m.def("scatter", &scatter, py::arg("moves"), py::arg("item_size"), py::arg("stream"));
    m.def("compare", &compare, py::arg("table"), py::arg("item_size"), py::arg("values"),
          py::arg("report"), py::arg("stream"));
    m.def("load_moves", [] { enqueue(cuda::load_moves); });
    m.def("scratch_size", &cuda::scratch_size, py::arg("n"));
    m.def("mark_differing", &mark_differing, py::arg("a"), py::arg("b"), py::arg("n"),
          py::arg("item_size"), py::arg("scratch"), py::arg("stream"));
    m.def("write_positions", &write_positions, py::arg("scratch"), py::arg("n"),
          py::arg("positions"), py::arg("stream"));
    m.def("count_scores", &count_scores, py::arg("type"), py::arg("a"), py::arg("b"), py::arg("n"),
          py::arg("shift"), py::arg("prefix"), py::arg("bins"), py::arg("lowest_nan"),
          py::arg("stream"));
    m.def("mark_reaching", &mark_reaching, py::arg("type"), py::arg("a"), py::arg("b"),
          py::arg("n"), py::arg("lowest"), py::arg("ties"), py::arg("scratch"),
          py::arg("more_scratch"), py::arg("stream"));
    m.def("write_scores", &write_scores, py::arg("type"), py::arg("a"), py::arg("b"), py::arg("n"),
          py::arg("scratch"), py::arg("positions"), py::arg("keys"), py::arg("stream"));
    m.def("merge", &merge, py::arg("spans"), py::arg("inputs"), py::arg("rows"), py::arg("k"),
          py::arg("n"), py::arg("type"), py::arg("policy"), py::arg("scratch"),
          py::arg("row_counts"), py::arg("counts"), py::arg("positions"), py::arg("new"),
          py::arg("old"), py::arg("stream"));
    m.def("status", &status);
    native.attr("CUDA") = cuda::toolkit();
    m.attr("ARCHITECTURES") = cuda::architectures();
}

}  // namespace hotgraft::bindings
