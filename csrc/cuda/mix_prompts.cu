#include "cuda/mix_prompts.h"

#include "cuda/any.h"
#include "cuda/by_dtype.h"
#include "cuda/launch.h"
#include "cuda/vec.h"

namespace sapt_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 4;  // prompts that a thread loads at a time

struct Arguments {
    MixPrompts mix;
    AnyTensor prompts;
    int64_t vectors_per_row;
    int64_t blocks_per_tile;  // of samples
    bool aligned_source;
    bool aligned_out;
};

// Where token t of a sample starts in source; -1 for an id out of range.
__device__ inline int64_t source_offset(const MixPrompts& mix, int64_t sample, int64_t token) {
    if (mix.ids == nullptr) return sample * mix.sample_stride + token * mix.row_stride;
    const int64_t at = sample * mix.tokens + token;
    const int64_t id = mix.wide_ids ? static_cast<const int64_t*>(mix.ids)[at]
                                    : static_cast<const int32_t*>(mix.ids)[at];
    return id >= 0 && id < mix.vocabulary ? id * mix.row_stride : -1;
}

// Eight columns of one row for SAMPLES samples per thread; blocks (samples, rows and columns).
template <class T, int SAMPLES>
__global__ void __launch_bounds__(kThreads) write(const __grid_constant__ Arguments arguments) {
    wait_for_previous_kernel();
    const MixPrompts& mix = arguments.mix;
    const auto blocks = static_cast<unsigned>(arguments.blocks_per_tile);
    const int64_t vector = static_cast<int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x;
    const int64_t row = vector / arguments.vectors_per_row;
    const int64_t column = (vector - row * arguments.vectors_per_row) * kVector;
    const int64_t rows = mix.length + mix.tokens;
    if (row >= rows) return;
    const int64_t left = mix.width - column;
    const int64_t first = static_cast<int64_t>(blockIdx.x / blocks) * SAMPLES;
    T* out = static_cast<T*>(mix.out) + (first * rows + row) * mix.width + column;

    if (row >= mix.length) {
#pragma unroll
        for (int s = 0; s < SAMPLES; ++s) {
            if (first + s >= mix.samples) return;
            const int64_t offset = source_offset(mix, first + s, row - mix.length);
            Packed<T> packed;
            if (offset < 0) {
                float unknown[kVector];
#pragma unroll
                for (int e = 0; e < kVector; ++e) unknown[e] = __uint_as_float(0x7fc00000u);
                packed = pack<T>(unknown);
            } else {
                packed = load(static_cast<const T*>(mix.source) + offset + column, left,
                              arguments.aligned_source);
            }
            store(out + s * rows * mix.width, packed, left, arguments.aligned_out);
        }
        return;
    }

    float sums[SAMPLES][kVector] = {};
    const int64_t prompt = mix.length * mix.width;
    for (int64_t k = 0; k < mix.adapters; k += kAhead) {
        AnyPacked packed[kAhead];
        float weights[kAhead][SAMPLES];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            bool weighted = false;
#pragma unroll
            for (int s = 0; s < SAMPLES; ++s) {
                weights[i][s] = k + i < mix.adapters && first + s < mix.samples
                                    ? mix.mixture[(first + s) * mix.adapters + k + i]
                                    : 0.0f;
                weighted = weighted || weights[i][s] != 0.0f;
            }
            packed[i] = weighted ? load(arguments.prompts,
                                        (k + i) * prompt + row * mix.width + column, left)
                                 : zeros<float>();
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            float values[kVector];
            unpack(values, packed[i], arguments.prompts.dtype);
#pragma unroll
            for (int s = 0; s < SAMPLES; ++s) {
                if (weights[i][s] == 0.0f) continue;
#pragma unroll
                for (int e = 0; e < kVector; ++e) sums[s][e] += weights[i][s] * values[e];
            }
        }
    }
#pragma unroll
    for (int s = 0; s < SAMPLES; ++s) {
        if (first + s >= mix.samples) return;
        store(out + s * rows * mix.width, pack<T>(sums[s]), left, arguments.aligned_out);
    }
}

template <class T>
void run(Arguments& arguments, const Stream& stream) {
    const MixPrompts& mix = arguments.mix;
    const auto size = static_cast<int64_t>(sizeof(T));
    arguments.aligned_out = aligned16(mix.out, mix.width * size);
    arguments.aligned_source = aligned16(mix.source, mix.row_stride * size) &&
                               mix.sample_stride * size % 16 == 0;
    const int64_t vectors = (mix.length + mix.tokens) * arguments.vectors_per_row;
    const int64_t blocks = arguments.blocks_per_tile = ceil_div(vectors, kThreads);
    if (mix.samples == 1) {
        return launch<write<T, 1>>("mix_prompts", blocks, kThreads, 0, stream, arguments);
    }
    launch<write<T, 4>>("mix_prompts", blocks * ceil_div(mix.samples, 4), kThreads, 0, stream,
                        arguments);
}

}  // namespace

void mix_prompts(const MixPrompts& mix, const Stream& stream) {
    Arguments arguments = {};
    arguments.mix = mix;
    const int64_t size = mix.prompts_dtype == DType::float32 ? 4 : 2;
    arguments.prompts = {mix.prompts, mix.prompts_dtype, aligned16(mix.prompts, mix.width * size)};
    arguments.vectors_per_row = ceil_div(mix.width, kVector);
    by_dtype(mix.dtype, [&](auto type) { run<typename decltype(type)::type>(arguments, stream); });
}

}  // namespace sapt_fast
