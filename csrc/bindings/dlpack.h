// What is used of DLPack's C exchange interface (DLPack 1.2 and later, github.com/dmlc/dlpack): a
// tensor's address without a Python call, from any framework that offers it, under a stable ABI.
#pragma once

#include <cstdint>

namespace hotgraft::dlpack {

struct Device {
    std::int32_t type;  // 1: CPU, 2: CUDA, ...
    std::int32_t id;
};

struct DataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

struct Version {
    std::uint32_t major, minor;
};

struct Header {
    Version version;
    const Header* previous;  // the same of an older version, or null
};

// Version 1. Functions return 0, or -1 with a Python error set.
struct Exchange {
    Header header;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object_no_sync;
    void* managed_tensor_to_py_object_no_sync;
    int (*tensor_from_py_object_no_sync)(void* object, Tensor* tensor);  // lends; may be null
    int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);
};

constexpr const char* attribute = "__dlpack_c_exchange_api__";  // of a tensor's type
constexpr const char* capsule = "dlpack_exchange_api";

}  // namespace hotgraft::dlpack
