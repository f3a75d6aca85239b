#include "cpu/key_search.h"

#include <math.h>
#include <omp.h>

#include <type_traits>
#include <utility>

#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int kQueries = 4;  // of a tile in registers
#if defined(__AVX512F__)
constexpr int kKeys = 4;
#else
constexpr int kKeys = 2;  // more would not fit the registers
#endif
constexpr int64_t kTaskChunks = 32;  // chunks that a thread takes at a time, at most
constexpr int64_t kTasks = 8;        // tasks per thread, at least, where there are so many chunks
constexpr int64_t kGlance = 64;     // scores that are compared with the limit at once

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class A, int... I>
inline __attribute__((always_inline)) vec_t<A> add_neighbours(vec_t<A> a, vec_t<A> b,
                                                              std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
    typedef typename std::conditional<sizeof(A) == 4, int32_t, int64_t>::type Index;
    typedef Index index_vec __attribute__((vector_size(kVectorBytes)));
    return __builtin_shuffle(a, b, index_vec{(2 * I)...}) +
           __builtin_shuffle(a, b, index_vec{(2 * I + 1)...});
#endif
}

// out[i] = the sum of the lanes of sum[i]; always in the same order, wherever a vector stands.
template <int COUNT, class A>
inline __attribute__((always_inline)) void sum_each(A* out, vec_t<A>* sum) {
    constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(A));
    for (int first = 0; first < COUNT; first += kWidth) {
        vec_t<A> part[kWidth];
        for (int i = 0; i < kWidth; ++i) part[i] = first + i < COUNT ? sum[first + i] : vec_t<A>{};
        for (int width = kWidth / 2; width > 0; width /= 2) {
            for (int i = 0; i < width; ++i) {
                part[i] = add_neighbours<A>(part[2 * i], part[2 * i + 1],
                                            std::make_integer_sequence<int, kWidth>());
            }
        }
        const int count = COUNT - first < kWidth ? COUNT - first : kWidth;
        memcpy(out + first, &part[0], sizeof(A) * count);
    }
}

// out[q][j] = the product, or minus the squared distance, of query q and key j.
template <int QUERIES, int KEYS, bool L2, class A>
inline __attribute__((always_inline)) void score_tile(A* out, int64_t out_stride, const A* query,
                                                      const A* key, int64_t key_stride,
                                                      int64_t width) {
    vec_t<A> sum[QUERIES * KEYS] = {};
    for (int64_t i = 0; i < width; i += kLanes<A>) {
        vec_t<A> column[KEYS];
        for (int j = 0; j < KEYS; ++j) column[j] = load(key + j * key_stride + i);
        for (int q = 0; q < QUERIES; ++q) {
            const vec_t<A> value = load(query + q * width + i);
            for (int j = 0; j < KEYS; ++j) {
                if (L2) {
                    const vec_t<A> difference = value - column[j];
                    sum[q * KEYS + j] -= difference * difference;
                } else {
                    sum[q * KEYS + j] += value * column[j];
                }
            }
        }
    }
    A total[QUERIES * KEYS];
    sum_each<QUERIES * KEYS>(total, sum);
    for (int q = 0; q < QUERIES; ++q) {
        memcpy(out + q * out_stride, total + q * KEYS, sizeof(A) * KEYS);
    }
}

// Reads rows one after the other: the prefetchers of a CPU follow that much better than the tiles,
// which read several rows side by side.
template <class A>
inline void bring_in(const A* rows, int64_t stride, int64_t count, int64_t width) {
    constexpr int64_t kLine = 64;
    for (int64_t j = 0; j < count; ++j) {
        const char* row = reinterpret_cast<const char*>(rows + j * stride);
        const char* end = reinterpret_cast<const char*>(rows + j * stride + width);
        for (; row < end; row += kLine) asm volatile("" : : "r"(*row));
    }
}

template <int QUERIES, bool L2, class A>
void score_keys(A* out, int64_t out_stride, const A* query, const A* keys, int64_t key_stride,
                int64_t count, int64_t width) {
    int64_t j = 0;
    for (; j + kKeys <= count; j += kKeys) {
        score_tile<QUERIES, kKeys, L2>(out + j, out_stride, query, keys + j * key_stride,
                                       key_stride, width);
    }
    for (; j < count; ++j) {
        score_tile<QUERIES, 1, L2>(out + j, out_stride, query, keys + j * key_stride, key_stride,
                                   width);
    }
}

template <bool L2, class A>
void score_block(A* out, int64_t out_stride, const A* query, int64_t queries, const A* keys,
                 int64_t key_stride, int64_t count, int64_t width) {
    int64_t q = 0;
    for (; q + kQueries <= queries; q += kQueries) {
        score_keys<kQueries, L2>(out + q * out_stride, out_stride, query + q * width, keys,
                                 key_stride, count, width);
    }
    out += q * out_stride;
    query += q * width;
    switch (queries - q) {
        case 3:
            return score_keys<3, L2>(out, out_stride, query, keys, key_stride, count, width);
        case 2:
            return score_keys<2, L2>(out, out_stride, query, keys, key_stride, count, width);
        case 1:
            return score_keys<1, L2>(out, out_stride, query, keys, key_stride, count, width);
    }
}

// One row in A, zeros from `width` to `padded`.
template <class T>
inline void widen(acc_t<T>* to, const T* from, int64_t width, int64_t padded) {
    int64_t i = 0;
    for (; i + kLanes<T> <= width; i += kLanes<T>) store(to + i, load(from + i));
    for (; i < width; ++i) to[i] = to_acc(from[i]);
    for (; i < padded; ++i) to[i] = 0;
}

template <class A>
A inverse_norm(const A* row, int64_t width) {
    vec_t<A> sum = {};
    for (int64_t i = 0; i < width; i += kLanes<A>) {
        const vec_t<A> value = load(row + i);
        sum += value * value;
    }
    const A square = sum_of<A>(sum);
    return square == 0 ? 0 : 1 / static_cast<A>(sqrt(square));
}

template <class T>
void widen_queries(const KeySearch& search, acc_t<T>* out, int64_t padded) {
    for (int64_t q = 0; q < search.queries; ++q) {
        acc_t<T>* row = out + q * padded;
        widen(row, static_cast<const T*>(search.query) + q * search.query_stride, search.width,
              padded);
        if (search.metric != Metric::cosine) continue;
        const acc_t<T> scale = inverse_norm(row, padded);
        for (int64_t i = 0; i < search.width; ++i) row[i] *= scale;
    }
}

// A score may enter a list that has k entries. Undefined scores may not, and all others may where
// the limit is undefined, as it is before the first selection.
template <class A>
inline bool enters(A score, A limit) {
    return !(score <= limit) & (score == score);
}

template <class A>
inline bool any_enters(const A* scores, int64_t count, A limit) {
    int any = 0;
    for (int64_t i = 0; i < count; ++i) any |= enters(scores[i], limit);
    return any != 0;
}

// Adds the keys [first, first + count) to a list, whose keys all come before them.
template <class A>
void offer(Candidate<A>* list, int64_t* list_count, A* limit, const A* scores, int64_t first,
           int64_t count, int64_t k, int64_t capacity) {
    for (int64_t start = 0; start < count; start += kGlance) {
        const int64_t stop = smaller(start + kGlance, count);
        const bool full = *list_count >= k;
        if (full && stop - start == kGlance && !any_enters(scores + start, kGlance, *limit)) {
            continue;
        }
        for (int64_t i = start; i < stop; ++i) {
            if (*list_count >= k && !enters(scores[i], *limit)) continue;
            list[*list_count] = {scores[i], first + i};
            if (++*list_count == capacity) {
                keep_best(list, capacity, k);
                *list_count = k;
                *limit = list[k - 1].score;
            }
        }
    }
}

inline int64_t task_chunks(const KeySearch& search, int threads) {
    const int64_t chunk = chunk_keys(search);
    const int64_t share = (search.key_count + chunk - 1) / chunk / (threads * kTasks);
    return share < 1 ? 1 : smaller(share, kTaskChunks);
}

template <class T>
void search(const KeySearch& search, const SearchScratch& scratch) {
    typedef acc_t<T> A;
    const int64_t padded = padded_width(search);
    const int64_t chunk = chunk_keys(search);
    const int64_t task_keys = task_chunks(search, scratch.threads) * chunk;
    const int64_t tasks = (search.key_count + task_keys - 1) / task_keys;
    const bool in_place = std::is_same<T, A>::value && search.width % kLanes<A> == 0;
    const int64_t width = in_place ? search.width : padded;
    A* query = static_cast<A*>(scratch.query);
    widen_queries<T>(search, query, width);
#pragma omp parallel num_threads(scratch.threads)
    {
        const int64_t lists = omp_get_thread_num() * search.queries;
        A* rows = static_cast<A*>(scratch.tiles) + omp_get_thread_num() * tile_size(search);
        A* scores = rows + chunk * padded;
        A* scales = scores + chunk * kQueryBlock;
        // Monotonic: a list meets its keys in ascending order.
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t last = smaller((task + 1) * task_keys, search.key_count);
            for (int64_t first = task * task_keys; first < last; first += chunk) {
                const int64_t count = smaller(chunk, last - first);
                const T* given = static_cast<const T*>(search.keys) + first * search.key_stride;
                const A* keys = rows;
                int64_t key_stride = padded;
                if constexpr (std::is_same<T, A>::value) {
                    if (in_place) {
                        keys = given;
                        key_stride = search.key_stride;
                        bring_in(keys, key_stride, count, width);
                    }
                }
                for (int64_t j = 0; j < count && !in_place; ++j) {
                    widen(rows + j * padded, given + j * search.key_stride, search.width, padded);
                }
                for (int64_t j = 0; j < count && search.metric == Metric::cosine; ++j) {
                    scales[j] = inverse_norm(keys + j * key_stride, width);
                }
                for (int64_t block = 0; block < search.queries; block += kQueryBlock) {
                    const int64_t queries = smaller(kQueryBlock, search.queries - block);
                    const A* from = query + block * width;
                    if (search.metric == Metric::l2) {
                        score_block<true>(scores, chunk, from, queries, keys, key_stride, count,
                                          width);
                    } else {
                        score_block<false>(scores, chunk, from, queries, keys, key_stride, count,
                                           width);
                    }
                    for (int64_t q = 0; q < queries; ++q) {
                        A* row = scores + q * chunk;
                        for (int64_t j = 0; j < count && search.metric == Metric::cosine; ++j) {
                            row[j] *= scales[j];
                        }
                        const int64_t list = lists + block + q;
                        offer(static_cast<Candidate<A>*>(scratch.lists) + list * scratch.capacity,
                              scratch.counts + list, static_cast<A*>(scratch.limits) + list, row,
                              first, count, search.k, scratch.capacity);
                    }
                }
            }
        }
    }
}

void search_any(const KeySearch& given, const SearchScratch& scratch) {
    switch (given.dtype) {
        case DType::float32:
            return search<float>(given, scratch);
        case DType::bfloat16:
            return search<BFloat16>(given, scratch);
        case DType::float16:
            return search<Float16>(given, scratch);
        case DType::float64:
            return search<double>(given, scratch);
    }
}

}  // namespace

namespace SAPT_FAST_CAPABILITY {
extern const KeySearchKernels key_search_kernels = {search_any};
}

}  // namespace sapt_fast
