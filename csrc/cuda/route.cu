#include "cuda/route.h"

#include "cuda/any.h"
#include "cuda/launch.h"
#include "cuda/vec.h"

namespace sapt_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kAhead = 4;  // loads of a row that are on their way at a time
constexpr float kCosineEps = 1e-8f;  // the least norm that is divided by

// out[sample, row] = f(matrix[row] . vector[sample, row / rows_per_vector])
struct Product {
    AnyTensor matrix;  // [rows, columns]
    AnyTensor vector;  // [samples, vectors, columns]
    AnyTensor norm_weight;
    AnyTensor norm_bias;
    float* out;  // [samples, rows]
    int64_t rows;
    int64_t columns;
    int vectors;
    int rows_per_vector;
    int64_t blocks_per_sample;
    int warps_per_row;
    float eps;
    float factor;
    bool silu;        // of the product
    bool layer_norm;  // of the vector
    bool follows;     // another kernel of the op, which writes no matrix
};

struct Shared {
    float sums[kWarps];
    float vector_squares[kWarps];
    float matrix_squares[kWarps];
};

// The sum over the block, in a fixed order, to all threads.
__device__ inline float block_sum(float value, Shared& shared) {
    float values[1] = {value};
    const float sum = warp_sums(values);
    __syncthreads();  // the last sums have been read
    if (threadIdx.x % kWarp == 0) shared.sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared.sums[w];
    return total;
}

// The maximum over the block, to all threads; before the block has used `shared`.
__device__ inline float block_max(float value, Shared& shared) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
    }
    if (threadIdx.x % kWarp == 0) shared.sums[threadIdx.x / kWarp] = value;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value = fmaxf(value, shared.sums[w]);
    return value;
}

// Mean and reciprocal deviation of a sample's vector.
struct Moments {
    float mean = 0.0f;
    float scale = 1.0f;
};

__device__ inline Moments moments_of(const Product& product, int64_t sample, Shared& shared) {
    const int64_t columns = product.columns;
    const auto count = static_cast<float>(columns);
    const float* vector = static_cast<const float*>(product.vector.data) + sample * columns;
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < columns; i += kThreads) sum += vector[i];
    const float mean = block_sum(sum, shared) / count;
    sum = 0.0f;
    for (int64_t i = threadIdx.x; i < columns; i += kThreads) {
        sum += (vector[i] - mean) * (vector[i] - mean);
    }
    return {mean, 1.0f / sqrtf(block_sum(sum, shared) / count + product.eps)};
}

// Blocks (samples, rows). With COSINE the product is divided by both norms.
template <bool COSINE>
__global__ void __launch_bounds__(kThreads, 2) multiply(const __grid_constant__ Product product) {
    Shared& shared = shared_memory<Shared>();
    const auto blocks = static_cast<unsigned>(product.blocks_per_sample);
    const int64_t sample = blockIdx.x / blocks;
    const int64_t columns = product.columns;
    const int warp = threadIdx.x / kWarp;
    const int rows_per_block = kWarps / product.warps_per_row;
    const int64_t first_row = static_cast<int64_t>(blockIdx.x % blocks) * rows_per_block;
    const int64_t row = first_row + warp / product.warps_per_row;
    const int64_t vector_row =
        sample * product.vectors + static_cast<int>(row) / product.rows_per_vector;
    const int part = warp % product.warps_per_row;
    const int64_t step = product.warps_per_row * kWarp * kVector;
    const int64_t stop = row < product.rows ? columns : 0;
    const int64_t start = (part * kWarp + threadIdx.x % kWarp) * kVector;
    AnyPacked packed[kAhead];
    const auto load_matrix = [&](int64_t first) {
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
            const int64_t i = first + ahead * step;
            packed[ahead] = i < stop
                                ? load<Cache::l2>(product.matrix, row * columns + i, stop - i)
                                : zeros<float>();
        }
    };
    if (product.follows) load_matrix(start);
    wait_for_previous_kernel();
    let_next_kernel_start();
    if (!product.follows) load_matrix(start);

    Moments moments;
    if (product.layer_norm) moments = moments_of(product, sample, shared);
    float sum[1] = {0.0f};
    float vector_squares[1] = {0.0f};
    float matrix_squares[1] = {0.0f};
    for (int64_t first = start; first < stop; first += kAhead * step) {
        if (first != start) load_matrix(first);
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead) {
            const int64_t i = first + ahead * step;
            if (i >= stop) break;
            float matrix[kVector];
            float vector[kVector];
            unpack(matrix, packed[ahead], product.matrix.dtype);
            load_values(vector, product.vector, vector_row * columns + i, stop - i);
            if (product.layer_norm) {
                float weight[kVector];
                float bias[kVector];
                load_values(weight, product.norm_weight, i, stop - i);
                load_values(bias, product.norm_bias, i, stop - i);
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    vector[e] = (vector[e] - moments.mean) * moments.scale * weight[e] + bias[e];
                }
            }
#pragma unroll
            for (int e = 0; e < kVector; ++e) sum[0] += matrix[e] * vector[e];
            if (COSINE) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) {
                    vector_squares[0] += vector[e] * vector[e];
                    matrix_squares[0] += matrix[e] * matrix[e];
                }
            }
        }
    }
    const float warp_sum = warp_sums(sum);
    const float warp_vector = COSINE ? warp_sums(vector_squares) : 0.0f;
    const float warp_matrix = COSINE ? warp_sums(matrix_squares) : 0.0f;
    __syncthreads();
    if (threadIdx.x % kWarp == 0) {
        shared.sums[warp] = warp_sum;
        shared.vector_squares[warp] = warp_vector;
        shared.matrix_squares[warp] = warp_matrix;
    }
    __syncthreads();
    const int place = threadIdx.x;
    const int64_t own = first_row + place;
    if (place >= rows_per_block || own >= product.rows) return;
    float total = 0.0f;
    float vector_square = 0.0f;
    float matrix_square = 0.0f;
    for (int w = 0; w < product.warps_per_row; ++w) {
        total += shared.sums[place * product.warps_per_row + w];
        vector_square += shared.vector_squares[place * product.warps_per_row + w];
        matrix_square += shared.matrix_squares[place * product.warps_per_row + w];
    }
    if (COSINE) {
        total /= fmaxf(sqrtf(vector_square), kCosineEps);
        total /= fmaxf(sqrtf(matrix_square), kCosineEps);
    }
    total *= product.factor;
    if (product.silu) total = total / (1.0f + expf(-total));
    product.out[sample * product.rows + own] = total;
}

struct Choice {
    const float* scores;  // [samples, count]
    float* weights;       // [samples, count]
    int64_t count;
    int64_t top_k;
    float threshold;
    Gate gate;
    bool scales;
};

constexpr int kOwn = kMaxRoutedKeys / kThreads;  // weights of a thread: every kThreads-th
constexpr int kCompared = 128;                   // so few are compared with each other

struct ChoiceShared {
    Shared sums;
    float weights[kCompared];
    int counts[2][kWarps];
    int equal[kOwn][kWarps];
};

// How many of the block's weights are chosen. `turn` is 0 and 1 by turns: one barrier will do.
__device__ inline int block_count(const bool (&chosen)[kOwn], int turn, ChoiceShared& shared) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) count += __popc(__ballot_sync(kAllLanes, chosen[i]));
    if (threadIdx.x % kWarp == 0) shared.counts[turn][threadIdx.x / kWarp] = count;
    __syncthreads();
    int total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared.counts[turn][w];
    return total;
}

// Keeps the first `left` of the block's open weights.
__device__ inline void keep_first(bool (&kept)[kOwn], const bool (&open)[kOwn], int left,
                                  ChoiceShared& shared) {
    const int warp = threadIdx.x / kWarp;
    unsigned masks[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        masks[i] = __ballot_sync(kAllLanes, open[i]);
        if (threadIdx.x % kWarp == 0) shared.equal[i][warp] = __popc(masks[i]);
    }
    __syncthreads();
    int before = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const unsigned lower = w == warp ? masks[i] & ((1u << threadIdx.x % kWarp) - 1) : 0u;
            if (w == warp && open[i] && before + __popc(lower) < left) kept[i] = true;
            before += shared.equal[i][w];
        }
    }
}

// Which of `count` weights are among the `top_k` largest, of equal ones the first: bit by bit from
// the highest on, those with the bit set are kept, or the others dropped. No weight is negative.
__device__ inline void keep_largest(bool (&kept)[kOwn], const float (&own)[kOwn], int count,
                                    int top_k, ChoiceShared& shared) {
    constexpr int kHighestBit = 30;  // below the sign
    bool open[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        kept[i] = false;
        open[i] = i * kThreads + static_cast<int>(threadIdx.x) < count;
    }
    int left = top_k;
    int undecided = count;
    for (int bit = kHighestBit; bit >= 0 && undecided > left; --bit) {
        bool set[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) set[i] = open[i] && __float_as_uint(own[i]) >> bit & 1;
        const int larger = block_count(set, bit % 2, shared);
        const bool fit = larger < left;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            kept[i] = kept[i] || (fit && set[i]);
            open[i] = open[i] && fit != set[i];
        }
        left -= fit ? larger : 0;
        undecided = fit ? undecided - larger : larger;
    }
    keep_first(kept, open, left, shared);
}

// The same by counting for each weight those before it: fewer steps where weights are few.
__device__ inline void keep_largest_of_few(bool (&kept)[kOwn], const float (&own)[kOwn], int count,
                                           int top_k, ChoiceShared& shared) {
    const int k = threadIdx.x;
    if (k < count) shared.weights[k] = own[0];
    __syncthreads();
    int before = 0;
    for (int other = 0; k < count && other < count; ++other) {
        const float weight = shared.weights[other];
        before += weight > own[0] || (weight == own[0] && other < k);
    }
    kept[0] = before < top_k;
}

// The weight of a score, which does not depend on the others.
__device__ inline float activated(float score, Gate gate) {
    if (gate == Gate::sigmoid) return 1.0f / (1.0f + expf(-score));
    if (gate == Gate::abs_sigmoid) return tanhf(fabsf(score) * 0.5f);
    return score <= 0.0f ? 0.0f : score;  // ReLU: no -0, and NaN stays
}

// Replaces the block's scores by their weights; returns the largest.
__device__ inline float activate(float (&own)[kOwn], int count, Gate gate, Shared& shared) {
    float largest = gate == Gate::softmax ? __uint_as_float(0xff800000u) : 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const bool inside = i * kThreads + static_cast<int>(threadIdx.x) < count;
        if (gate != Gate::softmax) own[i] = inside ? activated(own[i], gate) : 0.0f;
        if (inside) largest = fmaxf(largest, own[i]);
    }
    largest = block_max(largest, shared);
    if (gate != Gate::softmax) return largest;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const bool inside = i * kThreads + static_cast<int>(threadIdx.x) < count;
        own[i] = inside ? expf(own[i] - largest) : 0.0f;
        sum += own[i];
    }
    sum = block_sum(sum, shared);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) own[i] /= sum;
    return 1.0f / sum;
}

// The gate of one sample's scores, and which of its weights are kept; blocks (samples).
__global__ void __launch_bounds__(kThreads) choose(const __grid_constant__ Choice choice) {
    ChoiceShared& shared = shared_memory<ChoiceShared>();
    wait_for_previous_kernel();
    const int count = static_cast<int>(choice.count);
    const float* scores = choice.scores + blockIdx.x * choice.count;
    float own[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int k = i * kThreads + threadIdx.x;
        own[i] = k < count ? __ldcg(scores + k) : 0.0f;
    }
    const float largest = activate(own, count, choice.gate, shared.sums);
    const bool ranked = choice.top_k < choice.count;
    const bool drops = ranked || choice.threshold > 0.0f;
    if (drops) {
        bool kept[kOwn];
#pragma unroll
        for (bool& keep : kept) keep = true;
        const int top_k = static_cast<int>(choice.top_k);
        if (ranked && count <= kCompared) keep_largest_of_few(kept, own, count, top_k, shared);
        if (ranked && count > kCompared) keep_largest(kept, own, count, top_k, shared);
        const float limit = fminf(choice.threshold, largest);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (own[i] < limit || !kept[i]) own[i] = 0.0f;
        }
    }
    // A softmax sums to 1 already.
    if (choice.scales && (drops || choice.gate != Gate::softmax)) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < kOwn; ++i) total += own[i];
        total = block_sum(total, shared.sums);
#pragma unroll
        for (int i = 0; i < kOwn; ++i) own[i] /= total == 0.0f ? 1.0f : total;
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
        const int k = i * kThreads + threadIdx.x;
        if (k < count) choice.weights[blockIdx.x * choice.count + k] = own[i];
    }
}

AnyTensor any(const TypedAddress& tensor, int64_t columns) {
    const int64_t size = tensor.dtype == DType::float32 ? 4 : 2;
    return {tensor.data, tensor.dtype, aligned16(tensor.data, columns * size)};
}

// Of a vector of its own for each sample, with a matrix [rows, columns] for all.
Product product_of(const TypedAddress& matrix, const TypedAddress& vector, float* out,
                   int64_t rows, int64_t columns) {
    Product product = {};
    product.matrix = any(matrix, columns);
    product.vector = any(vector, columns);
    product.out = out;
    product.vectors = 1;
    product.rows_per_vector = static_cast<int>(rows);
    product.rows = rows;
    product.columns = columns;
    product.factor = 1.0f;
    return product;
}

template <bool COSINE = false>
void run(Product product, int64_t samples, const Stream& stream) {
    if (product.rows == 0) return;
    // All warps of a block on a row that is long enough for them.
    product.warps_per_row = 1;
    while (product.warps_per_row < kWarps &&
           product.columns > product.warps_per_row * kWarp * kVector) {
        product.warps_per_row *= 2;
    }
    product.blocks_per_sample = ceil_div(product.rows, kWarps / product.warps_per_row);
    launch<multiply<COSINE>>("router multiply", product.blocks_per_sample * samples, kThreads,
                     sizeof(Shared), stream, product);
}

// The scores' product, whose vectors are the queries.
Product scores_of(const Route& route) {
    Product scores =
        product_of(route.keys, route.pooled, route.scores, route.count, route.key_width);
    scores.factor = 1.0f / route.divisor;
    return scores;
}

// Of one query per sample.
void score(const Route& route, const Stream& stream) {
    Product scores = scores_of(route);
    if (route.down.data != nullptr) {
        const TypedAddress hidden = {route.workspace, DType::float32};
        float* query = route.workspace + route.samples * route.hidden;
        run(product_of(route.down, route.pooled, route.workspace, route.hidden, route.width),
            route.samples, stream);
        Product up = product_of(route.up, hidden, query, route.width, route.hidden);
        up.silu = true;
        up.follows = route.hidden > 0;
        run(up, route.samples, stream);
        scores.vector = any({query, DType::float32}, route.width);
        scores.norm_weight = any(route.norm_weight, route.width);
        scores.norm_bias = any(route.norm_bias, route.width);
        scores.eps = route.eps;
        scores.layer_norm = true;
        scores.follows = route.width > 0;
    }
    (route.cosine ? run<true> : run<false>)(scores, route.samples, stream);
}

// Of one query per sample and key.
void score_keys(const Route& route, const Stream& stream) {
    const int64_t pairs = route.samples * route.count;
    const TypedAddress hidden = {route.workspace, DType::float32};
    float* query = route.workspace + pairs * route.hidden;
    Product down = product_of(route.down, route.pooled, route.workspace,
                              route.count * route.hidden, route.width);
    down.silu = true;
    run(down, route.samples, stream);
    Product up = product_of(route.up, hidden, query, route.count * route.key_width, route.hidden);
    up.vectors = static_cast<int>(route.count);
    up.rows_per_vector = static_cast<int>(route.key_width);
    up.silu = true;
    up.follows = route.hidden > 0;
    run(up, route.samples, stream);
    Product scores = scores_of(route);
    scores.vector = any({query, DType::float32}, route.key_width);
    scores.vectors = static_cast<int>(route.count);
    scores.rows_per_vector = 1;
    scores.follows = route.key_width > 0;
    (route.cosine ? run<true> : run<false>)(scores, route.samples, stream);
}

}  // namespace

void route(const Route& route, const Stream& stream) {
    if (route.samples == 0 || route.count == 0) return;
    (route.of_keys ? score_keys : score)(route, stream);
    if (route.weights == nullptr) return;
    launch<choose>("router choose", route.samples, kThreads, sizeof(ChoiceShared), stream,
                   Choice{route.scores, route.weights, route.count, route.top_k, route.threshold,
                          route.gate, route.scales});
}

}  // namespace sapt_fast
