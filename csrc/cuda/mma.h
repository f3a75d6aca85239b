// The tensor cores' product of 16-bit matrices, sums in float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace sapt_fast {

// sum [16, 8] += a [16, 16] . b [16, 8], spread over a warp. With g = lane / 4 and c = lane % 4:
// a[0], a[1] hold columns 2c, 2c + 1 of rows g and g + 8; a[2], a[3] columns 2c + 8, 2c + 9 of them;
// b[0], b[1] hold rows 2c, 2c + 1 and 2c + 8, 2c + 9 of column g;
// sum[0], sum[1] are columns 2c, 2c + 1 of row g, sum[2], sum[3] those of row g + 8.
template <class T>
__device__ inline void multiply_add(float (&sum)[4], const unsigned (&a)[4],
                                    const unsigned (&b)[2]);

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&sum)[4], const unsigned (&a)[4],
                                                   const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void multiply_add<__half>(float (&sum)[4], const unsigned (&a)[4],
                                            const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace sapt_fast
