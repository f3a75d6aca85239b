// Tensors as the bindings take them: where their elements are and how many there are, asked of the
// tensors themselves. No torch headers: their methods are called by name.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "arguments.h"

namespace sapt_fast {

// A tensor whose elements follow one another; one with gaps is known and refused. None is an address
// of 0 with no bytes; a tuple (address, bytes) is taken as it is.
struct Memory {
    Address address = 0;
    std::int64_t bytes = 0;
    bool gaps = false;

    explicit operator bool() const { return address != 0; }
};

constexpr int kMostDims = 3;

// A tensor with its own sizes and strides, in elements.
struct Strided {
    Address address = 0;
    std::int64_t element = 0;  // bytes
    int dims = 0;
    std::int64_t sizes[kMostDims] = {};
    std::int64_t strides[kMostDims] = {};

    // A tensor without elements may have any strides.
    bool empty() const {
        return std::any_of(sizes, sizes + dims, [](std::int64_t size) { return size == 0; });
    }
    bool has_rows() const { return empty() || strides[dims - 1] == 1 || sizes[dims - 1] == 1; }
};

template <class T = void>
T* at(const Memory& memory) {
    return at<T>(memory.address);
}

inline std::int64_t size_of(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Of sums and weights.
inline std::int64_t acc_size(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// Raises unless the tensor holds exactly the elements of `shape`, of `element` bytes each, and no
// gaps.
inline void require_holds(const char* name, const Memory& memory,
                          std::initializer_list<std::int64_t> shape, std::int64_t element) {
    std::int64_t bytes = element;
    bool fits = true;
    for (std::int64_t size : shape) {
        fits = fits && size >= 0 && !__builtin_mul_overflow(bytes, size, &bytes);
    }
    if (fits && memory.bytes == bytes && (bytes == 0 || memory.address != 0) && !memory.gaps) return;
    std::string what = std::string(name) + ": got ";
    if (memory.gaps) {
        throw std::invalid_argument(what + "a tensor with gaps, expected a contiguous one");
    }
    what += memory.address == 0 && memory.bytes == 0 ? "no memory"
                                                     : std::to_string(memory.bytes) + " bytes";
    what += ", expected " + std::to_string(element) + " for each of [";
    const char* comma = "";
    for (std::int64_t size : shape) {
        what += comma + std::to_string(size);
        comma = ", ";
    }
    throw std::invalid_argument(what + "] elements");
}

// Raises unless the tensor has so many dimensions, elements of that size, and in its last
// dimension no gaps.
inline void require_rows(const char* name, const Strided& tensor, int dims, std::int64_t element) {
    if (tensor.dims == dims && tensor.element == element && tensor.has_rows()) return;
    throw std::invalid_argument(
        std::string(name) + ": got " + std::to_string(tensor.dims) + " dimensions, elements of " +
        std::to_string(tensor.element) + " bytes and last stride " +
        std::to_string(tensor.dims > 0 ? tensor.strides[tensor.dims - 1] : 0) + ", expected " +
        std::to_string(dims) + ", " + std::to_string(element) + " and 1");
}

// The name of a method or attribute without arguments, made once and looked up again and again.
class Name {
   public:
    explicit Name(const char* name) : name_(PyUnicode_InternFromString(name)) {}
    pybind11::object attribute(pybind11::handle of) const {
        return checked(PyObject_GetAttr(of.ptr(), name_));
    }
    pybind11::object call(pybind11::handle of) const {
        return checked(PyObject_CallMethodNoArgs(of.ptr(), name_));
    }

   private:
    static pybind11::object checked(PyObject* result) {
        if (result == nullptr) throw pybind11::error_already_set();
        return pybind11::reinterpret_steal<pybind11::object>(result);
    }
    PyObject* name_;
};

inline std::int64_t integer(const pybind11::object& value) {
    const std::int64_t result = PyLong_AsLongLong(value.ptr());
    if (result == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    return result;
}

inline Address address_of(pybind11::handle tensor) {
    static const Name data_ptr("data_ptr");
    return static_cast<Address>(integer(data_ptr.call(tensor)));
}

}  // namespace sapt_fast

namespace pybind11::detail {

template <>
struct type_caster<sapt_fast::Memory> {
    PYBIND11_TYPE_CASTER(sapt_fast::Memory, const_name("Tensor | None"));

    bool load(handle source, bool) {
        static const sapt_fast::Name nbytes("nbytes");
        static const sapt_fast::Name is_contiguous("is_contiguous");
        if (source.is_none()) return true;
        if (PyLong_Check(source.ptr())) return false;
        if (PyTuple_Check(source.ptr())) {
            const auto pair = reinterpret_borrow<tuple>(source);
            value = {static_cast<sapt_fast::Address>(sapt_fast::integer(pair[0])),
                     sapt_fast::integer(pair[1]), false};
            return true;
        }
        value = {sapt_fast::address_of(source), sapt_fast::integer(nbytes.attribute(source)),
                 is_contiguous.call(source).ptr() != Py_True};
        return true;
    }
};

template <>
struct type_caster<sapt_fast::Strided> {
    PYBIND11_TYPE_CASTER(sapt_fast::Strided, const_name("Tensor"));

    bool load(handle source, bool) {
        static const sapt_fast::Name element_size("element_size");
        static const sapt_fast::Name shape("shape");
        static const sapt_fast::Name stride("stride");
        if (source.is_none() || PyLong_Check(source.ptr())) return false;
        const auto sizes = shape.attribute(source).cast<tuple>();
        const auto strides = stride.call(source).cast<tuple>();
        sapt_fast::require(sizes.size() <= sapt_fast::kMostDims, "got more than 3 dimensions");
        value.address = sapt_fast::address_of(source);
        value.element = sapt_fast::integer(element_size.call(source));
        value.dims = static_cast<int>(sizes.size());
        for (int i = 0; i < value.dims; ++i) {
            value.sizes[i] = sapt_fast::integer(sizes[i]);
            value.strides[i] = sapt_fast::integer(strides[i]);
        }
        return true;
    }
};

}  // namespace pybind11::detail
