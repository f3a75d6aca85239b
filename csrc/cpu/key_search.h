// Scores of queries and keys, and the best keys of every query so far, without storing the scores.
#pragma once

#include <stdint.h>

#include "candidates.h"
#include "cpu/tables.h"
#include "dtype.h"

namespace sapt_fast {

// dot; dot over the product of the norms, 0 for a vector of zeros; minus the squared distance
enum class Metric : int { dot = 0, cosine = 1, l2 = 2 };

struct KeySearch {
    const void* query;  // [queries, width], rows query_stride elements apart
    const void* keys;   // [key_count, width], rows key_stride elements apart
    int64_t queries;
    int64_t key_count;
    int64_t width;
    int64_t query_stride;
    int64_t key_stride;
    int64_t k;
    Metric metric;
    DType dtype;
};

// What the threads keep, A being float, or double where the tensors are. A thread holds for every
// query a list of at most `capacity` candidates among the keys it has seen: all that could be one
// of their k best.
struct SearchScratch {
    void* query;         // A [queries, padded_width(search)]
    void* query_scales;  // A [queries]
    void* lists;         // Candidate<A> [threads, queries, capacity]
    int64_t* counts;     // [threads, queries], zeros before the first call
    void* limits;        // A [threads, queries]; NaN before the first call
    void* tiles;         // A [threads, tile_size(search)]
    int64_t capacity;    // more than k
    int threads;
};

struct KeySearchKernels {
    void (*search)(const KeySearch& search, const SearchScratch& scratch);
};

// Queries that share one read of a chunk of keys from the first cache.
constexpr int64_t kQueryBlock = 16;

// Rows are padded with zeros to a whole number of the widest vectors.
static inline int64_t padded_width(const KeySearch& search) { return (search.width + 15) & ~15; }

// Keys that are scored in one go: about 128 KiB of floats, which the second cache holds.
static inline int64_t chunk_keys(const KeySearch& search) {
    const int64_t keys = (1 << 15) / padded_width(search) & ~int64_t{7};
    return keys < 8 ? 8 : keys > 1024 ? 1024 : keys;
}

// The chunk of keys in A, its scores with a block of queries, and the norms of its keys.
static inline int64_t tile_size(const KeySearch& search) {
    return chunk_keys(search) * (padded_width(search) + kQueryBlock + 1);
}

SAPT_FAST_DECLARE_TABLE(KeySearchKernels, key_search_kernels)

}  // namespace sapt_fast
