#include "cpu/pool_tokens.h"

#include <type_traits>

#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int kVectors = 8;          // of a block of columns, kept in registers
constexpr int64_t kTokensAhead = 4;  // whose embeddings are being fetched

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether a value takes the place of the best so far: a NaN does, and nothing takes its place.
template <class V>
inline __attribute__((always_inline)) auto exceeds(V value, V best) {
    return (!(value <= best)) & (best == best);
}

// Columns [start, start + VECTORS vectors) of one sample.
template <int VECTORS, bool WINNER, class T>
void pool_block(const PoolTokens& args, int64_t sample, int64_t start) {
    typedef acc_t<T> A;
    typedef typename std::conditional<sizeof(A) == 4, int32_t, int64_t>::type Index;
    typedef Index index_vec __attribute__((vector_size(kVectorBytes)));
    const int64_t* ids = args.ids + sample * args.tokens;
    const uint8_t* mask = args.mask == nullptr ? nullptr : args.mask + sample * args.tokens;
    const T* table = static_cast<const T*>(args.table) + start;
    vec_t<A> best[VECTORS];
    index_vec winner[VECTORS];
    bool any = false;
    for (int64_t t = 0; t < args.tokens; ++t) {
        const int64_t next = t + kTokensAhead;
        if (next < args.tokens && (mask == nullptr || mask[next])) {
            const char* row = reinterpret_cast<const char*>(table + ids[next] * args.row_stride);
            constexpr int64_t kBytes = VECTORS * kLanes<T> * static_cast<int64_t>(sizeof(T));
            for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(row + i);
        }
        if (mask != nullptr && !mask[t]) continue;
        const T* row = table + ids[t] * args.row_stride;
        const index_vec id = index_vec{} + static_cast<Index>(ids[t]);
        for (int v = 0; v < VECTORS; ++v) {
            const vec_t<A> value = load(row + v * kLanes<T>);
            if (!any) {
                best[v] = value;
                if (WINNER) winner[v] = id;
                continue;
            }
            const index_vec better = exceeds(value, best[v]);
            best[v] = better ? value : best[v];
            if (WINNER) winner[v] = better ? id : winner[v];
        }
        any = true;
    }
    T* pooled = static_cast<T*>(args.pooled) + sample * args.width + start;
    int32_t* winners = WINNER ? args.winner + sample * args.width + start : nullptr;
    for (int v = 0; v < VECTORS; ++v) {
        store(pooled + v * kLanes<T>, any ? best[v] : vec_t<A>{});
        for (int i = 0; WINNER && i < kLanes<T>; ++i) {
            winners[v * kLanes<T> + i] = any ? static_cast<int32_t>(winner[v][i]) : -1;
        }
    }
}

template <bool WINNER, class T>
void pool_column(const PoolTokens& args, int64_t sample, int64_t column) {
    typedef acc_t<T> A;
    A best = 0;
    int32_t winner = -1;
    bool any = false;
    for (int64_t t = 0; t < args.tokens; ++t) {
        const int64_t at = sample * args.tokens + t;
        if (args.mask != nullptr && !args.mask[at]) continue;
        const int64_t id = args.ids[at];
        const A value = to_acc(static_cast<const T*>(args.table)[id * args.row_stride + column]);
        if (!any || exceeds(value, best)) {
            best = value;
            winner = static_cast<int32_t>(id);
        }
        any = true;
    }
    static_cast<T*>(args.pooled)[sample * args.width + column] = from_acc<T>(best);
    if (WINNER) args.winner[sample * args.width + column] = winner;
}

template <bool WINNER, class T>
void pool(const PoolTokens& args, int threads) {
    constexpr int64_t kBlock = kVectors * kLanes<T>;
    const int64_t blocks = (args.width + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < args.samples * blocks; ++task) {
        const int64_t sample = task / blocks;
        int64_t start = task % blocks * kBlock;
        const int64_t stop = smaller(start + kBlock, args.width);
        if (stop - start == kBlock) {
            pool_block<kVectors, WINNER, T>(args, sample, start);
            continue;
        }
        for (; start + kLanes<T> <= stop; start += kLanes<T>) {
            pool_block<1, WINNER, T>(args, sample, start);
        }
        for (; start < stop; ++start) pool_column<WINNER, T>(args, sample, start);
    }
}

template <class T>
void pool_max(const PoolTokens& args, int threads) {
    if (args.winner != nullptr) return pool<true, T>(args, threads);
    pool<false, T>(args, threads);
}

void pool_max_any(const PoolTokens& args, int threads) {
    switch (args.dtype) {
        case DType::float32:
            return pool_max<float>(args, threads);
        case DType::bfloat16:
            return pool_max<BFloat16>(args, threads);
        case DType::float16:
            return pool_max<Float16>(args, threads);
        case DType::float64:
            return pool_max<double>(args, threads);
    }
}

}  // namespace

namespace SAPT_FAST_CAPABILITY {
extern const PoolTokensKernels pool_tokens_kernels = {pool_max_any};
}

}  // namespace sapt_fast
