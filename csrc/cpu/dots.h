// Dot products of a few rows with many, for csrc/cpu/*.cpp; internal linkage as in vec.h.
#pragma once

#include <stdint.h>

#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int kRowBlock = 4;  // rows of x that share one read of a weight row

// out[r][c] = x row r . w row c, for ROWS rows and COLS columns.
template <int ROWS, int COLS, class T, class W>
inline __attribute__((always_inline)) void dots(acc_t<T>* out, int64_t out_stride, const T* x,
                                                const W* w, int64_t count) {
    typedef acc_t<T> A;
    constexpr int kStep = kLanes<T>;
    vec_t<A> sum[ROWS][COLS] = {};
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
        vec_t<A> column[COLS];
        for (int c = 0; c < COLS; ++c) column[c] = load(w + c * count + i);
        for (int r = 0; r < ROWS; ++r) {
            const vec_t<A> value = load(x + r * count + i);
            for (int c = 0; c < COLS; ++c) sum[r][c] += value * column[c];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int c = 0; c < COLS; ++c) {
            A total = sum_of<A>(sum[r][c]);
            for (int64_t k = i; k < count; ++k) {
                total += static_cast<A>(to_acc(x[r * count + k])) * to_acc(w[c * count + k]);
            }
            out[r * out_stride + c] = total;
        }
    }
}

template <int ROWS, class T, class W>
void dot_rows(acc_t<T>* out, int64_t out_stride, const T* x, const W* w, int64_t columns,
              int64_t count) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) {
        dots<ROWS, 4>(out + c, out_stride, x, w + c * count, count);
    }
    for (; c < columns; ++c) dots<ROWS, 1>(out + c, out_stride, x, w + c * count, count);
}

// out [rows, columns] = x [rows, count] . w [columns, count]^T; one read of w per kRowBlock rows.
template <class T, class W>
void multiply_transposed(acc_t<T>* out, int64_t out_stride, const T* x, int64_t rows, const W* w,
                         int64_t columns, int64_t count) {
    int64_t r = 0;
    for (; r + kRowBlock <= rows; r += kRowBlock) {
        dot_rows<kRowBlock>(out + r * out_stride, out_stride, x + r * count, w, columns, count);
    }
    for (; r + 2 <= rows; r += 2) {
        dot_rows<2>(out + r * out_stride, out_stride, x + r * count, w, columns, count);
    }
    if (r < rows) {
        dot_rows<1>(out + r * out_stride, out_stride, x + r * count, w, columns, count);
    }
}

}  // namespace
}  // namespace sapt_fast
