// Soft prompts mixed per sample, in front of the sample's embeddings.
#pragma once

#include <stdint.h>

#include "cuda/stream.h"
#include "dtype.h"

namespace sapt_fast {

struct MixPrompts {
    const void* prompts;  // [adapters, length, width] in prompts_dtype
    DType prompts_dtype;  // dtype or float32
    const float* mixture;  // [samples, adapters]
    const void* source;   // [samples, tokens, width] in dtype, or with ids [vocabulary, width]
    DType dtype;
    const void* ids;  // [samples, tokens] or null
    bool wide_ids;    // int64, else int32
    void* out;        // [samples, length + tokens, width] in dtype
    int64_t samples;
    int64_t adapters;
    int64_t length;
    int64_t tokens;
    int64_t width;
    int64_t vocabulary;
    int64_t sample_stride;  // of source without ids, in elements
    int64_t row_stride;     // of source, in elements
};

// One launch. Prompts whose weight is zero in every sample of a tile are not read; an id out of
// range gives NaN.
void mix_prompts(const MixPrompts& mix, const Stream& stream);

}  // namespace sapt_fast
