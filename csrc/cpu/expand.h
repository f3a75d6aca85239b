// Products of a few ranks, added to rows, for csrc/cpu/mixed_lora.cpp; internal linkage as in vec.h.
#pragma once

#include <stdint.h>

#include <cmath>

#include "cpu/counts.h"
#include "cpu/dots.h"
#include "cpu/vec.h"

namespace sapt_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kTileVecs = 4;
#else
constexpr int kTileVecs = 2;  // more would not fit the registers
#endif

template <class A>
inline bool is_absent(A value) {
    return value == 0 && !std::signbit(value);
}

// tile [ROWS, VECS vectors] += hw [ROWS, ranks] . b [ranks, ...]; SKIPS leaves out what is absent
template <int ROWS, int VECS, bool SKIPS, class A, class L>
inline __attribute__((always_inline)) void expand(A* tile, int64_t tile_stride, const A* hw,
                                                  int64_t ranks, const L* b, int64_t b_stride) {
    constexpr int kStep = kLanes<A>;
    vec_t<A> sum[ROWS][VECS];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECS; ++v) sum[r][v] = load(tile + r * tile_stride + v * kStep);
    }
    for (int64_t j = 0; j < ranks; ++j) {
        vec_t<A> column[VECS];
        for (int v = 0; v < VECS; ++v) column[v] = load(b + j * b_stride + v * kStep);
        for (int r = 0; r < ROWS; ++r) {
            if (SKIPS && is_absent(hw[r * ranks + j])) continue;
            const vec_t<A> by = broadcast(hw[r * ranks + j]);
            for (int v = 0; v < VECS; ++v) sum[r][v] += by * column[v];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < VECS; ++v) store(tile + r * tile_stride + v * kStep, sum[r][v]);
    }
}

template <int ROWS, bool SKIPS, class A, class L>
void expand_rows(A* tile, int64_t tile_stride, const A* hw, int64_t ranks, const L* b,
                 int64_t b_stride, int64_t columns) {
    constexpr int kStep = kLanes<A>;
    int64_t c = 0;
    for (; c + kTileVecs * kStep <= columns; c += kTileVecs * kStep) {
        expand<ROWS, kTileVecs, SKIPS>(tile + c, tile_stride, hw, ranks, b + c, b_stride);
    }
    for (; c + kStep <= columns; c += kStep) {
        expand<ROWS, 1, SKIPS>(tile + c, tile_stride, hw, ranks, b + c, b_stride);
    }
    for (; c < columns; ++c) {
        for (int r = 0; r < ROWS; ++r) {
            A sum = tile[r * tile_stride + c];
            for (int64_t j = 0; j < ranks; ++j) {
                if (SKIPS && is_absent(hw[r * ranks + j])) continue;
                sum += hw[r * ranks + j] * static_cast<A>(to_acc(b[j * b_stride + c]));
            }
            tile[r * tile_stride + c] = sum;
        }
    }
}

// Up to kRowBlock rows.
template <bool SKIPS, class A, class L>
void expand_some(A* tile, int64_t tile_stride, int64_t rows, const A* hw, int64_t ranks, const L* b,
                 int64_t b_stride, int64_t columns) {
    switch (rows) {
        case 4:
            return expand_rows<4, SKIPS>(tile, tile_stride, hw, ranks, b, b_stride, columns);
        case 3:
            return expand_rows<3, SKIPS>(tile, tile_stride, hw, ranks, b, b_stride, columns);
        case 2:
            return expand_rows<2, SKIPS>(tile, tile_stride, hw, ranks, b, b_stride, columns);
        default:
            return expand_rows<1, SKIPS>(tile, tile_stride, hw, ranks, b, b_stride, columns);
    }
}

// tile [rows, TILE] += hw [rows, ranks] . b [ranks, ...], rows in blocks that share a read of b.
template <int64_t TILE, bool SKIPS, class A, class L>
void expand_blocks(A* tile, int64_t rows, const A* hw, int64_t ranks, const L* b, int64_t b_stride,
                   int64_t columns) {
    for (int64_t r = 0; r < rows; r += kRowBlock) {
        expand_some<SKIPS>(tile + r * TILE, TILE, smaller(rows - r, kRowBlock), hw + r * ranks,
                           ranks, b, b_stride, columns);
    }
}

// So few rows and columns that the tile after the one in work is there when its turn comes.
inline void prefetch_rows(const float* rows, int64_t stride, int64_t count, int64_t columns) {
    constexpr int64_t kLine = 64 / sizeof(float);
    for (int64_t r = 0; r < count; ++r) {
        for (int64_t c = 0; c < columns; c += kLine) __builtin_prefetch(rows + r * stride + c, 1);
    }
}

}  // namespace
}  // namespace sapt_fast
