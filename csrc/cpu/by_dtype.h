// From a dtype known at run time to the code compiled for its type; internal linkage as in vec.h.
#pragma once

#include <type_traits>

#include "cpu/vec.h"
#include "dtype.h"

namespace sapt_fast {
namespace {

// call(Type<T>()) for the T of a dtype.
template <class Call>
void by_dtype(DType dtype, const Call& call) {
    switch (dtype) {
        case DType::float32:
            return call(Type<float>());
        case DType::bfloat16:
            return call(Type<BFloat16>());
        case DType::float16:
            return call(Type<Float16>());
        case DType::float64:
            return call(Type<double>());
    }
}

// call(Type<T>(), Type<L>()), where `other` is `dtype` or, of 16 bits, float32.
template <class Call>
void by_dtypes(DType dtype, DType other, const Call& call) {
    by_dtype(dtype, [&](auto type) {
        constexpr bool kNarrow = sizeof(typename decltype(type)::type) == 2;
        if constexpr (kNarrow) {
            if (other != dtype) return call(type, Type<float>());
        }
        call(type, type);
    });
}

}  // namespace
}  // namespace sapt_fast
