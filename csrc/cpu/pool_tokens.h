// The maximum over a sequence of the embeddings of its tokens, straight from the ids.
#pragma once

#include <stdint.h>

#include "cpu/tables.h"
#include "dtype.h"

namespace sapt_fast {

struct PoolTokens {
    void* pooled;         // [samples, width]
    int32_t* winner;      // [samples, width] or null: the id of the maximum, the first token's of
                          // equal ones; -1 for none
    const int64_t* ids;   // [samples, tokens]; within the table where the mask keeps them
    const uint8_t* mask;  // [samples, tokens] or null: zero where a token takes no part
    const void* table;    // rows row_stride elements apart
    int64_t samples;
    int64_t tokens;
    int64_t width;
    int64_t row_stride;
    DType dtype;
};

struct PoolTokensKernels {
    // NaN where one of the values is; zeros for a sample without tokens.
    void (*pool_max)(const PoolTokens& args, int threads);
};

SAPT_FAST_DECLARE_TABLE(PoolTokensKernels, pool_tokens_kernels)

}  // namespace sapt_fast
