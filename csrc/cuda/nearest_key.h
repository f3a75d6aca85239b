// The nearest key of every query by Euclidean distance, and whether it lies within its radius.
#pragma once

#include <stdint.h>

#include "cuda/stream.h"
#include "dtype.h"

namespace sapt_fast {

struct NearestKey {
    const void* query;    // [queries, width] in dtype
    const void* keys;     // [count, width] in dtype
    const float* radius;  // [count]
    float* distance;      // [queries]; infinite where there is no key at a finite distance
    int64_t* index;       // [queries]; -1 where the nearest key is farther than its radius
    int64_t* nearest;     // [queries]; -1 where there is none
    uint64_t* workspace;  // nearest_key_workspace of them
    int64_t queries;
    int64_t count;  // below 2^32
    int64_t width;
    DType dtype;
};

constexpr int64_t kMaxKeys = int64_t{1} << 32;

// 64-bit words of scratch memory that the launches share.
int64_t nearest_key_workspace(int64_t queries, int64_t count);

// Two launches. Of keys at equal distances the lowest index. One query, and float32, compare
// differences; several queries of 16 bits compare |k|^2 - 2 q k from the tensor cores, in whose
// rounding keys may change places. The distance is that of the chosen key, from the differences.
void nearest_key(const NearestKey& search, const Stream& stream);

}  // namespace sapt_fast
