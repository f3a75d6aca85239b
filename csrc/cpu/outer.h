// Outer products of many rows, summed, for csrc/cpu/mixed_lora.cpp; internal linkage as in vec.h.
#pragma once

#include <stdint.h>

#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int64_t kGradColumns = 512;  // of a block, whose sums stay in the first cache
#if defined(__AVX512F__)
constexpr int kOuterRows = 4;
#else
constexpr int kOuterRows = 2;  // more would not fit the registers
#endif

// sum [RANKS, kGradColumns] += g [ROWS, RANKS]^T x [ROWS, columns]
template <int ROWS, int RANKS, class T>
inline __attribute__((always_inline)) void add_outer(acc_t<T>* sum, const T* g, int64_t g_stride,
                                                     const T* x, int64_t x_stride,
                                                     int64_t columns) {
    typedef acc_t<T> A;
    vec_t<A> by[ROWS][RANKS];
    for (int r = 0; r < ROWS; ++r) {
        for (int j = 0; j < RANKS; ++j) by[r][j] = broadcast<A>(to_acc(g[r * g_stride + j]));
    }
    int64_t c = 0;
    for (; c + kLanes<T> <= columns; c += kLanes<T>) {
        vec_t<A> value[ROWS];
        for (int r = 0; r < ROWS; ++r) {
            value[r] = load(x + r * x_stride + c);
            __builtin_prefetch(x + (r + ROWS) * x_stride + c);  // of the rows after these
        }
        for (int j = 0; j < RANKS; ++j) {
            vec_t<A> total = load(sum + j * kGradColumns + c);
            for (int r = 0; r < ROWS; ++r) total += by[r][j] * value[r];
            store(sum + j * kGradColumns + c, total);
        }
    }
    for (; c < columns; ++c) {
        for (int j = 0; j < RANKS; ++j) {
            for (int r = 0; r < ROWS; ++r) {
                sum[j * kGradColumns + c] += by[r][j][0] * to_acc(x[r * x_stride + c]);
            }
        }
    }
}

template <int RANKS, class T>
void add_outers(acc_t<T>* sum, const T* g, int64_t g_stride, const T* x, int64_t x_stride,
                int64_t rows, int64_t columns) {
    int64_t r = 0;
    for (; r + kOuterRows <= rows; r += kOuterRows) {
        add_outer<kOuterRows, RANKS>(sum, g + r * g_stride, g_stride, x + r * x_stride, x_stride,
                                     columns);
    }
    for (; r < rows; ++r) {
        add_outer<1, RANKS>(sum, g + r * g_stride, g_stride, x + r * x_stride, x_stride, columns);
    }
}

}  // namespace
}  // namespace sapt_fast
