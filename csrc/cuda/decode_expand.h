// The second kernel of mixed LoRA for a few rows: y += (weights x A^T) B.
#pragma once

#include "cuda/decode_arguments.h"

namespace sapt_fast {

constexpr int kExpandThreads = 256;
constexpr int kExpandWarps = kExpandThreads / kWarp;
constexpr int kAhead = 4;  // rows of B that a thread loads at a time

// LANES threads lie side by side on the columns, the ranks are dealt to kParts of them.
template <int ROWS, int LANES>
struct Expand {
    static constexpr int kColumns = LANES * kVector;
    static constexpr int kParts = kExpandThreads / LANES;
    static constexpr int kOutputs = (ROWS * kColumns + kExpandThreads - 1) / kExpandThreads;

    struct Shared {
        float sums[kExpandWarps][ROWS][kColumns];
        float factors[kExpandThreads][ROWS];  // weight times h, of the ranks that have weight
        int ranks[kExpandThreads];            // which these are
        int counts[kExpandWarps];
    };

    const Arguments& arguments;
    const Projection& projection;
    int64_t first_row;
    int64_t first_column;

    // call(i, at, offset) for the outputs of this thread: its i-th, at which place of the tile, and
    // where in y.
    template <class Call>
    __device__ void each_output(const Call& call) const {
        const int64_t outputs = projection.tensors.outputs;
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
            const int at = i * kExpandThreads + threadIdx.x;
            const int64_t row = first_row + at / kColumns;
            const int64_t column = first_column + at % kColumns;
            if (at < ROWS * kColumns && row < arguments.rows && column < outputs) {
                call(i, at, row * outputs + column);
            }
        }
    }

    // Weight times h; +0 is for rows without weight, whose h is not there.
    __device__ float factor_of(float weight, int64_t row, int64_t rank) const {
        if (weight == 0.0f) return 0.0f;
        const float* from =
            arguments.h + row * arguments.total_ranks + projection.first_rank + rank;
        float h = 0.0f;
        for (int64_t split = 0; split < arguments.splits; ++split) {
            h += __ldcg(from + split * arguments.rows * arguments.total_ranks);
        }
        h *= weight;
        return h == 0.0f ? -0.0f : h;
    }

    // The sums of all parts, in a fixed order, to shared memory.
    __device__ void gather(float (&sums)[ROWS * kVector], Shared& shared) const {
#pragma unroll
        for (int offset = LANES; offset < kWarp; offset *= 2) {
#pragma unroll
            for (float& sum : sums) sum += __shfl_xor_sync(kAllLanes, sum, offset);
        }
        const int lane = threadIdx.x % kWarp;
        if (lane < LANES) {
#pragma unroll
            for (int i = 0; i < ROWS * kVector; ++i) {
                shared.sums[threadIdx.x / kWarp][i / kVector][lane * kVector + i % kVector] =
                    sums[i];
            }
        }
        __syncthreads();
    }
};

// The place of this thread among those for which `chosen` holds, and how many these are.
__device__ inline int place_among(bool chosen, int (&counts)[kExpandWarps], int& total) {
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    const unsigned mask = __ballot_sync(kAllLanes, chosen);
    if (lane == 0) counts[warp] = __popc(mask);
    __syncthreads();
    int before = 0;
    total = 0;
#pragma unroll
    for (int w = 0; w < kExpandWarps; ++w) {
        if (w < warp) before += counts[w];
        total += counts[w];
    }
    return before + __popc(mask & ((1u << lane) - 1));
}

// sums += factors . values, for ROWS rows.
template <int ROWS, class L>
__device__ inline void add_row(float (&sums)[ROWS * kVector], const float (&factors)[ROWS],
                               const Packed<L>& packed) {
    float values[kVector];
    unpack(values, packed);
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
        // A row without weight takes nothing from B, whatever it holds.
        if (__float_as_uint(factors[m]) == 0u) continue;
#pragma unroll
        for (int e = 0; e < kVector; ++e) sums[m * kVector + e] += factors[m] * values[e];
    }
}

// LANES * kVector columns and ROWS rows of y of one projection; blocks (rows, columns).
template <class T, class L, int ROWS, int LANES>
__global__ void __launch_bounds__(kExpandThreads)
    expand(const __grid_constant__ Arguments arguments) {
    typedef Expand<ROWS, LANES> Tile;
    typename Tile::Shared& shared = shared_memory<typename Tile::Shared>();
    const unsigned block = blockIdx.x % arguments.expand_blocks;
    const Projection& projection = projection_of<&Projection::first_expand_block>(arguments, block);
    const DecodeProjection& tensors = projection.tensors;
    const Tile tile = {
        arguments, projection, static_cast<int64_t>(blockIdx.x / arguments.expand_blocks) * ROWS,
        static_cast<int64_t>(block - projection.first_expand_block) * Tile::kColumns};
    const int part = threadIdx.x / LANES;
    const int64_t column = tile.first_column + threadIdx.x % LANES * kVector;
    const int64_t columns = tensors.outputs - column;
    const L* b = static_cast<const L*>(tensors.lora_b) + column;
    T* y = static_cast<T*>(tensors.y);
    float base[Tile::kOutputs] = {};
    float sums[ROWS * kVector] = {};
    for (int64_t first_rank = 0; first_rank == 0 || first_rank < tensors.ranks;
         first_rank += kExpandThreads) {
        const int64_t rank = first_rank + threadIdx.x;
        float weights[ROWS];
        weights_of(weights, arguments, projection, tile.first_row, rank);
        bool weighted = false;
#pragma unroll
        for (const float weight : weights) weighted = weighted || weight != 0.0f;
        int count;
        // Its barrier also keeps these ranks from the places that the last ones are still read at.
        const int place = place_among(weighted, shared.counts, count);
        if (weighted) shared.ranks[place] = threadIdx.x;
        __syncthreads();

        Packed<L> packed[kAhead];
        const auto load_rows_of_b = [&](int from) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int at = from + i * Tile::kParts;
                packed[i] = at < count && columns > 0
                                ? load<Cache::l2>(
                                      b + (first_rank + shared.ranks[at]) * tensors.outputs,
                                      columns, projection.aligned_b)
                                : zeros<L>();
            }
        };
        load_rows_of_b(part);
        if (first_rank == 0) {
            // Weights and B were there before the reduction began; y and h were not.
            wait_for_previous_kernel();
            tile.each_output([&](int i, int, int64_t offset) {
                if (tensors.accumulate) base[i] = to_float(__ldcg(y + offset));
            });
        }
        if (weighted) {
#pragma unroll
            for (int m = 0; m < ROWS; ++m) {
                shared.factors[place][m] = tile.factor_of(weights[m], tile.first_row + m, rank);
            }
        }
        __syncthreads();

        for (int from = part; from < count; from += Tile::kParts * kAhead) {
            if (from != part) load_rows_of_b(from);
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int at = from + i * Tile::kParts;
                if (at < count) add_row<ROWS>(sums, shared.factors[at], packed[i]);
            }
        }
    }
    tile.gather(sums, shared);
    tile.each_output([&](int i, int at, int64_t offset) {
        float total = base[i];
#pragma unroll
        for (int w = 0; w < kExpandWarps; ++w) {
            total += shared.sums[w][at / Tile::kColumns][at % Tile::kColumns];
        }
        y[offset] = from_float<T>(total);
    });
}

}  // namespace sapt_fast
