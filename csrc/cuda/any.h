// Tensors whose dtype is known at run time: where the bytes are few and one kernel should do.
#pragma once

#include "cuda/vec.h"
#include "dtype.h"

namespace sapt_fast {

struct AnyTensor {
    const void* data;
    DType dtype;   // not float64
    bool aligned;  // rows may be loaded 16 bytes at a time
};

__device__ inline bool is_wide(const AnyTensor& tensor) { return tensor.dtype == DType::float32; }

// kVector elements of any dtype as they lie in memory.
typedef Packed<float> AnyPacked;

// The elements from `offset` on, zeros from `count` on.
template <Cache CACHE = Cache::l1>
__device__ inline AnyPacked load(const AnyTensor& tensor, int64_t offset, int64_t count) {
    if (is_wide(tensor)) {
        return load<CACHE>(static_cast<const float*>(tensor.data) + offset, count, tensor.aligned);
    }
    // Bits are bits: half stands for both 16-bit types.
    const Packed<__half> half =
        load<CACHE>(static_cast<const __half*>(tensor.data) + offset, count, tensor.aligned);
    AnyPacked packed = zeros<float>();
    packed.part[0] = half.part[0];
    return packed;
}

__device__ inline void unpack(float (&values)[kVector], const AnyPacked& packed, DType dtype) {
    if (dtype == DType::float32) return unpack(values, packed);
    if (dtype == DType::bfloat16) {
        Packed<__nv_bfloat16> narrow;
        narrow.part[0] = packed.part[0];
        return unpack(values, narrow);
    }
    Packed<__half> narrow;
    narrow.part[0] = packed.part[0];
    unpack(values, narrow);
}

// The same in one step.
__device__ inline void load_values(float (&values)[kVector], const AnyTensor& tensor,
                                   int64_t offset, int64_t count) {
    unpack(values, load(tensor, offset, count), tensor.dtype);
}

}  // namespace sapt_fast
