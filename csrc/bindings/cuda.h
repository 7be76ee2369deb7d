// The submodule `_native.cuda`: csrc/cuda, there in every build.
#pragma once

#include <pybind11/pybind11.h>

namespace hotgraft::bindings {

void define_cuda(pybind11::module_& native);

}  // namespace hotgraft::bindings
