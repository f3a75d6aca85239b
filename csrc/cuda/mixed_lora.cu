#include "cuda/mixed_lora.h"

#include "cuda/by_dtype.h"
#include "cuda/decode_expand.h"
#include "cuda/decode_reduce.h"
#include "cuda/launch.h"

namespace sapt_fast {
namespace {

constexpr int64_t kMaxSplits = 8;     // parts of the reduction over the inputs
constexpr int64_t kManyBlocks = 128;  // about one for each processor of a large GPU

int64_t splits_of(int64_t inputs) {
    const int64_t steps = ceil_div(inputs, kReduceStep);
    if (steps <= 1) return 1;
    return ceil_div(steps, ceil_div(steps, kMaxSplits));
}

// Numbers the blocks of the expansion; returns how many there are for a tile of rows.
unsigned number_expand_blocks(Arguments& arguments, int columns) {
    arguments.expand_blocks = 0;
    for (int p = 0; p < arguments.count; ++p) {
        Projection& projection = arguments.projections[p];
        projection.first_expand_block = arguments.expand_blocks;
        arguments.expand_blocks +=
            static_cast<unsigned>(ceil_div(projection.tensors.outputs, columns));
    }
    return arguments.expand_blocks;
}

template <class T, class L, int ROWS, int LANES>
void run_expand(const Arguments& arguments, int64_t tiles, const Stream& stream) {
    launch<expand<T, L, ROWS, LANES>>("mixed_lora expand", arguments.expand_blocks * tiles,
                                      kExpandThreads, sizeof(typename Expand<ROWS, LANES>::Shared),
                                      stream, arguments);
}

template <class T, class L, int ROWS>
void run(Arguments& arguments, const Stream& stream) {
    constexpr int kWide = 8;    // lanes on the columns, 16 bytes of B each
    constexpr int kNarrow = 2;  // where columns are few: more blocks, each of which reads all of h
    const int64_t tiles = ceil_div(arguments.rows, ROWS);
    const int64_t reduce_blocks = arguments.base_blocks + arguments.shrink_blocks;
    if (reduce_blocks > 0) {
        launch<reduce<T, L, ROWS>>("mixed_lora reduce", reduce_blocks * tiles, kReduceThreads,
                                   sizeof(ReduceShared<ROWS>), stream, arguments);
    }
    if (number_expand_blocks(arguments, kWide * kVector) * tiles >= kManyBlocks) {
        return run_expand<T, L, ROWS, kWide>(arguments, tiles, stream);
    }
    number_expand_blocks(arguments, kNarrow * kVector);
    run_expand<T, L, ROWS, kNarrow>(arguments, tiles, stream);
}

template <class T, class L>
void run_rows(Arguments& arguments, const DecodeGroup& group, const Stream& stream) {
    const auto size = static_cast<int64_t>(sizeof(T));
    const auto lora_size = static_cast<int64_t>(sizeof(L));
    arguments.aligned_x = aligned16(group.x, group.inputs * size);
    unsigned shrink_blocks = 0;  // of one part of the inputs
    int64_t outputs = 0;
    for (int p = 0; p < group.count; ++p) {
        const DecodeProjection& from = group.projections[p];
        Projection& to = arguments.projections[p];
        to.tensors = from;
        to.first_rank = arguments.total_ranks;
        to.first_base_block = arguments.base_blocks;
        to.first_shrink_block = shrink_blocks;
        to.aligned_weight = aligned16(from.weight, group.inputs * size);
        to.aligned_a = aligned16(from.lora_a, group.inputs * lora_size);
        to.aligned_b = aligned16(from.lora_b, from.outputs * lora_size);
        arguments.total_ranks += from.ranks;
        outputs += from.outputs;
        shrink_blocks += static_cast<unsigned>(ceil_div(from.ranks, kReduceRows));
        if (from.weight == nullptr) continue;
        to.tensors.accumulate = true;
        arguments.base_blocks += static_cast<unsigned>(ceil_div(from.outputs, kReduceRows));
    }
    arguments.shrink_blocks = shrink_blocks * static_cast<unsigned>(arguments.splits);
    if (outputs == 0) return;
    if (arguments.rows == 1) return run<T, L, 1>(arguments, stream);
    if (arguments.rows <= 4) return run<T, L, 4>(arguments, stream);
    run<T, L, 8>(arguments, stream);
}

}  // namespace

int64_t mixed_lora_workspace(int64_t rows, int64_t inputs, int64_t total_ranks) {
    return splits_of(inputs) * rows * total_ranks;
}

void mixed_lora_decode(const DecodeGroup& group, const Stream& stream) {
    if (group.rows == 0) return;
    Arguments arguments = {};
    arguments.count = group.count;
    arguments.x = group.x;
    arguments.mixture = group.mixture;
    arguments.h = group.workspace;
    arguments.rows = group.rows;
    arguments.rows_per_sample = group.rows / group.samples;
    arguments.adapters = group.adapters;
    arguments.inputs = group.inputs;
    arguments.splits = splits_of(group.inputs);
    arguments.inputs_per_split =
        ceil_div(ceil_div(group.inputs, kReduceStep), arguments.splits) * kReduceStep;
    by_dtypes(group.dtype, group.lora_dtype, [&](auto type, auto factor_type) {
        run_rows<typename decltype(type)::type, typename decltype(factor_type)::type>(
            arguments, group, stream);
    });
}

}  // namespace sapt_fast
