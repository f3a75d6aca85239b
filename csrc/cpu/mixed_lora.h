// The parts of the mixed LoRA layer for which a GEMM library would need an extra pass. One set of
// these functions exists per capability; bindings.cpp picks one at run time.
#pragma once

#include <stdint.h>

#include "cpu/tables.h"
#include "dtype.h"

namespace sapt_fast {

// The weight of rank j in row m: mixture[m / (rows / samples), row_adapter[j]] * row_scale[j].
// mixture and row_scale are float, or double where the ranks are double. Where mixture is 0, the
// weight is 0 whatever the scale, and so is every product with it.
struct RankWeights {
    const void* mixture;         // [samples, adapters]
    const int32_t* row_adapter;  // [ranks]
    const void* row_scale;       // [ranks]
    int64_t rows;                // a multiple of samples
    int64_t samples;
    int64_t adapters;
    int64_t ranks;
};

struct RankBackward {
    void* g;                // [rows, ranks]; on return multiplied by the weights
    const void* h;          // [rows, ranks]
    void* d_mixture;        // [samples, adapters] or null
    void* packed_g;         // [rows, sum of the ranges' lengths] or null: weighted g of their ranks
    void* packed_h;         // the same of h
    const int64_t* ranges;  // [2 * range_count]: start, stop
    int64_t range_count;
    void* partial;  // [samples * chunks_per_sample, ranks] of float or double; null: one chunk each
};

struct Decode {
    void* y;             // [rows, outputs]
    void* h;             // [rows, ranks] or null
    const void* x;       // [rows, inputs]
    const void* weight;  // [outputs, inputs] or null
    const void* bias;    // [outputs] or null
    const void* lora_a;  // [ranks, inputs]
    const void* lora_b;  // [ranks, outputs]
    void* hw;            // scratch, [rows, ranks] of float or double
    void* packed;        // scratch, [inputs, kLaneRows] of float; null: x is read as it lies
    int64_t inputs;
    int64_t outputs;
    bool accumulate;  // add to what y holds; else y is overwritten
    bool skips;       // a weight is 0: ranks that have none are left out
    DType dtype;
    DType lora_dtype;  // dtype or float32
};

// Decode packs the rows of float if there are more than dots of a few rows take, and no more than
// these.
constexpr int64_t kLaneRows = 16;

inline bool packs_rows(DType dtype, int64_t rows) {
    return dtype == DType::float32 && rows > kLaneRows / 2 && rows <= kLaneRows;
}

// The gradient of the trained rows of one factor.
struct FactorGrad {
    void* out;          // [ranks, columns]
    const void* g;      // [rows, ranks], weighted
    const void* x;      // [rows, columns]
    int64_t rows;
    int64_t ranks;  // at most kFewRanks
    int64_t columns;
    DType dtype;         // of g and x
    DType factor_dtype;  // of out: dtype or float32
};

// With more ranks than these a GEMM library is the better choice.
constexpr int64_t kFewRanks = 16;

struct MixedLoraKernels {
    // out = h * weights, both [rows, ranks]
    void (*weight_ranks)(DType dtype, void* out, const void* h, const RankWeights& weights,
                         int threads);
    void (*weight_ranks_backward)(DType dtype, const RankBackward& args,
                                  const RankWeights& weights, int threads);
    // y (+)= x weight^T + bias + (weights * (x lora_a^T)) lora_b, one parallel region
    void (*decode)(const Decode& args, const RankWeights& weights, int threads);
    // out = g^T x, in one pass over x
    void (*factor_grad)(const FactorGrad& args, int threads);
};

// Rows whose contribution to d_mixture is summed in one go. Fixed, so that the result does not
// depend on the number of threads.
constexpr int64_t kChunkRows = 128;

inline int64_t chunks_per_sample(const RankWeights& weights) {
    const int64_t rows = weights.samples > 0 ? weights.rows / weights.samples : 0;
    return (rows + kChunkRows - 1) / kChunkRows;
}

SAPT_FAST_DECLARE_TABLE(MixedLoraKernels, mixed_lora_kernels)

}  // namespace sapt_fast
