// The first kernel of mixed LoRA for a few rows: what sums over the inputs, x W^T and x A^T.
#pragma once

#include "cuda/decode_arguments.h"

namespace sapt_fast {

constexpr int kReduceThreads = 128;
constexpr int kReduceRows = 4;  // of a matrix, for one block
constexpr int64_t kReduceStep = kReduceThreads * kVector;

template <int ROWS>
struct ReduceShared {
    float sums[kReduceThreads / kWarp][kReduceRows * ROWS];
};

// What a block multiplies: rows of x, of which `rows` may be read, with kReduceRows of a matrix.
template <class T, class M>
struct Factors {
    const T* x;
    const M* matrix;
    int64_t rows;
    int64_t inputs;
    int64_t start;  // of the inputs that are summed over
    int64_t stop;
    bool aligned_x;
    bool aligned_matrix;
};

// Thread r * ROWS + m gets the product of row r of the matrix with row m of x; others get zero. A
// row of the matrix is read if one of the bits from r * ROWS to r * ROWS + ROWS - 1 is set.
template <int ROWS, class T, class M>
__device__ inline float products(const Factors<T, M>& factors, unsigned needed,
                                 ReduceShared<ROWS>& shared) {
    constexpr int kSums = kReduceRows * ROWS;
    static_assert(kSums <= kWarp, "one lane for each sum");
    const int64_t inputs = factors.inputs;
    float sums[kSums] = {};
    for (int64_t i = factors.start + threadIdx.x * kVector; i < factors.stop; i += kReduceStep) {
        Packed<M> packed_matrix[kReduceRows];
        Packed<T> packed_x[ROWS];
#pragma unroll
        for (int r = 0; r < kReduceRows; ++r) {
            const bool read = needed >> (r * ROWS) & ((1u << ROWS) - 1);
            packed_matrix[r] = read ? load<Cache::l2>(factors.matrix + r * inputs + i, inputs - i,
                                                      factors.aligned_matrix)
                                    : zeros<M>();
        }
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            packed_x[m] = m < factors.rows
                              ? load(factors.x + m * inputs + i, inputs - i, factors.aligned_x)
                              : zeros<T>();
        }
        float matrix[kReduceRows][kVector];
#pragma unroll
        for (int r = 0; r < kReduceRows; ++r) unpack(matrix[r], packed_matrix[r]);
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            float x[kVector];
            unpack(x, packed_x[m]);
#pragma unroll
            for (int r = 0; r < kReduceRows; ++r) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) sums[r * ROWS + m] += matrix[r][e] * x[e];
            }
        }
    }
    const int lane = threadIdx.x % kWarp;
    const float sum = warp_sums(sums);
    if (lane % (kWarp / kSums) == 0) {
        shared.sums[threadIdx.x / kWarp][lane / (kWarp / kSums)] = sum;
    }
    __syncthreads();
    float total = 0.0f;
    if (threadIdx.x >= kSums) return total;
#pragma unroll
    for (int w = 0; w < kReduceThreads / kWarp; ++w) total += shared.sums[w][threadIdx.x];
    return total;
}

// y = x W^T + bias for kReduceRows columns of y.
template <class T, int ROWS>
__device__ inline void multiply_base(const Arguments& arguments, unsigned block, int64_t first_row,
                                     ReduceShared<ROWS>& shared) {
    const Projection& projection = projection_of<&Projection::first_base_block>(arguments, block);
    const DecodeProjection& tensors = projection.tensors;
    const int64_t first =
        static_cast<int64_t>(block - projection.first_base_block) * kReduceRows;
    const int64_t inputs = arguments.inputs;
    const Factors<T, T> factors = {static_cast<const T*>(arguments.x) + first_row * inputs,
                                   static_cast<const T*>(tensors.weight) + first * inputs,
                                   arguments.rows - first_row,
                                   inputs,
                                   0,
                                   inputs,
                                   arguments.aligned_x,
                                   projection.aligned_weight};
    const auto columns = static_cast<int>(min(tensors.outputs - first, int64_t{kReduceRows}));
    float total = products(factors, ~0u >> (kWarp - columns * ROWS), shared);
    const int64_t row = first_row + threadIdx.x % ROWS;
    const int64_t column = first + threadIdx.x / ROWS;
    if (static_cast<int>(threadIdx.x) >= columns * ROWS || row >= arguments.rows) return;
    if (tensors.bias != nullptr) total += to_float(static_cast<const T*>(tensors.bias)[column]);
    static_cast<T*>(tensors.y)[row * tensors.outputs + column] = from_float<T>(total);
}

// h[split, row, rank] for kReduceRows ranks.
template <class T, class L, int ROWS>
__device__ inline void shrink(const Arguments& arguments, unsigned block, int64_t first_row,
                              ReduceShared<ROWS>& shared) {
    constexpr int kSums = kReduceRows * ROWS;
    const auto splits = static_cast<unsigned>(arguments.splits);
    const Projection& projection =
        projection_of<&Projection::first_shrink_block>(arguments, block / splits);
    const int64_t first =
        static_cast<int64_t>(block / splits - projection.first_shrink_block) * kReduceRows;
    const int64_t split = block % splits;
    const int lane = threadIdx.x % kWarp;
    float weight[1] = {0.0f};
    if (lane < kSums) {
        weights_of(weight, arguments, projection, first_row + lane % ROWS, first + lane / ROWS);
    }
    const unsigned weighted = __ballot_sync(kAllLanes, weight[0] != 0.0f);
    if (weighted == 0) return;

    const int64_t inputs = arguments.inputs;
    const int64_t start = split * arguments.inputs_per_split;
    const Factors<T, L> factors = {
        static_cast<const T*>(arguments.x) + first_row * inputs,
        static_cast<const L*>(projection.tensors.lora_a) + first * inputs,
        arguments.rows - first_row,
        inputs,
        start,
        min(inputs, start + arguments.inputs_per_split),
        arguments.aligned_x,
        projection.aligned_a};
    const float total = products(factors, weighted, shared);
    // Only what has weight: the expansion reads nothing else.
    if (threadIdx.x >= kSums || !(weighted >> threadIdx.x & 1)) return;
    const int64_t row = split * arguments.rows + first_row + threadIdx.x % ROWS;
    arguments.h[row * arguments.total_ranks + projection.first_rank + first + threadIdx.x / ROWS] =
        total;
}

// Base products of ROWS rows of y, and their h; blocks (rows, columns of y and ranks).
template <class T, class L, int ROWS>
__global__ void __launch_bounds__(kReduceThreads)
    reduce(const __grid_constant__ Arguments arguments) {
    ReduceShared<ROWS>& shared = shared_memory<ReduceShared<ROWS>>();
    wait_for_previous_kernel();
    let_next_kernel_start();
    const unsigned blocks = arguments.base_blocks + arguments.shrink_blocks;
    const unsigned block = blockIdx.x % blocks;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x / blocks) * ROWS;
    if constexpr (ROWS <= kMaxBaseRows) {
        if (block < arguments.base_blocks) {
            return multiply_base<T>(arguments, block, first_row, shared);
        }
    }
    shrink<T, L>(arguments, block - arguments.base_blocks, first_row, shared);
}

}  // namespace sapt_fast
