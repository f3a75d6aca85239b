// Dropout of a matrix by a counter-based generator: the mask of sapt_fast/ops/dropout.py, bit for
// bit. One set of these functions exists per capability; bindings.cpp picks one at run time.
#pragma once

#include <stdint.h>

#include "cpu/tables.h"

namespace sapt_fast {

struct Dropout {
    void* out;      // [rows, columns]; may be x
    const void* x;  // [rows, columns]
    uint64_t seed;
    int64_t first_row;  // of the mask, that row 0 has
    int64_t rows;
    int64_t columns;
    int64_t element;  // bytes: 2, 4 or 8
    uint32_t drops;   // of 65536
};

struct DropoutKernels {
    // out = x where the mask keeps it, 0 elsewhere
    void (*drop)(const Dropout& args, int threads);
};

SAPT_FAST_DECLARE_TABLE(DropoutKernels, dropout_kernels)

}  // namespace sapt_fast
