// Rows of results dealt to threads in blocks of columns; internal linkage as in vec.h.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "cpu/counts.h"
#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int kVectors = 8;  // of a block of columns, kept in registers

// block(row, column, vectors) for as many vectors of T from that column on, kVectors or one at a
// time, both as constants; column(row, column) for each column that fills no vector.
template <class T, class Block, class Column>
inline void for_columns(int64_t rows, int64_t width, int threads, const Block& block,
                        const Column& column) {
    constexpr int64_t kBlock = kVectors * kLanes<T>;
    const int64_t blocks = parts(width, kBlock);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < rows * blocks; ++task) {
        const int64_t row = task / blocks;
        int64_t start = task % blocks * kBlock;
        const int64_t stop = smaller(start + kBlock, width);
        if (stop - start == kBlock) {
            block(row, start, std::integral_constant<int, kVectors>());
            continue;
        }
        for (; start + kLanes<T> <= stop; start += kLanes<T>) {
            block(row, start, std::integral_constant<int, 1>());
        }
        for (; start < stop; ++start) column(row, start);
    }
}

}  // namespace
}  // namespace sapt_fast
