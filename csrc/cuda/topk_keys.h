// The best keys of every query: by inner product, cosine or Euclidean distance.
#pragma once

#include <stdint.h>

#include "cuda/stream.h"
#include "dtype.h"

namespace sapt_fast {

enum class Metric : int { dot = 0, cosine = 1, l2 = 2 };

struct TopkKeys {
    const void* query;    // [queries, width] in dtype
    const void* keys;     // [count, width] in dtype
    float* scores;        // [queries, k], best first
    int64_t* index;       // [queries, k]
    uint64_t* workspace;  // topk_keys_workspace of them
    int64_t queries;
    int64_t count;  // below 2^32 - 1
    int64_t width;
    int k;  // at most kMaxTopK and at most count
    Metric metric;
    DType dtype;
};

constexpr int kMaxTopK = 32;  // one for each lane of a warp

// 64-bit words of scratch memory that the launches share.
int64_t topk_keys_workspace(int64_t queries, int64_t count);

// Two launches. Of equal scores the lower index first, NaN after all others. Scores are in float:
// inner products; cosines, 0 with a vector of zeros; or squared distances times -1, from
// differences for one query and for float32, else |q|^2 + |k|^2 - 2 q k, at least 0.
void topk_keys(const TopkKeys& search, const Stream& stream);

}  // namespace sapt_fast
