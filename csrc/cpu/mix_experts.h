// Products of rows with a few chosen experts each, read where they lie in their bank.
#pragma once

#include <stdint.h>

#include "cpu/tables.h"
#include "dtype.h"

namespace sapt_fast {

// A is float, or double where the rows are. Pairs whose index is out of range count as zeros.
struct ChosenExperts {
    const void* bank;      // [experts, rank, width], experts expert_stride elements apart
    const int64_t* index;  // [rows, k]
    int64_t expert_stride;
    int64_t rows;
    int64_t k;
    int64_t experts;
    int64_t rank;
    int64_t width;
    DType dtype;       // of the rows
    DType bank_dtype;  // dtype or float32
};

// The gradient of a bank: pairs sorted by `target`, the row of the gradient that they add to.
struct ExpertGrad {
    void* out;                 // [out_rows, rank, width], zeros; in bank_dtype
    const void* coefficients;  // A [rows * k, rank]
    const void* values;        // [rows, width] in dtype
    const int64_t* order;      // [pairs], row * k + choice
    const int64_t* target;     // [pairs], ascending; others than 0 to out_rows - 1 are left out
    int64_t pairs;
    int64_t out_rows;
    int64_t k;
    int64_t rank;
    int64_t width;
    DType dtype;
    DType bank_dtype;
};

struct MixExpertsKernels {
    // out A [rows, k, rank] = values [rows, width] . the experts' rows
    void (*dot)(const ChosenExperts& chosen, void* out, const void* values, int threads);
    // out [rows, width] = sum over a row's pairs of coefficients A [rows, k, rank] . the experts
    void (*sum)(const ChosenExperts& chosen, void* out, const void* coefficients, int threads);
    void (*grad)(const ExpertGrad& args, int threads);
};

SAPT_FAST_DECLARE_TABLE(MixExpertsKernels, mix_experts_kernels)

}  // namespace sapt_fast
