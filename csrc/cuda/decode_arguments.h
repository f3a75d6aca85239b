// What the kernels of mixed LoRA for a few rows are launched with.
#pragma once

#include "cuda/mixed_lora.h"
#include "cuda/vec.h"

namespace sapt_fast {

struct Projection {
    DecodeProjection tensors;
    int64_t first_rank;  // among the ranks of all projections
    unsigned first_base_block;
    unsigned first_shrink_block;
    unsigned first_expand_block;
    bool aligned_weight;
    bool aligned_a;
    bool aligned_b;
};

struct Arguments {
    Projection projections[kMaxProjections];
    int count;
    const void* x;
    const float* mixture;
    float* h;  // [splits, rows, total_ranks]: parts of x A^T, of those ranks that have weight
    int64_t rows;
    int64_t rows_per_sample;
    int64_t adapters;
    int64_t inputs;
    int64_t total_ranks;
    int64_t splits;  // parts of the reduction over the inputs
    int64_t inputs_per_split;
    unsigned base_blocks;  // of a tile of rows, as the next two
    unsigned shrink_blocks;
    unsigned expand_blocks;
    bool aligned_x;
};

// The projection to which a block belongs, by the number of each one's first block.
template <unsigned Projection::*FIRST>
__device__ inline const Projection& projection_of(const Arguments& arguments, unsigned block) {
    int p = 0;
    while (p + 1 < arguments.count && block >= arguments.projections[p + 1].*FIRST) ++p;
    return arguments.projections[p];
}

// A rank's weight for each of ROWS rows: 0 where the mixture is, at any scale; NaN for an adapter
// that there is not.
template <int ROWS>
__device__ inline void weights_of(float (&weights)[ROWS], const Arguments& arguments,
                                  const Projection& projection, int64_t first_row, int64_t rank) {
    const DecodeProjection& tensors = projection.tensors;
#pragma unroll
    for (float& weight : weights) weight = 0.0f;
    if (rank >= tensors.ranks) return;
    const int64_t adapter = read<Cache::l2>(tensors.row_adapter + rank);
    const float scale = read<Cache::l2>(tensors.row_scale + rank);
    const bool exists = adapter >= 0 && adapter < arguments.adapters;
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
        const int64_t row = first_row + m;
        if (row >= arguments.rows) break;
        const int64_t sample = row / arguments.rows_per_sample;
        const float weight =
            exists ? read<Cache::l2>(arguments.mixture + sample * arguments.adapters + adapter)
                   : __uint_as_float(0x7fc00000u);
        weights[m] = weight == 0.0f ? 0.0f : weight * scale;
    }
}

}  // namespace sapt_fast
