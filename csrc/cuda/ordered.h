// A score and an index in one word that orders by the score, then by the index.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace sapt_fast {

constexpr uint64_t kNothing = ~uint64_t{0};

__device__ inline bool is_finite(float value) {
    return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u;
}

// The bits of a float, not NaN, that order as the float does.
__device__ inline unsigned ordered_bits(float value) {
    const unsigned bits = __float_as_uint(value + 0.0f);  // one zero
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Orders by the lower score, which must be finite to count; the index is below 2^32.
__device__ inline uint64_t ascending(float score, int64_t index) {
    if (!is_finite(score)) return kNothing;
    return static_cast<uint64_t>(ordered_bits(score)) << 32 | static_cast<uint64_t>(index);
}

constexpr unsigned kNotANumber = 0xfffffffeu;  // after every score; kNothing is after it

// Orders by the higher score, with NaN last.
__device__ inline uint64_t descending(float score, int64_t index) {
    const unsigned bits = score == score ? ~ordered_bits(score) : kNotANumber;
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(index);
}

// The score that `descending` was given.
__device__ inline float score_of(uint64_t ordered) {
    const auto bits = static_cast<unsigned>(ordered >> 32);
    if (bits == kNotANumber) return __uint_as_float(0x7fc00000u);
    return __uint_as_float(bits & 0x80000000u ? bits : ~bits & 0x7fffffffu);
}

__device__ inline int64_t index_of(uint64_t ordered) {
    return static_cast<int64_t>(ordered & 0xffffffffu);
}

}  // namespace sapt_fast
