// How the bindings take arguments: addresses and codes, checked for what would read out of bounds.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "dtype.h"

namespace sapt_fast {

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

inline void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

inline DType dtype_of(int code) {
    require(code >= 0 && code <= static_cast<int>(DType::float64), "dtype: not a known code");
    return static_cast<DType>(code);
}

}  // namespace sapt_fast
