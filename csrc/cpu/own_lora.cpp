#include "cpu/own_lora.h"

#include "cpu/dots.h"
#include "cpu/vec.h"

namespace sapt_fast {
namespace {

// The outputs [start, start + kLanes) of b: one vector per rank.
template <class T, class L>
inline vec_t<acc_t<T>> column_of(const L* b, int64_t rank, int64_t start, int64_t j) {
    vec_t<acc_t<T>> column;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        column[lane] = static_cast<acc_t<T>>(to_acc(b[(start + lane) * rank + j]));
    }
    return column;
}

// y [rows, outputs] += h [rows, rank] . b [outputs, rank]^T
template <int ROWS, class T, class L>
void add_outputs(T* y, const acc_t<T>* h, const L* b, int64_t rank, int64_t outputs) {
    typedef acc_t<T> A;
    int64_t o = 0;
    for (; o + kLanes<T> <= outputs; o += kLanes<T>) {
        vec_t<A> sum[ROWS] = {};
        for (int64_t j = 0; j < rank; ++j) {
            const vec_t<A> column = column_of<T>(b, rank, o, j);
            for (int r = 0; r < ROWS; ++r) sum[r] += broadcast(h[r * rank + j]) * column;
        }
        for (int r = 0; r < ROWS; ++r) {
            T* to = y + r * outputs + o;
            store(to, load(to) + sum[r]);
        }
    }
    for (; o < outputs; ++o) {
        for (int r = 0; r < ROWS; ++r) {
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
    T* y = static_cast<T*>(args.y) + rows.first * args.outputs;
    const L* b = static_cast<const L*>(adapter.b);
    switch (rows.count) {
        case 4:
            return add_outputs<4>(y, h, b, rank, args.outputs);
        case 3:
            return add_outputs<3>(y, h, b, rank, args.outputs);
        case 2:
            return add_outputs<2>(y, h, b, rank, args.outputs);
        default:
            return add_outputs<1>(y, h, b, rank, args.outputs);
    }
}

template <class T, class L>
void add(const OwnLora& args, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < args.block_count; ++block) {
        add_block<T, L>(args, args.blocks[block]);
    }
}

void add_any(const OwnLora& args, int threads) {
    const bool same = args.lora_dtype == args.dtype;
    switch (args.dtype) {
        case DType::float32:
            return add<float, float>(args, threads);
        case DType::bfloat16:
            return same ? add<BFloat16, BFloat16>(args, threads)
                        : add<BFloat16, float>(args, threads);
        case DType::float16:
            return same ? add<Float16, Float16>(args, threads)
                        : add<Float16, float>(args, threads);
        case DType::float64:
            return add<double, double>(args, threads);
    }
}

}  // namespace

namespace SAPT_FAST_CAPABILITY {
extern const OwnLoraKernels own_lora_kernels = {add_any};
}

}  // namespace sapt_fast
