#include "cpu/pool_tokens.h"

#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/columns.h"
#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int64_t kTokensAhead = 4;  // whose embeddings are being fetched

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
    for_columns<T>(
        args.samples, args.width, threads,
        [&](int64_t sample, int64_t start, auto vectors) {
            pool_block<vectors(), WINNER, T>(args, sample, start);
        },
        [&](int64_t sample, int64_t column) { pool_column<WINNER, T>(args, sample, column); });
}

void pool_max_any(const PoolTokens& args, int threads) {
    by_dtype(args.dtype, [&](auto type) {
        typedef typename decltype(type)::type T;
        if (args.winner != nullptr) return pool<true, T>(args, threads);
        pool<false, T>(args, threads);
    });
}

}  // namespace

namespace SAPT_FAST_CAPABILITY {
extern const PoolTokensKernels pool_tokens_kernels = {pool_max_any};
}

}  // namespace sapt_fast
