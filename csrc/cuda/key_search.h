// How a search for keys is launched: blocks compare some of the queries with a share of the keys,
// then every query's best of all shares are merged.
#pragma once

#include "cuda/by_dtype.h"
#include "cuda/key_tile.h"
#include "cuda/launch.h"

namespace sapt_fast {

template <class Search>
struct SharedKeys {
    Search search;
    int64_t splits;  // shares of the keys
    int64_t keys_per_split;
    bool aligned;

    // Blocks are numbered share by share for some of the queries, then for the next ones.
    __device__ int64_t split() const { return blockIdx.x % static_cast<unsigned>(splits); }
    __device__ int64_t first_query(int queries) const {
        return static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(splits)) * queries;
    }
};

// Launches::kMinKeys is the least of a share, Launches::kMaxSplits the most shares.
template <class Launches>
int64_t splits_of(int64_t count) {
    const int64_t most = ceil_div(count, Launches::kMinKeys);
    return most < Launches::kMaxSplits ? most : Launches::kMaxSplits;
}

// Launches::compare<T, QUERIES> for QUERIES queries a block, or Launches::multiply<T> for kTile by
// the tensor cores, for several queries of 16 bits; then Launches::merge<T>. There must be keys.
template <class Launches, class Search>
void search_keys(const Search& search, const Stream& stream) {
    SharedKeys<Search> arguments = {};
    arguments.search = search;
    arguments.keys_per_split = ceil_div(search.count, splits_of<Launches>(search.count));
    arguments.splits = ceil_div(search.count, arguments.keys_per_split);
    const auto blocks = [&](int queries) {
        return arguments.splits * ceil_div(search.queries, queries);
    };
    by_dtype(search.dtype, [&](auto type) {
        typedef typename decltype(type)::type T;
        constexpr bool kMultiplies = sizeof(T) == 2;
        const int64_t row = search.width * static_cast<int64_t>(sizeof(T));
        arguments.aligned = aligned16(search.query, row) && aligned16(search.keys, row);
        if (search.queries == 1) {
            Launches::template compare<T, 1>(blocks(1), arguments, stream);
        } else if constexpr (kMultiplies) {
            Launches::template multiply<T>(blocks(kTile), arguments, stream);
        } else {
            Launches::template compare<T, 4>(blocks(4), arguments, stream);
        }
        Launches::template merge<T>(search.queries, arguments, stream);
    });
}

}  // namespace sapt_fast
