// Mixed LoRA for a few rows, as in decoding: all projections of one input in two launches.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cuda/stream.h"
#include "dtype.h"

namespace sapt_fast {

constexpr int kMaxProjections = 8;
constexpr int64_t kMaxBaseRows = 4;  // rows of x for which weights are multiplied here, too

struct DecodeProjection {
    void* y;                     // [rows, outputs] in dtype
    const void* weight;          // [outputs, inputs] in dtype; null: no product, whatever y holds
    const void* bias;            // [outputs] in dtype, of that product; may be null
    const void* lora_a;          // [ranks, inputs] in lora_dtype
    const void* lora_b;          // [ranks, outputs] in lora_dtype
    const int32_t* row_adapter;  // [ranks]
    const float* row_scale;      // [ranks]
    int64_t ranks;
    int64_t outputs;
    bool accumulate;  // without weight: add to what y holds; else y is overwritten
};

struct DecodeGroup {
    DecodeProjection projections[kMaxProjections];
    int count;
    const void* x;         // [rows, inputs] in dtype
    const float* mixture;  // [samples, adapters]
    float* workspace;      // mixed_lora_workspace floats
    int64_t rows;          // a multiple of samples
    int64_t samples;
    int64_t adapters;
    int64_t inputs;
    DType dtype;
    DType lora_dtype;  // dtype or float32
};

// Floats of scratch memory that the launches share.
int64_t mixed_lora_workspace(int64_t rows, int64_t inputs, int64_t total_ranks);

// y (+)= x weight^T + bias
//     + sum over ranks j of mixture[sample, row_adapter[j]] row_scale[j] (x . lora_a[j]) lora_b[j]
// for every projection; the first two terms are rounded to y's dtype before the sum is added. Ranks
// whose weight is zero in every row of a tile of rows are not read. Sums are in float and in a fixed
// order. Throws std::runtime_error where a launch fails.
void mixed_lora_decode(const DecodeGroup& group, const Stream& stream);

}  // namespace sapt_fast
