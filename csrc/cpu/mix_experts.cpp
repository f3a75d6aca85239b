#include "cpu/mix_experts.h"

#include "cpu/by_dtype.h"
#include "cpu/columns.h"
#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int64_t kAheadBytes = 4096;  // of the next expert, whose place no prefetcher can guess

// The chosen expert, or null.
template <class L>
inline const L* expert(const ChosenExperts& chosen, int64_t pair) {
    const int64_t n = chosen.index[pair];
    if (n < 0 || n >= chosen.experts) return nullptr;
    return static_cast<const L*>(chosen.bank) + n * chosen.expert_stride;
}

inline void prefetch(const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

template <int ROWS, class T, class L>
inline __attribute__((always_inline)) void dot_rows(acc_t<T>* out, const T* value, const L* rows,
                                                    int64_t width) {
    typedef acc_t<T> A;
    vec_t<A> sum[ROWS] = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= width; i += kLanes<T>) {
        const vec_t<A> column = load(value + i);
        for (int r = 0; r < ROWS; ++r) sum[r] += column * load(rows + r * width + i);
    }
    for (int r = 0; r < ROWS; ++r) {
        A total = sum_of<A>(sum[r]);
        for (int64_t c = i; c < width; ++c) total += to_acc(value[c]) * to_acc(rows[r * width + c]);
        out[r] = total;
    }
}

template <class T, class L>
void dot(const ChosenExperts& chosen, void* out, const void* values, int threads) {
    typedef acc_t<T> A;
    const int64_t pairs = chosen.rows * chosen.k;
    const int64_t size = chosen.rank * chosen.width;
    const int64_t ahead = smaller(size * static_cast<int64_t>(sizeof(L)), kAheadBytes);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
        A* to = static_cast<A*>(out) + pair * chosen.rank;
        const L* rows = expert<L>(chosen, pair);
        const L* next = pair + 1 < pairs ? expert<L>(chosen, pair + 1) : nullptr;
        if (next != nullptr) prefetch(next, ahead);
        const T* value = static_cast<const T*>(values) + pair / chosen.k * chosen.width;
        int64_t r = 0;
        for (; rows != nullptr && r + 4 <= chosen.rank; r += 4) {
            dot_rows<4>(to + r, value, rows + r * chosen.width, chosen.width);
        }
        for (; rows != nullptr && r < chosen.rank; ++r) {
            dot_rows<1>(to + r, value, rows + r * chosen.width, chosen.width);
        }
        for (; r < chosen.rank; ++r) to[r] = 0;
    }
}

// Columns [start, start + VECTORS vectors) of one row of the result.
template <int VECTORS, class T, class L>
inline void sum_block(const ChosenExperts& chosen, T* out, const acc_t<T>* by, int64_t row,
                      int64_t start) {
    typedef acc_t<T> A;
    vec_t<A> sum[VECTORS] = {};
    for (int64_t j = 0; j < chosen.k; ++j) {
        const L* rows = expert<L>(chosen, row * chosen.k + j);
        const L* next = j + 1 < chosen.k ? expert<L>(chosen, row * chosen.k + j + 1) : nullptr;
        constexpr int64_t kBytes = VECTORS * kLanes<T> * static_cast<int64_t>(sizeof(L));
        if (next != nullptr) prefetch(next + start, kBytes);
        for (int64_t r = 0; rows != nullptr && r < chosen.rank; ++r) {
            const vec_t<A> weight = broadcast(by[j * chosen.rank + r]);
            const L* from = rows + r * chosen.width + start;
            for (int v = 0; v < VECTORS; ++v) sum[v] += weight * load(from + v * kLanes<T>);
        }
    }
    for (int v = 0; v < VECTORS; ++v) store(out + start + v * kLanes<T>, sum[v]);
}

template <class T, class L>
inline void sum_column(const ChosenExperts& chosen, T* out, const acc_t<T>* by, int64_t row,
                       int64_t column) {
    acc_t<T> sum = 0;
    for (int64_t j = 0; j < chosen.k; ++j) {
        const L* rows = expert<L>(chosen, row * chosen.k + j);
        for (int64_t r = 0; rows != nullptr && r < chosen.rank; ++r) {
            sum += by[j * chosen.rank + r] * to_acc(rows[r * chosen.width + column]);
        }
    }
    out[column] = from_acc<T>(sum);
}

template <class T, class L>
void sum(const ChosenExperts& chosen, void* out, const void* coefficients, int threads) {
    const auto by = [&](int64_t row) {
        return static_cast<const acc_t<T>*>(coefficients) + row * chosen.k * chosen.rank;
    };
    const auto to = [&](int64_t row) { return static_cast<T*>(out) + row * chosen.width; };
    for_columns<T>(
        chosen.rows, chosen.width, threads,
        [&](int64_t row, int64_t start, auto vectors) {
            sum_block<vectors(), T, L>(chosen, to(row), by(row), row, start);
        },
        [&](int64_t row, int64_t column) {
            sum_column<T, L>(chosen, to(row), by(row), row, column);
        });
}

// Columns [start, stop) of rank r of a gradient: the sum over the pairs [first, last).
template <class T, class L>
void grad_block(const ExpertGrad& args, L* out, int64_t r, int64_t first, int64_t last,
                int64_t start, int64_t stop) {
    typedef acc_t<T> A;
    const A* by = static_cast<const A*>(args.coefficients) + r;
    const T* values = static_cast<const T*>(args.values);
    int64_t c = start;
    for (; c + 4 * kLanes<T> <= stop; c += 4 * kLanes<T>) {
        vec_t<A> sum[4] = {};
        for (int64_t p = first; p < last; ++p) {
            const vec_t<A> weight = broadcast(by[args.order[p] * args.rank]);
            const T* from = values + args.order[p] / args.k * args.width + c;
            for (int v = 0; v < 4; ++v) sum[v] += weight * load(from + v * kLanes<T>);
        }
        for (int v = 0; v < 4; ++v) store(out + c + v * kLanes<T>, sum[v]);
    }
    for (; c < stop; ++c) {
        A sum = 0;
        for (int64_t p = first; p < last; ++p) {
            const T* from = values + args.order[p] / args.k * args.width;
            sum += by[args.order[p] * args.rank] * to_acc(from[c]);
        }
        out[c] = from_acc<L>(sum);
    }
}

template <class T, class L>
void grad(const ExpertGrad& args, int threads) {
    constexpr int64_t kBlock = 256;
    const int64_t blocks = parts(args.width, kBlock);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t task = 0; task < args.pairs * blocks; ++task) {
        const int64_t first = task / blocks;
        const int64_t target = args.target[first];
        // The first pair of a target stands for all of them.
        const bool counted = first > 0 && args.target[first - 1] == target;
        if (target < 0 || target >= args.out_rows || counted) continue;
        int64_t last = first + 1;
        while (last < args.pairs && args.target[last] == target) ++last;
        const int64_t start = task % blocks * kBlock;
        L* out = static_cast<L*>(args.out) + target * args.rank * args.width;
        for (int64_t r = 0; r < args.rank; ++r) {
            grad_block<T, L>(args, out + r * args.width, r, first, last, start,
                             smaller(start + kBlock, args.width));
        }
    }
}

void dot_any(const ChosenExperts& chosen, void* out, const void* values, int threads) {
    by_dtypes(chosen.dtype, chosen.bank_dtype, [&](auto type, auto bank_type) {
        typedef typename decltype(type)::type T;
        dot<T, typename decltype(bank_type)::type>(chosen, out, values, threads);
    });
}

void sum_any(const ChosenExperts& chosen, void* out, const void* coefficients, int threads) {
    by_dtypes(chosen.dtype, chosen.bank_dtype, [&](auto type, auto bank_type) {
        typedef typename decltype(type)::type T;
        sum<T, typename decltype(bank_type)::type>(chosen, out, coefficients, threads);
    });
}

void grad_any(const ExpertGrad& args, int threads) {
    by_dtypes(args.dtype, args.bank_dtype, [&](auto type, auto bank_type) {
        typedef typename decltype(type)::type T;
        grad<T, typename decltype(bank_type)::type>(args, threads);
    });
}

}  // namespace

namespace SAPT_FAST_CAPABILITY {
extern const MixExpertsKernels mix_experts_kernels = {dot_any, sum_any, grad_any};
}

}  // namespace sapt_fast
