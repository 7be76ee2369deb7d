// Watches the objects that make up a live model: are they still there, unmoved, unwritten?
//
// A commit asks before every write, when the caches are full of weights and not of objects. So what
// is looked at can be prefetched, and an object is asked by one C call. Tuples are passed in at
// each call: were they kept here, Python's garbage collector could not see the cycles they close.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>

namespace hotgraft::bindings {

namespace py = pybind11;
using Int64s = py::array_t<std::int64_t, py::array::c_style>;

// The first i where owners[i] maps keys[i] to something else than the very object objects[i], or
// to nothing; -1 if none.
py::ssize_t first_replaced(const py::tuple& owners, const py::tuple& keys,
                           const py::tuple& objects);

// The first i where tensors[i].data_ptr() is not addresses[i]; -1 if none.
py::ssize_t first_moved(const py::tuple& tensors, const Int64s& addresses);

// The first i where tensors[i]._version is not expected[cells[i]]; -1 if none.
py::ssize_t first_written(const py::tuple& tensors, const Int64s& expected, const Int64s& cells);

// One more write is expected of each cell: ++expected[cells[i]].
void count_writes(Int64s expected, const Int64s& cells);

// tensors[i]._version, for all.
Int64s versions(const py::tuple& tensors);

// Begins to bring near what the above look at, and returns at once. `bodies`: addresses of the C++
// objects behind the tensors, to be prefetched and nothing else.
void prefetch_objects(const py::tuple& owners, const py::tuple& tensors, const Int64s& bodies);

}  // namespace hotgraft::bindings
