#include "cuda/mixed_lora.h"

#include "cuda/by_dtype.h"
#include "cuda/launch.h"
#include "cuda/vec.h"

namespace sapt_fast {
namespace {

constexpr int kShrinkThreads = 128;
constexpr int kShrinkRanks = 4;  // rank rows of a shrink block
constexpr int64_t kShrinkStep = kShrinkThreads * kVector;
constexpr int64_t kMaxSplits = 8;  // parts of the reduction over the inputs

constexpr int kExpandThreads = 256;
constexpr int kLanes = 16;  // threads side by side on the columns of an expand block
constexpr int kColumns = kLanes * kVector;
constexpr int kParts = kExpandThreads / kLanes;  // into which the ranks are dealt
constexpr int kAhead = 4;                        // rows of B that a thread loads at a time
constexpr int kExpandWarps = kExpandThreads / kWarp;

struct Projection {
    void* y;
    const void* lora_a;
    const void* lora_b;
    const int32_t* row_adapter;
    const float* row_scale;
    int64_t ranks;
    int64_t outputs;
    int64_t first_rank;  // among the ranks of all projections
    unsigned first_shrink_block;
    unsigned first_expand_block;
    bool accumulate;
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
    int64_t splits;
    int64_t inputs_per_split;
    bool aligned_x;
};

// 0 where the mixture is, at any scale; NaN for an adapter that there is not.
__device__ inline float weight_of(const Arguments& arguments, const Projection& projection,
                                  int64_t row, int64_t rank) {
    if (row >= arguments.rows || rank >= projection.ranks) return 0.0f;
    const int64_t adapter = projection.row_adapter[rank];
    if (adapter < 0 || adapter >= arguments.adapters) return __uint_as_float(0x7fc00000u);
    const int64_t sample = row / arguments.rows_per_sample;
    const float weight = arguments.mixture[sample * arguments.adapters + adapter];
    return weight == 0.0f ? 0.0f : weight * projection.row_scale[rank];
}

// h[split, row, rank] for kShrinkRanks ranks and ROWS rows; grid (ranks, splits, rows).
template <class T, class L, int ROWS>
__global__ void __launch_bounds__(kShrinkThreads)
    shrink(const __grid_constant__ Arguments arguments) {
    constexpr int kSums = kShrinkRanks * ROWS;
    static_assert(kSums <= kWarp, "one lane for each sum");
    typedef float Sums[kShrinkThreads / kWarp][kSums];
    Sums& sums_of_warps = shared_memory<Sums>();
    wait_for_previous_kernel();
    let_next_kernel_start();

    int p = 0;
    while (p + 1 < arguments.count &&
           blockIdx.x >= arguments.projections[p + 1].first_shrink_block) {
        ++p;
    }
    const Projection& projection = arguments.projections[p];
    const int64_t first_rank =
        static_cast<int64_t>(blockIdx.x - projection.first_shrink_block) * kShrinkRanks;
    const int64_t first_row = static_cast<int64_t>(blockIdx.z) * ROWS;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;

    const float weight = lane < kSums ? weight_of(arguments, projection, first_row + lane % ROWS,
                                                  first_rank + lane / ROWS)
                                      : 0.0f;
    const unsigned weighted = __ballot_sync(kAllLanes, weight != 0.0f);
    if (weighted == 0) return;

    const int64_t inputs = arguments.inputs;
    const int64_t start = blockIdx.y * arguments.inputs_per_split;
    const int64_t stop = min(inputs, start + arguments.inputs_per_split);
    const T* x = static_cast<const T*>(arguments.x) + first_row * inputs;
    const L* a = static_cast<const L*>(projection.lora_a) + first_rank * inputs;
    float sums[kSums] = {};
    for (int64_t i = start + threadIdx.x * kVector; i < stop; i += kShrinkStep) {
        Packed<L> packed_a[kShrinkRanks];
        Packed<T> packed_x[ROWS];
#pragma unroll
        for (int r = 0; r < kShrinkRanks; ++r) {
            const bool read = weighted >> (r * ROWS) & ((1u << ROWS) - 1);
            packed_a[r] =
                read ? load(a + r * inputs + i, inputs - i, projection.aligned_a) : zeros<L>();
        }
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            packed_x[m] = first_row + m < arguments.rows
                              ? load(x + m * inputs + i, inputs - i, arguments.aligned_x)
                              : zeros<T>();
        }
        float values_a[kShrinkRanks][kVector];
#pragma unroll
        for (int r = 0; r < kShrinkRanks; ++r) unpack(values_a[r], packed_a[r]);
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            float values_x[kVector];
            unpack(values_x, packed_x[m]);
#pragma unroll
            for (int r = 0; r < kShrinkRanks; ++r) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    sums[r * ROWS + m] += values_a[r][e] * values_x[e];
                }
            }
        }
    }

    const float sum = warp_sums(sums);
    if (lane % (kWarp / kSums) == 0) sums_of_warps[warp][lane / (kWarp / kSums)] = sum;
    __syncthreads();
    // Only what has weight: the expansion reads nothing else.
    if (threadIdx.x >= kSums || !(weighted >> threadIdx.x & 1)) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kShrinkThreads / kWarp; ++w) total += sums_of_warps[w][threadIdx.x];
    const int64_t row = blockIdx.y * arguments.rows + first_row + threadIdx.x % ROWS;
    arguments.h[row * arguments.total_ranks + projection.first_rank + first_rank +
                threadIdx.x / ROWS] = total;
}

template <int ROWS>
struct ExpandShared {
    float sums[kExpandWarps][ROWS][kColumns];
    float factors[kExpandThreads][ROWS];  // weight times h, of the ranks that have weight
    int ranks[kExpandThreads];            // which these are
    int counts[kExpandWarps];
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

// kColumns columns and ROWS rows of y of one projection; grid (columns, rows).
template <class T, class L, int ROWS>
__global__ void __launch_bounds__(kExpandThreads)
    expand(const __grid_constant__ Arguments arguments) {
    ExpandShared<ROWS>& shared = shared_memory<ExpandShared<ROWS>>();
    int p = 0;
    while (p + 1 < arguments.count &&
           blockIdx.x >= arguments.projections[p + 1].first_expand_block) {
        ++p;
    }
    const Projection& projection = arguments.projections[p];
    const int64_t outputs = projection.outputs;
    const int64_t first_column =
        static_cast<int64_t>(blockIdx.x - projection.first_expand_block) * kColumns;
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * ROWS;
    const int part = threadIdx.x / kLanes;
    const int64_t column = first_column + threadIdx.x % kLanes * kVector;
    const L* b = static_cast<const L*>(projection.lora_b) + column;

    // Everything before the wait was written before the shrink began.
    T* y = static_cast<T*>(projection.y);
    constexpr int kOutputs = (ROWS * kColumns + kExpandThreads - 1) / kExpandThreads;
    float base[kOutputs] = {};
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
        const int at = i * kExpandThreads + threadIdx.x;
        const int64_t row = first_row + at / kColumns;
        const int64_t to = first_column + at % kColumns;
        if (projection.accumulate && at < ROWS * kColumns && row < arguments.rows && to < outputs) {
            base[i] = to_float(__ldcg(y + row * outputs + to));
        }
    }

    float sums[ROWS * kVector] = {};
    for (int64_t first_rank = 0; first_rank == 0 || first_rank < projection.ranks;
         first_rank += kExpandThreads) {
        const int64_t rank = first_rank + threadIdx.x;
        float weights[ROWS];
        bool weighted = false;
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            weights[m] = weight_of(arguments, projection, first_row + m, rank);
            weighted = weighted || weights[m] != 0.0f;
        }
        int count;
        // Its barrier also keeps these ranks from the places that the last ones are still read at.
        const int place = place_among(weighted, shared.counts, count);
        if (weighted) shared.ranks[place] = threadIdx.x;
        __syncthreads();

        Packed<L> packed[kAhead];
        const auto load_rows_of_b = [&](int from) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int at = from + i * kParts;
                packed[i] = at < count && column < outputs
                                ? load(b + (first_rank + shared.ranks[at]) * outputs,
                                       outputs - column, projection.aligned_b)
                                : zeros<L>();
            }
        };
        load_rows_of_b(part);
        if (first_rank == 0) wait_for_previous_kernel();

        if (weighted) {
#pragma unroll
            for (int m = 0; m < ROWS; ++m) {
                float h = 0.0f;
                if (weights[m] != 0.0f) {
                    const float* from = arguments.h +
                                        (first_row + m) * arguments.total_ranks +
                                        projection.first_rank + rank;
                    for (int64_t split = 0; split < arguments.splits; ++split) {
                        h += __ldcg(from + split * arguments.rows * arguments.total_ranks);
                    }
                    h *= weights[m];
                    if (h == 0.0f) h = -0.0f;  // +0 is for rows without weight
                }
                shared.factors[place][m] = h;
            }
        }
        __syncthreads();

        for (int from = part; from < count; from += kParts * kAhead) {
            if (from != part) load_rows_of_b(from);
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const int at = from + i * kParts;
                if (at >= count) break;
                float values[kVector];
                unpack(values, packed[i]);
#pragma unroll
                for (int m = 0; m < ROWS; ++m) {
                    const float factor = shared.factors[at][m];
                    // A row without weight takes nothing from B, whatever it holds.
                    if (__float_as_uint(factor) == 0u) continue;
#pragma unroll
                    for (int e = 0; e < kVector; ++e) {
                        sums[m * kVector + e] += factor * values[e];
                    }
                }
            }
        }
    }

#pragma unroll
    for (int i = 0; i < ROWS * kVector; ++i) {
        sums[i] += __shfl_xor_sync(kAllLanes, sums[i], kLanes);  // the other half of the warp
    }
    const int lane = threadIdx.x % kWarp;
    if (lane < kLanes) {
#pragma unroll
        for (int i = 0; i < ROWS * kVector; ++i) {
            shared.sums[threadIdx.x / kWarp][i / kVector][lane * kVector + i % kVector] = sums[i];
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
        const int at = i * kExpandThreads + threadIdx.x;
        const int64_t row = first_row + at / kColumns;
        const int64_t to = first_column + at % kColumns;
        if (at >= ROWS * kColumns || row >= arguments.rows || to >= outputs) continue;
        float total = base[i];
#pragma unroll
        for (int w = 0; w < kExpandWarps; ++w) total += shared.sums[w][at / kColumns][at % kColumns];
        y[row * outputs + to] = from_float<T>(total);
    }
}

int64_t splits_of(int64_t inputs) {
    const int64_t steps = ceil_div(inputs, kShrinkStep);
    if (steps <= 1) return 1;
    return ceil_div(steps, ceil_div(steps, kMaxSplits));
}

template <class T, class L, int ROWS>
void run(const Arguments& arguments, unsigned shrink_blocks, unsigned expand_blocks, void* stream) {
    const auto tiles = static_cast<unsigned>(ceil_div(arguments.rows, ROWS));
    if (shrink_blocks > 0) {
        launch<shrink<T, L, ROWS>>(
            "mixed_lora shrink", dim3(shrink_blocks, static_cast<unsigned>(arguments.splits), tiles),
            kShrinkThreads, sizeof(float) * kShrinkThreads / kWarp * kShrinkRanks * ROWS, stream,
            arguments);
    }
    launch<expand<T, L, ROWS>>("mixed_lora expand", dim3(expand_blocks, tiles), kExpandThreads,
                               sizeof(ExpandShared<ROWS>), stream, arguments);
}

template <class T, class L>
void run_rows(Arguments& arguments, const DecodeGroup& group, void* stream) {
    arguments.aligned_x = aligned16(group.x, group.inputs * static_cast<int64_t>(sizeof(T)));
    unsigned shrink_blocks = 0;
    unsigned expand_blocks = 0;
    for (int p = 0; p < group.count; ++p) {
        const DecodeProjection& from = group.projections[p];
        Projection& to = arguments.projections[p];
        const auto size = static_cast<int64_t>(sizeof(L));
        to = {from.y,        from.lora_a,    from.lora_b,
              from.row_adapter, from.row_scale, from.ranks,
              from.outputs,  arguments.total_ranks, shrink_blocks,
              expand_blocks, from.accumulate, aligned16(from.lora_a, group.inputs * size),
              aligned16(from.lora_b, from.outputs * size)};
        arguments.total_ranks += from.ranks;
        shrink_blocks += static_cast<unsigned>(ceil_div(from.ranks, kShrinkRanks));
        expand_blocks += static_cast<unsigned>(ceil_div(from.outputs, kColumns));
    }
    if (expand_blocks == 0) return;
    if (arguments.rows == 1) return run<T, L, 1>(arguments, shrink_blocks, expand_blocks, stream);
    if (arguments.rows <= 4) return run<T, L, 4>(arguments, shrink_blocks, expand_blocks, stream);
    run<T, L, 8>(arguments, shrink_blocks, expand_blocks, stream);
}

}  // namespace

int64_t mixed_lora_workspace(int64_t rows, int64_t inputs, int64_t total_ranks) {
    return splits_of(inputs) * rows * total_ranks;
}

void mixed_lora_decode(const DecodeGroup& group, void* stream) {
    if (group.rows == 0) return;
    Arguments arguments = {};
    arguments.count = group.count;
    arguments.x = group.x;
    arguments.mixture = group.mixture;
    arguments.h = group.workspace;
    arguments.rows = group.rows;
    arguments.rows_per_sample = group.rows / group.samples;
    arguments.adapters = group.adapters;
    arguments.inputs = group.inputs;
    arguments.splits = splits_of(group.inputs);
    arguments.inputs_per_split =
        ceil_div(ceil_div(group.inputs, kShrinkStep), arguments.splits) * kShrinkStep;
    by_dtypes(group.dtype, group.lora_dtype, [&](auto type, auto factor_type) {
        run_rows<typename decltype(type)::type, typename decltype(factor_type)::type>(
            arguments, group, stream);
    });
}

}  // namespace sapt_fast
