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

enum class Gate : int { softmax, sigmoid, abs_sigmoid, relu };

struct Route {
    TypedAddress pooled;       // [samples, width]
    TypedAddress down;         // [hidden, width]; null: the query is `pooled`, as the next three
    TypedAddress up;           // [width, hidden]
    TypedAddress norm_weight;  // [width]
    TypedAddress norm_bias;    // [width]
    TypedAddress keys;         // [count, key_width]
    float* workspace;          // [samples, hidden + width]; unused without `down`
    float* scores;             // [samples, count]
    float* weights;            // [samples, count]; null: scores alone
    int64_t samples;
    int64_t width;
    int64_t key_width;  // `width`, unless every key has its own projection
    int64_t hidden;
    int64_t count;  // with weights at most kMaxRoutedKeys
    int64_t top_k;  // weights that a sample keeps
    float eps;
    float divisor;
    float threshold;  // smaller weights are dropped, but not the largest; 0 drops none
    Gate gate;
    bool of_keys;  // each key has its own down [hidden, width] and up [key_width, hidden], no norm;
                   // workspace [samples, count, hidden + key_width]
    bool cosine;   // products are divided by both norms
    bool scales;   // the weights that are kept, to sum to 1
};

// scores = LayerNorm(SiLU(up down pooled)) keys^T / divisor, or of each key
// SiLU(up SiLU(down pooled)) key^T / divisor; weights = gate(scores).
// One launch for each product, one for the weights; all in float.
void route(const Route& route, const Stream& stream);

}  // namespace sapt_fast
