#include "cpu/own_lora.h"

#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/dots.h"
#include "cpu/vec.h"

namespace sapt_fast {
namespace {

// columns [rank] of the outputs [start, start + kLanes) of b [outputs, rank]
template <class T, class L>
inline void load_columns(vec_t<acc_t<T>>* columns, const L* b, int64_t rank, int64_t start) {
    typedef acc_t<T> A;
    int64_t j = 0;
    if constexpr (std::is_same_v<L, float> && kTransposes) {
        for (; j + 4 <= rank; j += 4) load_transposed(columns + j, b + start * rank + j, rank);
    }
    for (; j < rank; ++j) {
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            columns[j][lane] = static_cast<A>(to_acc(b[(start + lane) * rank + j]));
        }
    }
}

// y [ROWS, kLanes] += h [ROWS, rank] . columns [rank]
template <int ROWS, class T>
inline __attribute__((always_inline)) void add_tile(T* y, int64_t y_stride, const acc_t<T>* h,
                                                    const vec_t<acc_t<T>>* columns, int64_t rank) {
    vec_t<acc_t<T>> sum[ROWS] = {};
    for (int64_t j = 0; j < rank; ++j) {
        for (int r = 0; r < ROWS; ++r) sum[r] += broadcast(h[r * rank + j]) * columns[j];
    }
    for (int r = 0; r < ROWS; ++r) store(y + r * y_stride, load(y + r * y_stride) + sum[r]);
}

// y [rows, outputs] += h [rows, rank] . b [outputs, rank]^T
template <class T, class L>
void add_outputs(T* y, const acc_t<T>* h, int64_t rows, const L* b, int64_t rank,
                 int64_t outputs) {
    typedef acc_t<T> A;
    int64_t o = 0;
    for (; o + kLanes<T> <= outputs; o += kLanes<T>) {
        vec_t<A> columns[kMostOwnRanks];
        load_columns<T>(columns, b, rank, o);
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) {
            add_tile<4>(y + r * outputs + o, outputs, h + r * rank, columns, rank);
        }
        for (; r < rows; ++r) {
            add_tile<1>(y + r * outputs + o, outputs, h + r * rank, columns, rank);
        }
    }
    for (; o < outputs; ++o) {
        for (int64_t r = 0; r < rows; ++r) {
            A sum = to_acc(y[r * outputs + o]);
            for (int64_t j = 0; j < rank; ++j) {
                sum += h[r * rank + j] * static_cast<A>(to_acc(b[o * rank + j]));
            }
            y[r * outputs + o] = from_acc<T>(sum);
        }
    }
}

template <class T, class L>
void add_block(const OwnLora& args, const OwnRows& rows) {
    typedef acc_t<T> A;
    const OwnAdapter& adapter = args.adapters[rows.adapter];
    const int64_t rank = adapter.rank;
    A h[kOwnRows * kMostOwnRanks];
    const T* x = static_cast<const T*>(args.x) + rows.first * args.inputs;
    multiply_transposed(h, rank, x, rows.count, static_cast<const L*>(adapter.a), rank,
                        args.inputs);
    for (int64_t i = 0; i < rows.count * rank; ++i) h[i] *= static_cast<A>(adapter.scale);
    add_outputs(static_cast<T*>(args.y) + rows.first * args.outputs, h, rows.count,
                static_cast<const L*>(adapter.b), rank, args.outputs);
}

template <class T, class L>
void add(const OwnLora& args, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < args.block_count; ++block) {
        add_block<T, L>(args, args.blocks[block]);
    }
}

void add_any(const OwnLora& args, int threads) {
    by_dtypes(args.dtype, args.lora_dtype, [&](auto type, auto lora_type) {
        typedef typename decltype(type)::type T;
        add<T, typename decltype(lora_type)::type>(args, threads);
    });
}

}  // namespace

namespace SAPT_FAST_CAPABILITY {
extern const OwnLoraKernels own_lora_kernels = {add_any};
}

}  // namespace sapt_fast
