// A warp's product of 16 keys with 16 queries of 16 bits, and the keys' squared norms.
#pragma once

#include "cuda/mma.h"
#include "cuda/vec.h"

namespace sapt_fast {

constexpr int kTile = 16;       // keys and queries
constexpr int kTileWidth = 32;  // elements of theirs that a warp loads at a time

// A lane holds the products of keys lane / 4 and lane / 4 + 8 (half 0 and 1) with four queries.
struct TileProducts {
    float products[2][4];
    float squares[2];  // of the two keys, the same in all lanes that hold them

    __device__ float product(int half, int query) const {
        return products[query / 2][half * 2 + query % 2];
    }

    // Adds the products of rows of `keys`, of which `key_count` may be read, and of `queries`.
    template <class T>
    __device__ void add(const T* keys, int64_t key_count, const T* queries, int64_t query_count,
                        int64_t width, bool aligned) {
        constexpr int kAhead = 4;  // loads of keys that are on their way
        const int group = threadIdx.x % kWarp / 4;
        const int64_t start = threadIdx.x % 4 * kVector;
        for (int64_t step = 0; step < width; step += kAhead * kTileWidth) {
            Packed<T> packed[kAhead][2];
#pragma unroll
            for (int ahead = 0; ahead < kAhead; ++ahead) {
                const int64_t i = start + step + ahead * kTileWidth;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int64_t key = group + half * 8;
                    packed[ahead][half] = key < key_count && i < width
                                              ? load(keys + key * width + i, width - i, aligned)
                                              : zeros<T>();
                }
            }
#pragma unroll
            for (int ahead = 0; ahead < kAhead; ++ahead) {
                const int64_t i = start + step + ahead * kTileWidth;
                const uint4 low = packed[ahead][0].part[0];
                const uint4 high = packed[ahead][1].part[0];
                // The columns of the product are in no order, but in the same one on both sides.
                const unsigned a[2][4] = {{low.x, high.x, low.y, high.y},
                                          {low.z, high.z, low.w, high.w}};
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int64_t query = group + half * 8;
                    const uint4 part = (query < query_count && i < width
                                            ? load(queries + query * width + i, width - i, aligned)
                                            : zeros<T>())
                                           .part[0];
                    const unsigned b[2][2] = {{part.x, part.y}, {part.z, part.w}};
                    multiply_add<T>(products[half], a[0], b[0]);
                    multiply_add<T>(products[half], a[1], b[1]);
                    float values[kVector];
                    unpack(values, packed[ahead][half]);
#pragma unroll
                    for (int e = 0; e < kVector; ++e) squares[half] += values[e] * values[e];
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            squares[half] += __shfl_xor_sync(kAllLanes, squares[half], 1);
            squares[half] += __shfl_xor_sync(kAllLanes, squares[half], 2);
        }
    }
};

// Which query of the tile is the lane's query number `query` of four.
__device__ inline int tile_query(int query) {
    return query / 2 * 8 + threadIdx.x % 4 * 2 + query % 2;
}

}  // namespace sapt_fast
