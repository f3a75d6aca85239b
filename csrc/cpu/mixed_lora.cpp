#include "cpu/mixed_lora.h"

#include <cmath>
#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/counts.h"
#include "cpu/dots.h"
#include "cpu/lanes.h"
#include "cpu/outer.h"
#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int kRankBlock = 512;  // ranks whose weights are held on the stack

// A weight of exactly 0 leaves nothing, not even of an infinity or a NaN.
template <class A>
inline A weighted(A value, A by) {
    return by == 0 ? A(0) : value * by;
}

// `weighted` for a sum that leaves out what has no weight: that is +0, a product of 0 is -0.
template <class A>
inline A coefficient(A value, A by) {
    const A product = weighted(value, by);
    return product == 0 && by != 0 ? -A(0) : product;
}

template <class A>
inline bool is_absent(A value) {
    return value == 0 && !std::signbit(value);
}

template <class A>
inline vec_t<A> weighted_lanes(vec_t<A> value, vec_t<A> by) {
    return by == vec_t<A>{} ? vec_t<A>{} : value * by;
}

template <class A>
void fill_weights(A* out, const RankWeights& weights, int64_t sample, int64_t start, int64_t stop) {
    const A* mixture = static_cast<const A*>(weights.mixture) + sample * weights.adapters;
    const A* scale = static_cast<const A*>(weights.row_scale);
    for (int64_t j = start; j < stop; ++j) {
        out[j - start] = weighted(scale[j], mixture[weights.row_adapter[j]]);
    }
}

template <class T>
inline void multiply_row(T* out, const T* in, const acc_t<T>* by, int64_t count) {
    typedef acc_t<T> A;
    int64_t j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) {
        store(out + j, weighted_lanes<A>(load(in + j), load(by + j)));
    }
    for (; j < count; ++j) out[j] = from_acc<T>(weighted<A>(to_acc(in[j]), by[j]));
}

template <class T>
void weight_ranks(T* out, const T* h, const RankWeights& weights, int threads) {
    const int64_t rows = weights.rows / weights.samples;
    const int64_t ranks = weights.ranks;
    const int64_t chunks = chunks_per_sample(weights);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < weights.samples * chunks; ++task) {
        const int64_t sample = task / chunks;
        const int64_t first = task % chunks * kChunkRows;
        const int64_t last = smaller(first + kChunkRows, rows);
        for (int64_t start = 0; start < ranks; start += kRankBlock) {
            const int64_t stop = smaller(start + kRankBlock, ranks);
            acc_t<T> by[kRankBlock];
            fill_weights(by, weights, sample, start, stop);
            for (int64_t row = first; row < last; ++row) {
                const int64_t at = (sample * rows + row) * ranks + start;
                multiply_row(out + at, h + at, by, stop - start);
            }
        }
    }
}

// sum += g * h and g *= by, in one pass over one row.
template <class T>
inline void backward_row(T* g, const T* h, const acc_t<T>* by, acc_t<T>* sum, int64_t count) {
    int64_t j = 0;
    for (; j + kLanes<T> <= count; j += kLanes<T>) {
        const vec_t<acc_t<T>> value = load(g + j);
        store(sum + j, load(sum + j) + value * load(h + j));
        store(g + j, weighted_lanes<acc_t<T>>(value, load(by + j)));
    }
    for (; j < count; ++j) {
        const acc_t<T> value = to_acc(g[j]);
        sum[j] += value * to_acc(h[j]);
        g[j] = from_acc<T>(weighted(value, by[j]));
    }
}

// Those columns of [start, stop) that the ranges name, one after the other; multiplied if `by`.
template <class T>
void pack(T* to, const T* from, const acc_t<T>* by, const RankBackward& args, int64_t start,
          int64_t stop) {
    int64_t offset = 0;
    for (int64_t i = 0; i < args.range_count; ++i) {
        const int64_t low = args.ranges[2 * i];
        const int64_t high = args.ranges[2 * i + 1];
        const int64_t first = low > start ? low : start;
        const int64_t last = smaller(high, stop);
        T* out = to + offset + first - low;
        if (first < last && by != nullptr) {
            multiply_row(out, from + first, by + first - start, last - first);
        } else if (first < last) {
            memcpy(out, from + first, sizeof(T) * (last - first));
        }
        offset += high - low;
    }
}

template <class A>
void add_to_adapters(A* d_mixture, const A* sum, const RankWeights& weights, int64_t start,
                     int64_t stop) {
    const A* scale = static_cast<const A*>(weights.row_scale);
    for (int64_t j = start; j < stop; ++j) {
        d_mixture[weights.row_adapter[j]] += weighted(sum[j - start], scale[j]);
    }
}

// Of an adapter without weight, a gradient that is not finite is 0.
template <class A>
void drop_undefined(A* d_mixture, const RankWeights& weights, int64_t sample) {
    const A* mixture = static_cast<const A*>(weights.mixture) + sample * weights.adapters;
    A* row = d_mixture + sample * weights.adapters;
    for (int64_t k = 0; k < weights.adapters; ++k) {
        const bool finite = row[k] - row[k] == 0;
        if (mixture[k] == 0 && !finite) row[k] = 0;
    }
}

template <class T>
void weight_ranks_backward(const RankBackward& args, const RankWeights& weights, int threads) {
    typedef acc_t<T> A;
    const int64_t rows = weights.rows / weights.samples;
    const int64_t ranks = weights.ranks;
    const int64_t chunks = chunks_per_sample(weights);
    A* d_mixture = static_cast<A*>(args.d_mixture);
    A* partial = static_cast<A*>(args.partial);
    int64_t packed = 0;
    for (int64_t i = 0; i < args.range_count; ++i) {
        packed += args.ranges[2 * i + 1] - args.ranges[2 * i];
    }
    if (d_mixture != nullptr) {
        memset(d_mixture, 0, sizeof(A) * weights.samples * weights.adapters);
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < weights.samples * chunks; ++task) {
        const int64_t sample = task / chunks;
        const int64_t first = sample * rows + task % chunks * kChunkRows;
        const int64_t last = smaller(first + kChunkRows, (sample + 1) * rows);
        for (int64_t start = 0; start < ranks; start += kRankBlock) {
            const int64_t stop = smaller(start + kRankBlock, ranks);
            A by[kRankBlock];
            A sum[kRankBlock] = {};
            fill_weights(by, weights, sample, start, stop);
            for (int64_t row = first; row < last; ++row) {
                const T* h = static_cast<const T*>(args.h) + row * ranks;
                T* g = static_cast<T*>(args.g) + row * ranks;
                backward_row(g + start, h + start, by, sum, stop - start);
                if (args.packed_g != nullptr) {
                    T* to = static_cast<T*>(args.packed_g) + row * packed;
                    pack<T>(to, g, nullptr, args, start, stop);
                }
                if (args.packed_h != nullptr) {
                    T* to = static_cast<T*>(args.packed_h) + row * packed;
                    pack<T>(to, h, by, args, start, stop);
                }
            }
            if (partial != nullptr) {
                memcpy(partial + task * ranks + start, sum, sizeof(A) * (stop - start));
            } else if (d_mixture != nullptr) {
                add_to_adapters(d_mixture + sample * weights.adapters, sum, weights, start, stop);
            }
        }
        if (partial == nullptr && d_mixture != nullptr) drop_undefined(d_mixture, weights, sample);
    }
    if (d_mixture == nullptr || partial == nullptr) return;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t sample = 0; sample < weights.samples; ++sample) {
        A* total = partial + sample * chunks * ranks;
        for (int64_t chunk = 1; chunk < chunks; ++chunk) {
            for (int64_t j = 0; j < ranks; ++j) total[j] += total[chunk * ranks + j];
        }
        add_to_adapters(d_mixture + sample * weights.adapters, total, weights, 0, ranks);
        drop_undefined(d_mixture, weights, sample);
    }
}

// tile [ROWS, VECS vectors] += hw [ROWS, ranks] . b [ranks, ...]; SKIPS leaves out what is absent
template <int ROWS, int VECS, bool SKIPS, class A, class L>
inline __attribute__((always_inline)) void expand(A* tile, int64_t tile_stride, const A* hw,
                                                  int64_t ranks, const L* b, int64_t b_stride) {
    constexpr int kStep = kLanes<A>;
    vec_t<A> sum[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECS; ++v) sum[r][v] = load(tile + r * tile_stride + v * kStep);
    }
    for (int64_t j = 0; j < ranks; ++j) {
        vec_t<A> column[VECS];
        for (int v = 0; v < VECS; ++v) column[v] = load(b + j * b_stride + v * kStep);
        for (int r = 0; r < ROWS; ++r) {
            if (SKIPS && is_absent(hw[r * ranks + j])) continue;
            const vec_t<A> by = broadcast(hw[r * ranks + j]);
            for (int v = 0; v < VECS; ++v) sum[r][v] += by * column[v];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECS; ++v) store(tile + r * tile_stride + v * kStep, sum[r][v]);
    }
}

template <int ROWS, bool SKIPS, class A, class L>
void expand_rows(A* tile, int64_t tile_stride, const A* hw, int64_t ranks, const L* b,
                 int64_t b_stride, int64_t columns) {
    constexpr int kStep = kLanes<A>;
    int64_t c = 0;
    for (; c + 4 * kStep <= columns; c += 4 * kStep) {
        expand<ROWS, 4, SKIPS>(tile + c, tile_stride, hw, ranks, b + c, b_stride);
    }
    for (; c + kStep <= columns; c += kStep) {
        expand<ROWS, 1, SKIPS>(tile + c, tile_stride, hw, ranks, b + c, b_stride);
    }
    for (; c < columns; ++c) {
        for (int r = 0; r < ROWS; ++r) {
            A sum = tile[r * tile_stride + c];
            for (int64_t j = 0; j < ranks; ++j) {
                if (SKIPS && is_absent(hw[r * ranks + j])) continue;
                sum += hw[r * ranks + j] * static_cast<A>(to_acc(b[j * b_stride + c]));
            }
            tile[r * tile_stride + c] = sum;
        }
    }
}

// tile [rows, TILE] += hw [rows, ranks] . b [ranks, ...], rows in blocks that share a read of b.
template <int64_t TILE, bool SKIPS, class A, class L>
void expand_blocks(A* tile, int64_t rows, const A* hw, int64_t ranks, const L* b, int64_t b_stride,
                   int64_t columns) {
    for (int64_t r = 0; r < rows; r += kRowBlock, tile += kRowBlock * TILE, hw += kRowBlock * ranks) {
        switch (smaller(rows - r, kRowBlock)) {
            case 4:
                expand_rows<4, SKIPS>(tile, TILE, hw, ranks, b, b_stride, columns);
                break;
            case 3:
                expand_rows<3, SKIPS>(tile, TILE, hw, ranks, b, b_stride, columns);
                break;
            case 2:
                expand_rows<2, SKIPS>(tile, TILE, hw, ranks, b, b_stride, columns);
                break;
            default:
                expand_rows<1, SKIPS>(tile, TILE, hw, ranks, b, b_stride, columns);
        }
    }
}

// x [rows, inputs] . the weight's rows [start, stop), into tile.
template <int64_t TILE, class T>
void base_tile(acc_t<T>* tile, const Decode& args, int64_t row, int64_t rows, int64_t start,
               int64_t stop) {
    const T* weight = static_cast<const T*>(args.weight) + start * args.inputs;
    if constexpr (std::is_same_v<T, float>) {
        if (args.packed != nullptr) {
            return multiply_lanes(tile, TILE, static_cast<const float*>(args.packed), rows, weight,
                                  stop - start, args.inputs);
        }
    }
    multiply_transposed(tile, TILE, static_cast<const T*>(args.x) + row * args.inputs, rows, weight,
                        stop - start, args.inputs);
}

// The outputs [start, stop), at most TILE of them, of kLaneRows rows or fewer.
template <int64_t TILE, class T, class L>
void decode_tile(const Decode& args, const RankWeights& weights, int64_t row, int64_t rows,
                 int64_t start, int64_t stop) {
    typedef acc_t<T> A;
    const int64_t columns = stop - start;
    T* y = static_cast<T*>(args.y) + row * args.outputs + start;
    A tile[kLaneRows * TILE] = {};
    if (args.weight != nullptr) base_tile<TILE, T>(tile, args, row, rows, start, stop);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
            A& value = tile[r * TILE + c];
            if (args.bias != nullptr) value += to_acc(static_cast<const T*>(args.bias)[start + c]);
            if (args.accumulate) value += to_acc(y[r * args.outputs + c]);
        }
    }
    const A* hw = static_cast<const A*>(args.hw) + row * weights.ranks;
    const L* b = static_cast<const L*>(args.lora_b) + start;
    const auto expand_all = args.skips ? expand_blocks<TILE, true, A, L>
                                       : expand_blocks<TILE, false, A, L>;
    expand_all(tile, rows, hw, weights.ranks, b, args.outputs, columns);
    for (int64_t r = 0; r < rows; ++r) {
        T* to = y + r * args.outputs;
        int64_t c = 0;
        for (; c + kLanes<T> <= columns; c += kLanes<T>) store(to + c, load(tile + r * TILE + c));
        for (; c < columns; ++c) to[c] = from_acc<T>(tile[r * TILE + c]);
    }
}

// The ranks [start, stop): h, and h times the weights into the scratch.
template <class T, class L>
void decode_ranks(const Decode& args, const RankWeights& weights, int64_t start, int64_t stop) {
    typedef acc_t<T> A;
    const int64_t ranks = weights.ranks;
    const int64_t rows_per_sample = weights.rows / weights.samples;
    A* hw = static_cast<A*>(args.hw) + start;
    T* h = args.h == nullptr ? nullptr : static_cast<T*>(args.h) + start;
    multiply_transposed(hw, ranks, static_cast<const T*>(args.x), weights.rows,
                        static_cast<const L*>(args.lora_a) + start * args.inputs, stop - start,
                        args.inputs);
    const A* scale = static_cast<const A*>(weights.row_scale);
    for (int64_t row = 0; row < weights.rows; ++row) {
        const A* mixture = static_cast<const A*>(weights.mixture) +
                           row / rows_per_sample * weights.adapters;
        for (int64_t j = start; j < stop; ++j) {
            A& value = hw[row * ranks + j - start];
            if (h != nullptr) h[row * ranks + j - start] = from_acc<T>(value);
            value = coefficient(value, weighted(scale[j], mixture[weights.row_adapter[j]]));
        }
    }
}

template <class T, class L>
void decode(const Decode& args, const RankWeights& weights, int threads) {
    constexpr int64_t kTile = 4 * kLanes<T>;
    constexpr int64_t kRanks = 4;
    constexpr int64_t kPacked = 64;
    const int64_t rank_tasks = parts(weights.ranks, kRanks);
    const int64_t tiles = parts(args.outputs, kTile);
    const int64_t pack_tasks = args.packed == nullptr ? 0 : parts(args.inputs, kPacked);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < pack_tasks; ++task) {
            pack_lanes(static_cast<float*>(args.packed), static_cast<const float*>(args.x),
                       weights.rows, args.inputs, task * kPacked,
                       smaller((task + 1) * kPacked, args.inputs));
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < rank_tasks; ++task) {
            decode_ranks<T, L>(args, weights, task * kRanks,
                               smaller((task + 1) * kRanks, weights.ranks));
        }
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; ++tile) {
            for (int64_t row = 0; row < weights.rows; row += kLaneRows) {
                decode_tile<kTile, T, L>(args, weights, row,
                                         smaller(weights.rows - row, kLaneRows), tile * kTile,
                                         smaller((tile + 1) * kTile, args.outputs));
            }
        }
    }
}

constexpr int64_t kGradRows = 64;  // of a block, whose x stays in the second cache

template <class T, class L>
void factor_grad(const FactorGrad& args, int threads) {
    typedef acc_t<T> A;
    // Each sum is made by one thread in the order of the rows: results repeat with any number.
    const int64_t share = parts(args.columns, threads);
    const int64_t block = share >= kGradColumns ? kGradColumns : parts(share, 64) * 64;
    const int64_t blocks = parts(args.columns, block);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < blocks; ++task) {
        const int64_t start = task * block;
        const int64_t columns = smaller(block, args.columns - start);
        A sum[kFewRanks * kGradColumns] = {};
        for (int64_t row = 0; row < args.rows; row += kGradRows) {
            const int64_t rows = smaller(kGradRows, args.rows - row);
            const T* x = static_cast<const T*>(args.x) + row * args.columns + start;
            const T* g = static_cast<const T*>(args.g) + row * args.ranks;
            int64_t j = 0;
            for (; j + 4 <= args.ranks; j += 4) {
                add_outers<4>(sum + j * kGradColumns, g + j, args.ranks, x, args.columns, rows,
                              columns);
            }
            for (; j < args.ranks; ++j) {
                add_outers<1>(sum + j * kGradColumns, g + j, args.ranks, x, args.columns, rows,
                              columns);
            }
        }
        for (int64_t j = 0; j < args.ranks; ++j) {
            L* out = static_cast<L*>(args.out) + j * args.columns + start;
            for (int64_t c = 0; c < columns; ++c) out[c] = from_acc<L>(sum[j * kGradColumns + c]);
        }
    }
}

void weight_ranks_any(DType dtype, void* out, const void* h, const RankWeights& weights,
                      int threads) {
    by_dtype(dtype, [&](auto type) {
        typedef typename decltype(type)::type T;
        weight_ranks(static_cast<T*>(out), static_cast<const T*>(h), weights, threads);
    });
}

void weight_ranks_backward_any(DType dtype, const RankBackward& args, const RankWeights& weights,
                               int threads) {
    by_dtype(dtype, [&](auto type) {
        weight_ranks_backward<typename decltype(type)::type>(args, weights, threads);
    });
}

void decode_any(const Decode& args, const RankWeights& weights, int threads) {
    by_dtypes(args.dtype, args.lora_dtype, [&](auto type, auto lora_type) {
        typedef typename decltype(type)::type T;
        decode<T, typename decltype(lora_type)::type>(args, weights, threads);
    });
}

void factor_grad_any(const FactorGrad& args, int threads) {
    by_dtypes(args.dtype, args.factor_dtype, [&](auto type, auto factor_type) {
        typedef typename decltype(type)::type T;
        factor_grad<T, typename decltype(factor_type)::type>(args, threads);
    });
}

}  // namespace

namespace SAPT_FAST_CAPABILITY {
extern const MixedLoraKernels mixed_lora_kernels = {weight_ranks_any, weight_ranks_backward_any,
                                                    decode_any, factor_grad_any};
}

}  // namespace sapt_fast
