#include "cuda/nearest_key.h"

#include "cuda/key_search.h"
#include "cuda/key_tile.h"
#include "cuda/launch.h"
#include "cuda/ordered.h"
#include "cuda/vec.h"

namespace sapt_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kKeys = 4;  // that a warp compares at a time, by differences

typedef SharedKeys<NearestKey> Arguments;

template <int QUERIES>
struct Shared {
    uint64_t best[kWarps][QUERIES];
};

// The best of all warps to best[split, query].
template <int QUERIES>
__device__ inline void keep_best(const Arguments& arguments, const Shared<QUERIES>& shared,
                                 int64_t first_query) {
    __syncthreads();
    const int64_t query = first_query + threadIdx.x;
    if (threadIdx.x >= QUERIES || query >= arguments.search.queries) return;
    uint64_t best = kNothing;
    for (int w = 0; w < kWarps; ++w) best = min(best, shared.best[w][threadIdx.x]);
    arguments.search.workspace[arguments.split() * arguments.search.queries + query] = best;
}

// Squared distances by differences; blocks (queries, splits).
template <class T, int QUERIES>
__global__ void __launch_bounds__(kThreads)
    compare(const __grid_constant__ Arguments arguments) {
    constexpr int kSums = kKeys * QUERIES;
    static_assert(kSums <= kWarp, "one lane for each sum");
    Shared<QUERIES>& shared = shared_memory<Shared<QUERIES>>();
    wait_for_previous_kernel();
    let_next_kernel_start();

    const NearestKey& search = arguments.search;
    const int64_t width = search.width;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    const int64_t first_query = arguments.first_query(QUERIES);
    const int64_t start = arguments.split() * arguments.keys_per_split;
    const int64_t stop = min(search.count, start + arguments.keys_per_split);
    const T* query = static_cast<const T*>(search.query) + first_query * width;
    const T* keys = static_cast<const T*>(search.keys);
    // The sum that this lane gets.
    const int own_key = lane / (kWarp / kSums) / QUERIES;
    const int own_query = lane / (kWarp / kSums) % QUERIES;
    uint64_t best = kNothing;
    for (int64_t first = start + warp * kKeys; first < stop; first += kWarps * kKeys) {
        float sums[kSums] = {};
        for (int64_t i = lane * kVector; i < width; i += kWarp * kVector) {
            Packed<T> packed[kKeys];
#pragma unroll
            for (int k = 0; k < kKeys; ++k) {
                packed[k] = first + k < stop ? load(keys + (first + k) * width + i, width - i,
                                                    arguments.aligned)
                                             : zeros<T>();
            }
            float values[QUERIES][kVector];
#pragma unroll
            for (int q = 0; q < QUERIES; ++q) {
                unpack(values[q], first_query + q < search.queries
                                      ? load(query + q * width + i, width - i, arguments.aligned)
                                      : zeros<T>());
            }
#pragma unroll
            for (int k = 0; k < kKeys; ++k) {
                float key[kVector];
                unpack(key, packed[k]);
#pragma unroll
                for (int q = 0; q < QUERIES; ++q) {
#pragma unroll
                    for (int e = 0; e < kVector; ++e) {
                        const float difference = values[q][e] - key[e];
                        sums[k * QUERIES + q] += difference * difference;
                    }
                }
            }
        }
        const float squared = warp_sums(sums);
        if (first + own_key < stop) best = min(best, ascending(squared, first + own_key));
    }
    // Over the lanes with the same query: those of other keys.
#pragma unroll
    for (int offset = kWarp / 2; offset >= kWarp / kKeys; offset /= 2) {
        best = min(best, __shfl_xor_sync(kAllLanes, best, offset));
    }
    if (lane < kWarp / kKeys && lane % (kWarp / kSums) == 0) shared.best[warp][own_query] = best;
    keep_best<QUERIES>(arguments, shared, first_query);
}

// |k|^2 - 2 q k from the tensor cores; blocks (queries, splits).
template <class T>
__global__ void __launch_bounds__(kThreads)
    multiply(const __grid_constant__ Arguments arguments) {
    Shared<kTile>& shared = shared_memory<Shared<kTile>>();
    wait_for_previous_kernel();
    let_next_kernel_start();

    const NearestKey& search = arguments.search;
    const int64_t width = search.width;
    const int group = threadIdx.x % kWarp / 4;
    const int warp = threadIdx.x / kWarp;
    const int64_t first_query = arguments.first_query(kTile);
    const int64_t start = arguments.split() * arguments.keys_per_split;
    const int64_t stop = min(search.count, start + arguments.keys_per_split);
    const T* query = static_cast<const T*>(search.query) + first_query * width;
    uint64_t best[4] = {kNothing, kNothing, kNothing, kNothing};
    for (int64_t first = start + warp * kTile; first < stop; first += kWarps * kTile) {
        const T* keys = static_cast<const T*>(search.keys) + first * width;
        TileProducts tile = {};
        tile.add(keys, stop - first, query, search.queries - first_query, width,
                 arguments.aligned);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t index = first + group + half * 8;
            if (index >= stop) continue;
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const float score = tile.squares[half] - 2.0f * tile.product(half, q);
                best[q] = min(best[q], ascending(score, index));
            }
        }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
        for (int offset = 4; offset < kWarp; offset *= 2) {
            best[q] = min(best[q], __shfl_xor_sync(kAllLanes, best[q], offset));
        }
        if (group == 0) shared.best[warp][tile_query(q)] = best[q];
    }
    keep_best<kTile>(arguments, shared, first_query);
}

struct MergeShared {
    uint64_t best[kWarps];
    float sums[kWarps];
};

// One query: the best of all shares, its distance, and whether that is within its radius.
template <class T>
__global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ Arguments arguments) {
    MergeShared& shared = shared_memory<MergeShared>();
    const NearestKey& search = arguments.search;
    const int64_t m = blockIdx.x;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    wait_for_previous_kernel();

    uint64_t best = kNothing;
    for (int64_t split = threadIdx.x; split < arguments.splits; split += kThreads) {
        best = min(best, __ldcg(search.workspace + split * search.queries + m));
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        best = min(best, __shfl_xor_sync(kAllLanes, best, offset));
    }
    if (lane == 0) shared.best[warp] = best;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) best = min(best, shared.best[w]);

    const bool found = best != kNothing;
    const int64_t at = found ? index_of(best) : 0;
    float sum[1] = {0.0f};
    if (found) {
        const T* query = static_cast<const T*>(search.query) + m * search.width;
        const T* key = static_cast<const T*>(search.keys) + at * search.width;
        for (int64_t i = threadIdx.x * kVector; i < search.width; i += kThreads * kVector) {
            float a[kVector];
            float b[kVector];
            unpack(a, load(query + i, search.width - i, arguments.aligned));
            unpack(b, load(key + i, search.width - i, arguments.aligned));
#pragma unroll
            for (int e = 0; e < kVector; ++e) sum[0] += (a[e] - b[e]) * (a[e] - b[e]);
        }
    }
    const float warp_sum = warp_sums(sum);
    if (lane == 0) shared.sums[warp] = warp_sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    float squared = 0.0f;
    for (int w = 0; w < kWarps; ++w) squared += shared.sums[w];
    const bool finite = found && is_finite(squared);
    const float distance = finite ? sqrtf(squared) : __uint_as_float(0x7f800000u);
    search.distance[m] = distance;
    search.nearest[m] = finite ? at : -1;
    search.index[m] = finite && distance <= search.radius[at] ? at : -1;
}

struct Launches {
    static constexpr int64_t kMaxSplits = 512;  // enough blocks for the largest chips
    static constexpr int64_t kMinKeys = 128;

    template <class T, int QUERIES>
    static void compare(int64_t blocks, const Arguments& arguments, const Stream& stream) {
        launch<sapt_fast::compare<T, QUERIES>>("nearest_key compare", blocks, kThreads,
                                               sizeof(Shared<QUERIES>), stream, arguments);
    }

    template <class T>
    static void multiply(int64_t blocks, const Arguments& arguments, const Stream& stream) {
        launch<sapt_fast::multiply<T>>("nearest_key multiply", blocks, kThreads,
                                       sizeof(Shared<kTile>), stream, arguments);
    }

    template <class T>
    static void merge(int64_t blocks, const Arguments& arguments, const Stream& stream) {
        launch<sapt_fast::merge<T>>("nearest_key merge", blocks, kThreads, sizeof(MergeShared),
                                    stream, arguments);
    }
};

}  // namespace

int64_t nearest_key_workspace(int64_t queries, int64_t count) {
    return splits_of<Launches>(count) * queries;
}

void nearest_key(const NearestKey& search, const Stream& stream) {
    if (search.queries == 0 || search.count == 0) return;
    search_keys<Launches>(search, stream);
}

}  // namespace sapt_fast
