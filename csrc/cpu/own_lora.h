// Every sample's own LoRA, for few rows: the adapters are read where they lie, as PEFT keeps them.
// One set of these functions exists per capability; bindings.cpp picks one at run time.
#pragma once

#include <stdint.h>

#include "cpu/tables.h"
#include "dtype.h"

namespace sapt_fast {

struct OwnAdapter {
    const void* a;  // [rank, inputs]
    const void* b;  // [outputs, rank]
    int64_t rank;   // at most kMostOwnRanks
    double scale;
};

// Consecutive rows of one adapter; at most kOwnRows.
struct OwnRows {
    int64_t first;
    int64_t count;
    int64_t adapter;
};

struct OwnLora {
    void* y;        // [rows, outputs], added to
    const void* x;  // [rows, inputs]
    const OwnAdapter* adapters;
    const OwnRows* blocks;
    int64_t block_count;
    int64_t inputs;
    int64_t outputs;
    DType dtype;
    DType lora_dtype;  // dtype or float32
};

constexpr int64_t kMostOwnRanks = 256;  // their products are held on the stack
constexpr int64_t kOwnRows = 16;

struct OwnLoraKernels {
    // y += scale (x a^T) b^T, each block of rows with its adapter
    void (*add)(const OwnLora& args, int threads);
};

SAPT_FAST_DECLARE_TABLE(OwnLoraKernels, own_lora_kernels)

}  // namespace sapt_fast
