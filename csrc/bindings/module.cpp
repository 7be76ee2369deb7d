// The only place that knows Python, with its neighbours: arguments are checked here, the GIL is
// released, and the verbs of csrc/cpu are called with plain pointers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "bindings/cuda.h"
#include "bindings/sentry.h"
#include "core/table.h"
#include "cpu/merge.h"
#include "cpu/move.h"
#include "cpu/parallel.h"
#include "cpu/select.h"

namespace py = pybind11;
namespace hg = hotgraft;
namespace cpu = hotgraft::cpu;
namespace bindings = hotgraft::bindings;

namespace {

using bindings::Int64s;
using Int32s = py::array_t<std::int32_t, py::array::c_style>;

void require(bool held, const std::string& sentence) {
    if (!held) throw py::value_error(sentence);
}

bool is_item_size(py::ssize_t size) { return size == 1 || size == 2 || size == 4 || size == 8; }

const void* address(std::uintptr_t value) { return reinterpret_cast<const void*>(value); }

int workers_or_all(int workers) { return workers > 0 ? workers : cpu::max_workers(); }

hg::ValueType value_type(int code) {
    require(code >= 0 && code <= static_cast<int>(hg::ValueType::u64), "unknown value type code");
    return static_cast<hg::ValueType>(code);
}

hg::ValueType float_type(int code) {
    const hg::ValueType type = value_type(code);
    require(type <= hg::ValueType::f64, "only bf16, f16, f32 and f64 can be rounded");
    return type;
}

cpu::Isa instruction_set(int code) {
    require(code >= 0 && code <= 3, "unknown instruction set code");
    const auto isa = static_cast<cpu::Isa>(code);
    require(cpu::isa_runs_here(isa), "this processor lacks the instruction set asked for");
    return isa;
}

// Whether `values` is n items in a row. The stride of an array of no or one item says nothing.
bool is_flat(const py::array& values, py::ssize_t n, py::ssize_t item_size) {
    return values.ndim() == 1 && values.shape(0) == n && values.itemsize() == item_size &&
           (n <= 1 || values.strides(0) == item_size);
}

// An uninitialised numpy array of n unsigned integers of the item's size.
py::array empty_bits(py::ssize_t item_size, std::int64_t n) {
    return py::array(py::dtype("u" + std::to_string(item_size)),
                     std::vector<py::ssize_t>{static_cast<py::ssize_t>(n)});
}

// Owns what a table points to. Made once when a plan is made, used at every commit.
class Table {
  public:
    Table(Int64s segments, Int32s positions, int item_size)
        : segments_(std::move(segments)), positions_(std::move(positions)), item_size_(item_size) {
        require(is_item_size(item_size), "item_size must be 1, 2, 4 or 8");
        require(segments_.ndim() == 2 && segments_.shape(1) == 3 && segments_.shape(0) > 0,
                "segments must be int64[n > 0][3]: base address, first entry, count");
        require(positions_.ndim() == 1, "positions must be int32[n_entries]");
        view_ = {reinterpret_cast<const hg::Segment*>(segments_.data()), segments_.shape(0),
                 positions_.data(), positions_.shape(0)};
        std::int64_t next = 0;
        for (std::int64_t i = 0; i < view_.n_segments; ++i) {
            const hg::Segment& s = view_.segments[i];
            require(s.first == next && s.count > 0 && s.count <= view_.n_entries - next,
                    "segments must follow each other without a gap, none empty");
            next += s.count;
        }
        require(next == view_.n_entries, "segments must cover the positions exactly");
    }

    ~Table() { cpu::drop_hints(); }
    Table(const Table&) = delete;
    Table& operator=(const Table&) = delete;

    const hg::Table& view() const { return view_; }
    int item_size() const { return item_size_; }
    std::int64_t nbytes() const { return segments_.nbytes() + positions_.nbytes(); }

    const void* check(const py::array& values) const {
        require(is_flat(values, view_.n_entries, item_size_),
                "values must be a contiguous array of " + std::to_string(view_.n_entries) +
                    " items of " + std::to_string(item_size_) + " bytes");
        return values.data();
    }

  private:
    Int64s segments_;
    Int32s positions_;
    int item_size_;
    hg::Table view_{};
};

void gather(const Table& table, py::array values, int workers) {
    require(values.writeable(), "values must be writable");
    void* out = const_cast<void*>(table.check(values));
    py::gil_scoped_release released;
    cpu::gather(table.view(), table.item_size(), out, workers_or_all(workers));
}

void scatter(const Table& table, const py::array& values, int workers) {
    const void* in = table.check(values);
    py::gil_scoped_release released;
    cpu::scatter(table.view(), table.item_size(), in, workers_or_all(workers));
}

py::tuple compare(const Table& table, const py::array& values, int workers) {
    const void* in = table.check(values);
    cpu::Mismatch mismatch{};
    {
        py::gil_scoped_release released;
        mismatch = cpu::compare(table.view(), table.item_size(), in, workers_or_all(workers));
    }
    return py::make_tuple(mismatch.count, mismatch.first);
}

void prefetch(const Table& table, const py::array& values, int workers) {
    cpu::prefetch(table.view(), table.item_size(), table.check(values), workers_or_all(workers));
}

std::unique_ptr<cpu::Difference> difference(std::uintptr_t a, std::uintptr_t b, std::int64_t n,
                                            int item_size, int workers, int isa) {
    require(is_item_size(item_size), "item_size must be 1, 2, 4 or 8");
    require(n >= 0 && n <= (std::int64_t{1} << 31), "n must be in [0, 2^31]: split larger tensors");
    const auto instructions = instruction_set(isa);
    py::gil_scoped_release released;
    return std::make_unique<cpu::Difference>(address(a), address(b), n, item_size,
                                             workers_or_all(workers), instructions);
}

void write_difference(const cpu::Difference& found, Int32s positions, py::array fresh,
                      py::array old, int workers) {
    require(positions.ndim() == 1 && positions.shape(0) == found.count(),
            "positions must be int32[count]");
    for (const py::array& values : {fresh, old}) {
        require(is_flat(values, found.count(), found.item_size()) && values.writeable(),
                "new and old must be writable, contiguous arrays as long as the positions");
    }
    std::int32_t* to = positions.mutable_data();
    void* new_to = fresh.mutable_data();
    void* old_to = old.mutable_data();
    py::gil_scoped_release released;
    found.write(to, new_to, old_to, workers_or_all(workers));
}

constexpr std::int64_t counts_width = sizeof(cpu::ScoreCounts) / sizeof(std::int64_t);

std::int64_t count_scores(int type, std::uintptr_t a, std::uintptr_t b, std::int64_t n, int shift,
                          std::uint64_t prefix, std::int64_t k, Int64s counts, int isa) {
    require(counts.ndim() == 2 && counts.shape(0) > 0 && counts.shape(1) == counts_width,
            "counts must be int64[workers][" + std::to_string(counts_width) + "]");
    require(k > 0 && n >= 0 && n <= (std::int64_t{1} << 31), "k must be positive, n in [0, 2^31]");
    require(shift >= 0 && shift <= 48 && shift % cpu::bin_bits == 0,
            "shift must be 48, 32, 16 or 0");
    const auto value = value_type(type);
    const auto instructions = instruction_set(isa);
    auto* state = reinterpret_cast<cpu::ScoreCounts*>(counts.mutable_data());
    const int workers = static_cast<int>(counts.shape(0));
    py::gil_scoped_release released;
    return cpu::count_scores(value, address(a), address(b), n, shift, prefix, k, state, workers,
                             instructions);
}

py::tuple collect(int type, std::uintptr_t a, std::uintptr_t b, std::int64_t n,
                  std::uint64_t lowest, std::int64_t ties, int workers, int isa) {
    require(n >= 0 && n <= (std::int64_t{1} << 31), "n must be in [0, 2^31]: split larger tensors");
    require(ties >= 0, "ties must not be negative");
    const auto value = value_type(type);
    const auto instructions = instruction_set(isa);
    std::vector<cpu::Scored> found;
    std::int64_t total = 0;
    {
        py::gil_scoped_release released;
        found = cpu::collect(value, address(a), address(b), n, lowest, ties,
                             workers_or_all(workers), instructions);
        for (const auto& piece : found) total += static_cast<std::int64_t>(piece.keys.size());
    }
    Int32s positions(total);
    py::array_t<std::uint64_t> keys(total);
    std::int32_t* position = positions.mutable_data();
    std::uint64_t* key = keys.mutable_data();
    for (auto& piece : found) {
        position = std::copy(piece.positions.begin(), piece.positions.end(), position);
        key = std::copy(piece.keys.begin(), piece.keys.end(), key);
        piece = {};
    }
    return py::make_tuple(positions, keys);
}

py::object place(const cpu::Place& at) {
    if (at.row < 0) return py::none();
    return py::make_tuple(at.row, at.position);
}

py::tuple merge(const py::list& inputs, Int64s ranges, int type, int policy, Int64s order,
                int workers) {
    const auto value = value_type(type);
    const py::ssize_t item_size = hg::item_size_of(value);
    const auto k = static_cast<py::ssize_t>(inputs.size());
    require(policy >= 0 && policy <= static_cast<int>(cpu::Policy::sign), "unknown policy code");
    require(k > 0 && ranges.ndim() == 3 && ranges.shape(1) == k && ranges.shape(2) == 2,
            "ranges must be int64[rows][sources][2]");
    require(order.ndim() == 1 && order.shape(0) == k, "order must be int64[sources]");
    std::vector<cpu::Source> sources;
    std::vector<std::int64_t> sizes;
    std::vector<Int32s> kept;  // the cast may have made a contiguous copy
    for (const py::handle& item : inputs) {
        const auto [positions, fresh, old, weight] =
            item.cast<std::tuple<Int32s, py::array, py::array, double>>();
        require(positions.ndim() == 1, "positions must be int32[n]");
        for (const py::array& values : {fresh, old}) {
            require(is_flat(values, positions.shape(0), item_size),
                    "new and old must be contiguous arrays as long as their positions");
        }
        sources.push_back({positions.data(), fresh.data(), old.data(), weight});
        sizes.push_back(positions.shape(0));
        kept.push_back(positions);
    }
    const std::int64_t rows = ranges.shape(0);
    const auto* spans = reinterpret_cast<const cpu::Range*>(ranges.data());
    for (std::int64_t i = 0; i < rows * k; ++i) {
        require(spans[i].first >= 0 && spans[i].count >= 0 && spans[i].first <= sizes[i % k] &&
                    spans[i].count <= sizes[i % k] - spans[i].first,
                "a range reaches beyond its source");
    }

    Int64s counts(rows);
    std::vector<std::int64_t> offsets(rows + 1, 0);
    {
        std::int64_t* out = counts.mutable_data();
        py::gil_scoped_release released;
        cpu::count_union(sources, spans, rows, out, workers_or_all(workers));
        for (std::int64_t row = 0; row < rows; ++row) offsets[row + 1] = offsets[row] + out[row];
    }
    Int32s positions(offsets[rows]);
    py::array fresh = empty_bits(item_size, offsets[rows]);
    py::array old = empty_bits(item_size, offsets[rows]);
    cpu::MergeReport report;
    {
        std::int32_t* positions_out = positions.mutable_data();
        void* fresh_out = fresh.mutable_data();
        void* old_out = old.mutable_data();
        const std::int64_t* ranks = order.data();
        py::gil_scoped_release released;
        report = cpu::merge(sources, spans, rows, offsets.data(), value,
                            static_cast<cpu::Policy>(policy), ranks, positions_out, fresh_out,
                            old_out, workers_or_all(workers));
    }
    Int64s conflicts({k, k});
    std::copy(report.conflicts.begin(), report.conflicts.end(), conflicts.mutable_data());
    return py::make_tuple(counts, positions, fresh, old, conflicts, report.base_mismatches,
                          place(report.first_base_mismatch), report.overflows,
                          place(report.first_overflow));
}

py::tuple round_values(int from, const py::array& values, int to) {
    const auto source = float_type(from);
    const auto target = float_type(to);
    require(is_flat(values, values.size(), hg::item_size_of(source)),
            "values must be a contiguous array of the source type's bits");
    py::array out = empty_bits(hg::item_size_of(target), values.shape(0));
    std::int64_t overflows = 0;
    {
        const void* in = values.data();
        void* result = out.mutable_data();
        const std::int64_t n = values.shape(0);
        py::gil_scoped_release released;
        overflows = cpu::round(source, in, target, result, n);
    }
    return py::make_tuple(out, overflows);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The verbs in C++. hotgraft.kernels.native_cpu is their Python face.";
    py::class_<Table>(m, "Table")
        .def(py::init<Int64s, Int32s, int>(), py::arg("segments").noconvert(),
             py::arg("positions").noconvert(), py::arg("item_size"))
        .def_property_readonly("n_entries", [](const Table& t) { return t.view().n_entries; })
        .def_property_readonly("n_segments", [](const Table& t) { return t.view().n_segments; })
        .def_property_readonly("item_size", &Table::item_size)
        .def_property_readonly("nbytes", &Table::nbytes);
    m.def("gather", &gather, py::arg("table"), py::arg("values"), py::arg("workers") = 0);
    m.def("scatter", &scatter, py::arg("table"), py::arg("values"), py::arg("workers") = 0);
    m.def("compare", &compare, py::arg("table"), py::arg("values"), py::arg("workers") = 0);
    py::class_<cpu::Difference>(m, "Difference")
        .def(py::init(&difference), py::arg("a"), py::arg("b"), py::arg("n"), py::arg("item_size"),
             py::arg("workers") = 0, py::arg("isa") = 0)
        .def_property_readonly("count", &cpu::Difference::count)
        .def("write", &write_difference, py::arg("positions").noconvert(), py::arg("new"),
             py::arg("old"), py::arg("workers") = 0);
    m.def("count_scores", &count_scores, py::arg("type"), py::arg("a"), py::arg("b"), py::arg("n"),
          py::arg("shift"), py::arg("prefix"), py::arg("k"), py::arg("counts").noconvert(),
          py::arg("isa") = 0);
    m.def("collect", &collect, py::arg("type"), py::arg("a"), py::arg("b"), py::arg("n"),
          py::arg("lowest"), py::arg("ties"), py::arg("workers") = 0, py::arg("isa") = 0);
    m.def("merge", &merge, py::arg("sources"), py::arg("ranges").noconvert(), py::arg("type"),
          py::arg("policy"), py::arg("order").noconvert(), py::arg("workers") = 0);
    m.def("round", &round_values, py::arg("from_type"), py::arg("values"), py::arg("to_type"));
    m.def("prefetch", &prefetch, py::arg("table"), py::arg("values"), py::arg("workers") = 0);
    m.def("first_replaced", &bindings::first_replaced, py::arg("owners"), py::arg("keys"),
          py::arg("objects"));
    m.def("first_moved", &bindings::first_moved, py::arg("tensors"),
          py::arg("addresses").noconvert());
    m.def("first_written", &bindings::first_written, py::arg("tensors"),
          py::arg("expected").noconvert(), py::arg("cells").noconvert());
    m.def("count_writes", &bindings::count_writes, py::arg("expected").noconvert(),
          py::arg("cells").noconvert());
    m.def("versions", &bindings::versions, py::arg("tensors"));
    m.def("prefetch_objects", &bindings::prefetch_objects, py::arg("owners"), py::arg("tensors"),
          py::arg("bodies").noconvert());
    m.def("max_workers", &cpu::max_workers);
    m.def(
        "isa_runs_here",
        [](int isa) {
            return isa >= 0 && isa <= 3 && cpu::isa_runs_here(static_cast<cpu::Isa>(isa));
        },
        py::arg("isa"));
    m.attr("COUNTS_WIDTH") = counts_width;
    m.attr("COMPILER") = __VERSION__;
    bindings::define_cuda(m);
}
