// From a dtype known at run time to the code compiled for its type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

#include "dtype.h"

namespace sapt_fast {

// call(Type<T>()) for the T of a dtype.
template <class Call>
void by_dtype(DType dtype, const Call& call) {
    switch (dtype) {
        case DType::float32:
            return call(Type<float>());
        case DType::bfloat16:
            return call(Type<__nv_bfloat16>());
        case DType::float16:
            return call(Type<__half>());
        case DType::float64:
            break;
    }
    throw std::invalid_argument("dtype: float64 has no CUDA kernel");
}

// call(Type<T>(), Type<L>()), where `factor_dtype` is `dtype` or float32.
template <class Call>
void by_dtypes(DType dtype, DType factor_dtype, const Call& call) {
    by_dtype(dtype, [&](auto type) {
        if (factor_dtype == dtype) return call(type, type);
        call(type, Type<float>());
    });
}

}  // namespace sapt_fast
