// Dot products of about as many rows as a vector has lanes: each row lies in a lane and the weights
// are broadcast, so that no sum runs over lanes and all rows share one read of a weight. Internal
// linkage as in vec.h.
#pragma once

#include <stdint.h>

#include "cpu/counts.h"
#include "cpu/mixed_lora.h"
#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int64_t kLaneCount = 256;  // products that one sum takes: longer ones lose digits

// packed [count, kLaneRows] = x [rows, count]^T, zero in the lanes without a row.
inline void pack_lanes(float* packed, const float* x, int64_t rows, int64_t count, int64_t start,
                       int64_t stop) {
    for (int64_t k = start; k < stop; ++k) {
        for (int64_t r = 0; r < kLaneRows; ++r) {
            packed[k * kLaneRows + r] = r < rows ? x[r * count + k] : 0;
        }
    }
}

// sum [COLS, kLaneRows] += w [COLS, start to stop] . packed [start to stop, kLaneRows]
template <int COLS>
inline __attribute__((always_inline)) void lane_dots(float* sum, const float* packed,
                                                     const float* w, int64_t count, int64_t start,
                                                     int64_t stop) {
    constexpr int kVecs = kLaneRows / kLanes<float>;
    vec_t<float> part[COLS][kVecs] = {};
    for (int64_t k = start; k < stop; ++k) {
        vec_t<float> rows[kVecs];
        for (int v = 0; v < kVecs; ++v) rows[v] = load(packed + k * kLaneRows + v * kLanes<float>);
        for (int c = 0; c < COLS; ++c) {
            const vec_t<float> by = broadcast(w[c * count + k]);
            for (int v = 0; v < kVecs; ++v) part[c][v] += by * rows[v];
        }
    }
    for (int c = 0; c < COLS; ++c) {
        for (int v = 0; v < kVecs; ++v) {
            float* to = sum + c * kLaneRows + v * kLanes<float>;
            store(to, load(to) + part[c][v]);
        }
    }
}

template <int COLS>
void multiply_lane_columns(float* out, int64_t out_stride, const float* packed, int64_t rows,
                           const float* w, int64_t count) {
    float sum[COLS * kLaneRows] = {};
    for (int64_t start = 0; start < count; start += kLaneCount) {
        lane_dots<COLS>(sum, packed, w, count, start, smaller(start + kLaneCount, count));
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int c = 0; c < COLS; ++c) out[r * out_stride + c] = sum[c * kLaneRows + r];
    }
}

// out [rows, columns] = x [rows, count] . w [columns, count]^T, of x as pack_lanes leaves it.
inline void multiply_lanes(float* out, int64_t out_stride, const float* packed, int64_t rows,
                           const float* w, int64_t columns, int64_t count) {
    constexpr int kColumns = 8 * kLanes<float> / kLaneRows;  // as many sums as registers bear
    int64_t c = 0;
    for (; c + kColumns <= columns; c += kColumns) {
        multiply_lane_columns<kColumns>(out + c, out_stride, packed, rows, w + c * count, count);
    }
    for (; c < columns; ++c) {
        multiply_lane_columns<1>(out + c, out_stride, packed, rows, w + c * count, count);
    }
}

}  // namespace
}  // namespace sapt_fast
