#include "cuda/topk_keys.h"

#include "cuda/key_search.h"
#include "cuda/key_tile.h"
#include "cuda/launch.h"
#include "cuda/ordered.h"
#include "cuda/vec.h"

namespace sapt_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kKeys = 4;  // that a warp compares at a time without tensor cores

typedef SharedKeys<TopkKeys> Arguments;

template <int QUERIES>
struct Shared {
    uint64_t best[kWarps][QUERIES][kWarp];
    float squares[QUERIES];  // norms of the queries
};

// The best words seen by a warp, one in each lane, ascending.
struct Best {
    uint64_t word;

    __device__ void insert(uint64_t candidate) {
        const int lane = threadIdx.x % kWarp;
        const int place = __popc(__ballot_sync(kAllLanes, word < candidate));
        const uint64_t before = __shfl_up_sync(kAllLanes, word, 1);
        if (lane == place) word = candidate;
        if (lane > place) word = before;
    }

    // The word of each lane, of which the best k matter.
    __device__ void offer(uint64_t candidate, int k) {
        const uint64_t limit = __shfl_sync(kAllLanes, word, k - 1);
        unsigned better = __ballot_sync(kAllLanes, candidate < limit);
        for (; better != 0; better &= better - 1) {
            insert(__shfl_sync(kAllLanes, candidate, __ffs(static_cast<int>(better)) - 1));
        }
    }
};

__device__ inline float inverse_root(float square) {
    return square == 0.0f ? 0.0f : 1.0f / sqrtf(square);
}

// Squared norms of the block's queries.
template <class T, int QUERIES>
__device__ inline void square_queries(const Arguments& arguments, Shared<QUERIES>& shared,
                                      int64_t first_query) {
    const TopkKeys& search = arguments.search;
    const int lane = threadIdx.x % kWarp;
    for (int q = threadIdx.x / kWarp; q < QUERIES; q += kWarps) {
        float sum[1] = {0.0f};
        const T* query = static_cast<const T*>(search.query) + (first_query + q) * search.width;
        const int64_t stop = first_query + q < search.queries ? search.width : 0;
        for (int64_t i = lane * kVector; i < stop; i += kWarp * kVector) {
            float values[kVector];
            unpack(values, load(query + i, stop - i, arguments.aligned));
#pragma unroll
            for (int e = 0; e < kVector; ++e) sum[0] += values[e] * values[e];
        }
        const float square = warp_sums(sum);
        if (lane == 0) shared.squares[q] = square;
    }
    __syncthreads();
}

// The best of all warps to best[split, query, kWarp].
template <int QUERIES>
__device__ inline void keep_best(const Arguments& arguments, const Best (&best)[QUERIES],
                                 Shared<QUERIES>& shared, int64_t first_query) {
    const TopkKeys& search = arguments.search;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int q = 0; q < QUERIES; ++q) shared.best[warp][q][lane] = best[q].word;
    __syncthreads();
    for (int q = warp; q < QUERIES && first_query + q < search.queries; q += kWarps) {
        Best all = {shared.best[0][q][lane]};
        for (int w = 1; w < kWarps; ++w) all.offer(shared.best[w][q][lane], search.k);
        search.workspace[(arguments.split() * search.queries + first_query + q) * kWarp + lane] =
            all.word;
    }
}

// Products or differences in float; blocks (queries, splits).
template <class T, Metric METRIC, int QUERIES>
__global__ void __launch_bounds__(kThreads)
    compare(const __grid_constant__ Arguments arguments) {
    constexpr int kSums = kKeys * QUERIES;
    static_assert(kSums <= kWarp, "one lane for each sum");
    Shared<QUERIES>& shared = shared_memory<Shared<QUERIES>>();
    wait_for_previous_kernel();
    let_next_kernel_start();

    const TopkKeys& search = arguments.search;
    const int64_t width = search.width;
    const int lane = threadIdx.x % kWarp;
    const int64_t first_query = arguments.first_query(QUERIES);
    const int64_t start = arguments.split() * arguments.keys_per_split;
    const int64_t stop = min(search.count, start + arguments.keys_per_split);
    const T* query = static_cast<const T*>(search.query) + first_query * width;
    const T* keys = static_cast<const T*>(search.keys);
    if constexpr (METRIC != Metric::dot) square_queries<T>(arguments, shared, first_query);
    // The sum that this lane gets, and whether it is the first of those that get it.
    const int own_key = lane / (kWarp / kSums) / QUERIES;
    const int own_query = lane / (kWarp / kSums) % QUERIES;
    const bool owns = lane % (kWarp / kSums) == 0;
    Best best[QUERIES];
#pragma unroll
    for (int q = 0; q < QUERIES; ++q) best[q].word = kNothing;
    for (int64_t first = start + threadIdx.x / kWarp * kKeys; first < stop;
         first += kWarps * kKeys) {
        float sums[kSums] = {};
        float squares[kKeys] = {};
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
                for (int e = 0; e < kVector; ++e) {
                    if constexpr (METRIC == Metric::cosine) squares[k] += key[e] * key[e];
#pragma unroll
                    for (int q = 0; q < QUERIES; ++q) {
                        const float difference = values[q][e] - key[e];
                        sums[k * QUERIES + q] += METRIC == Metric::l2 ? difference * difference
                                                                      : values[q][e] * key[e];
                    }
                }
            }
        }
        float score = warp_sums(sums);
        if constexpr (METRIC == Metric::l2) score = -score;
        if constexpr (METRIC == Metric::cosine) {
            const float square = warp_sums(squares);  // of own_key, too
            score *= inverse_root(shared.squares[own_query]) * inverse_root(square);
        }
        const int64_t index = first + own_key;
        const uint64_t word = owns && index < stop ? descending(score, index) : kNothing;
#pragma unroll
        for (int q = 0; q < QUERIES; ++q) {
            best[q].offer(q == own_query ? word : kNothing, search.k);
        }
    }
    keep_best(arguments, best, shared, first_query);
}

// Products by the tensor cores; blocks (queries, splits).
template <class T, Metric METRIC>
__global__ void __launch_bounds__(kThreads)
    multiply(const __grid_constant__ Arguments arguments) {
    Shared<kTile>& shared = shared_memory<Shared<kTile>>();
    wait_for_previous_kernel();
    let_next_kernel_start();

    const TopkKeys& search = arguments.search;
    const int64_t width = search.width;
    const int group = threadIdx.x % kWarp / 4;
    const int64_t first_query = arguments.first_query(kTile);
    const int64_t start = arguments.split() * arguments.keys_per_split;
    const int64_t stop = min(search.count, start + arguments.keys_per_split);
    const T* query = static_cast<const T*>(search.query) + first_query * width;
    if constexpr (METRIC != Metric::dot) square_queries<T>(arguments, shared, first_query);
    Best best[kTile];
#pragma unroll
    for (int q = 0; q < kTile; ++q) best[q].word = kNothing;
    for (int64_t first = start + threadIdx.x / kWarp * kTile; first < stop;
         first += kWarps * kTile) {
        const T* keys = static_cast<const T*>(search.keys) + first * width;
        TileProducts tile = {};
        tile.add(keys, stop - first, query, search.queries - first_query, width,
                 arguments.aligned);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t index = first + group + half * 8;
            uint64_t words[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                float score = tile.product(half, q);
                if constexpr (METRIC == Metric::l2) {
                    const float squared =
                        shared.squares[tile_query(q)] + tile.squares[half] - 2.0f * score;
                    score = squared < 0.0f ? 0.0f : -squared;
                }
                if constexpr (METRIC == Metric::cosine) {
                    score *= inverse_root(shared.squares[tile_query(q)]) *
                             inverse_root(tile.squares[half]);
                }
                words[q] = index < stop ? descending(score, index) : kNothing;
            }
#pragma unroll
            for (int q = 0; q < kTile; ++q) {
                // The lanes that hold a product of this query, and its number there.
                const bool holds = static_cast<int>(threadIdx.x % 4) == q % 8 / 2;
                best[q].offer(holds ? words[q / 8 * 2 + q % 2] : kNothing, search.k);
            }
        }
    }
    keep_best(arguments, best, shared, first_query);
}

// One query: the best of all shares; blocks (queries).
__global__ void __launch_bounds__(kThreads) merge(const __grid_constant__ Arguments arguments) {
    Shared<1>& shared = shared_memory<Shared<1>>();
    const TopkKeys& search = arguments.search;
    const int64_t m = blockIdx.x;
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    wait_for_previous_kernel();

    Best best = {kNothing};
    for (int64_t split = warp; split < arguments.splits; split += kWarps) {
        best.offer(__ldcg(search.workspace + (split * search.queries + m) * kWarp + lane),
                   search.k);
    }
    shared.best[warp][0][lane] = best.word;
    __syncthreads();
    if (warp != 0) return;
    for (int w = 1; w < kWarps; ++w) best.offer(shared.best[w][0][lane], search.k);
    if (lane >= search.k) return;
    search.scores[m * search.k + lane] = score_of(best.word);
    search.index[m * search.k + lane] = index_of(best.word);
}

template <Metric METRIC>
struct Launches {
    static constexpr int64_t kMaxSplits = 264;  // two blocks on each of many processors
    static constexpr int64_t kMinKeys = 256;

    template <class T, int QUERIES>
    static void compare(int64_t blocks, const Arguments& arguments, const Stream& stream) {
        launch<sapt_fast::compare<T, METRIC, QUERIES>>("topk_keys compare", blocks, kThreads,
                                               sizeof(Shared<QUERIES>), stream, arguments);
    }

    template <class T>
    static void multiply(int64_t blocks, const Arguments& arguments, const Stream& stream) {
        launch<sapt_fast::multiply<T, METRIC>>("topk_keys multiply", blocks, kThreads,
                                               sizeof(Shared<kTile>), stream, arguments);
    }

    template <class T>
    static void merge(int64_t blocks, const Arguments& arguments, const Stream& stream) {
        launch<sapt_fast::merge>("topk_keys merge", blocks, kThreads, sizeof(Shared<1>), stream,
                                 arguments);
    }
};

}  // namespace

int64_t topk_keys_workspace(int64_t queries, int64_t count) {
    return splits_of<Launches<Metric::dot>>(count) * queries * kWarp;  // of all metrics alike
}

void topk_keys(const TopkKeys& search, const Stream& stream) {
    if (search.queries == 0) return;
    switch (search.metric) {
        case Metric::dot:
            return search_keys<Launches<Metric::dot>>(search, stream);
        case Metric::cosine:
            return search_keys<Launches<Metric::cosine>>(search, stream);
        case Metric::l2:
            return search_keys<Launches<Metric::l2>>(search, stream);
    }
}

}  // namespace sapt_fast
