// From pooled embeddings to the adapters' weights, for a few samples.
#pragma once

#include <stdint.h>

#include "cuda/stream.h"
#include "dtype.h"

namespace sapt_fast {

constexpr int64_t kMaxRoutedKeys = 1024;

struct TypedAddress {
    const void* data;
    DType dtype;
};

struct Route {
    TypedAddress pooled;       // [samples, width]
    TypedAddress down;         // [hidden, width]; null: the query is `pooled`, as the next three
    TypedAddress up;           // [width, hidden]
    TypedAddress norm_weight;  // [width]
    TypedAddress norm_bias;    // [width]
    TypedAddress keys;         // [count, width]
    float* workspace;          // [samples, hidden + width]; unused without `down`
    float* scores;             // [samples, count]
    float* weights;            // [samples, count]; null: scores alone
    int64_t samples;
    int64_t width;
    int64_t hidden;
    int64_t count;  // with weights at most kMaxRoutedKeys
    int64_t top_k;  // weights that a sample keeps
    float eps;
    float divisor;
    float threshold;  // smaller weights are dropped, but not the largest; 0 drops none
};

// scores = LayerNorm(SiLU(up down pooled)) keys^T / divisor, weights = softmax(scores), those that
// are kept scaled to sum to 1. One launch for each product, one for the weights; all in float.
void route(const Route& route, const Stream& stream);

}  // namespace sapt_fast
