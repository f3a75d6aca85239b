// A score and an index in one word that orders by the score, then by the index.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace sapt_fast {

constexpr uint64_t kNothing = ~uint64_t{0};

__device__ inline bool is_finite(float value) {
    return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

// Ascending with the score, which must be finite to count; the index is below 2^32.
__device__ inline uint64_t ascending(float score, int64_t index) {
    if (!is_finite(score)) return kNothing;
    const unsigned bits = __float_as_uint(score + 0.0f);  // one zero
    const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(ordered) << 32 | static_cast<uint64_t>(index);
}

__device__ inline int64_t index_of(uint64_t ordered) {
    return static_cast<int64_t>(ordered & 0xffffffffu);
}

}  // namespace sapt_fast
