#include "bindings/sentry.h"

#include "bindings/dlpack.h"

namespace hotgraft::bindings {
namespace {

py::ssize_t size(const py::tuple& tuple) { return PyTuple_GET_SIZE(tuple.ptr()); }
PyObject* item(const py::tuple& tuple, py::ssize_t i) { return PyTuple_GET_ITEM(tuple.ptr(), i); }

void require(bool held, const char* sentence) {
    if (!held) throw py::value_error(sentence);
}

// Steals the reference; a null one stands for the Python error that was set.
py::object taken(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

// An attribute of the class torch.Tensor, held for ever.
py::handle of_tensor(const char* name) {
    return py::module_::import("torch").attr("Tensor").attr(name).cast<py::object>().release();
}

// torch's DLPack interface, or null where this torch has none.
const dlpack::Exchange* exchange() {
    const py::object found =
        py::getattr(py::module_::import("torch").attr("Tensor"), dlpack::attribute, py::none());
    if (!PyCapsule_IsValid(found.ptr(), dlpack::capsule)) return nullptr;
    const auto* header =
        static_cast<const dlpack::Header*>(PyCapsule_GetPointer(found.ptr(), dlpack::capsule));
    while (header != nullptr && header->version.major > 1) header = header->previous;
    const auto* api = reinterpret_cast<const dlpack::Exchange*>(header);
    return api != nullptr && api->tensor_from_py_object_no_sync != nullptr ? api : nullptr;
}

std::int64_t address(PyObject* tensor) {
    static const dlpack::Exchange* const api = exchange();
    if (api != nullptr) {
        dlpack::Tensor lent;
        if (api->tensor_from_py_object_no_sync(tensor, &lent) == 0) {
            return reinterpret_cast<std::int64_t>(lent.data) +
                   static_cast<std::int64_t>(lent.byte_offset);
        }
        PyErr_Clear();  // a type that DLPack does not know
    }
    static const py::handle data_ptr = of_tensor("data_ptr");
    const py::object found = taken(PyObject_CallOneArg(data_ptr.ptr(), tensor));
    const auto value = static_cast<std::int64_t>(PyLong_AsUnsignedLongLong(found.ptr()));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

std::int64_t version(PyObject* tensor) {
    static const py::handle property = of_tensor("_version");
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    const py::object found =
        taken(Py_TYPE(property.ptr())->tp_descr_get(property.ptr(), tensor, type));
    const long long value = PyLong_AsLongLong(found.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

std::int64_t cell(const Int64s& cells, py::ssize_t i, const Int64s& expected) {
    const std::int64_t cell = cells.data()[i];
    require(cell >= 0 && cell < expected.size(), "a cell lies outside of expected");
    return cell;
}

void prefetch_lines(const void* begin, std::ptrdiff_t lines) {
    constexpr std::ptrdiff_t line = 64;
    for (std::ptrdiff_t i = 0; i < lines; ++i) {
        __builtin_prefetch(static_cast<const char*>(begin) + i * line, 0, 3);
    }
}

}  // namespace

py::ssize_t first_replaced(const py::tuple& owners, const py::tuple& keys,
                           const py::tuple& objects) {
    require(size(keys) == size(owners) && size(objects) == size(owners),
            "keys and objects must be as many as owners");
    for (py::ssize_t i = 0; i < size(owners); ++i) {
        require(PyDict_Check(item(owners, i)), "owners must be dicts");
        PyObject* found = PyDict_GetItemWithError(item(owners, i), item(keys, i));
        if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
        if (found != item(objects, i)) return i;
    }
    return -1;
}

py::ssize_t first_moved(const py::tuple& tensors, const Int64s& addresses) {
    require(addresses.size() == size(tensors), "addresses must be as many as tensors");
    for (py::ssize_t i = 0; i < size(tensors); ++i) {
        if (address(item(tensors, i)) != addresses.data()[i]) return i;
    }
    return -1;
}

py::ssize_t first_written(const py::tuple& tensors, const Int64s& expected, const Int64s& cells) {
    require(cells.size() == size(tensors), "cells must be as many as tensors");
    for (py::ssize_t i = 0; i < size(tensors); ++i) {
        if (version(item(tensors, i)) != expected.data()[cell(cells, i, expected)]) return i;
    }
    return -1;
}

void count_writes(Int64s expected, const Int64s& cells) {
    for (py::ssize_t i = 0; i < cells.size(); ++i)
        ++expected.mutable_data()[cell(cells, i, expected)];
}

Int64s versions(const py::tuple& tensors) {
    Int64s found(size(tensors));
    for (py::ssize_t i = 0; i < size(tensors); ++i)
        found.mutable_data()[i] = version(item(tensors, i));
    return found;
}

void prefetch_objects(const py::tuple& owners, const py::tuple& tensors, const Int64s& bodies) {
    for (py::ssize_t i = 0; i < size(owners); ++i) prefetch_lines(item(owners, i), 1);
    for (py::ssize_t i = 0; i < size(tensors); ++i) prefetch_lines(item(tensors, i), 1);
    for (py::ssize_t i = 0; i < bodies.size(); ++i) {
        prefetch_lines(reinterpret_cast<const void*>(bodies.data()[i]), 3);
    }
    // By now the first of the dicts have come, and tell where their keys are.
    for (py::ssize_t i = 0; i < size(owners); ++i) {
        require(PyDict_Check(item(owners, i)), "owners must be dicts");
        prefetch_lines(reinterpret_cast<PyDictObject*>(item(owners, i))->ma_keys, 3);
    }
}

}  // namespace hotgraft::bindings
