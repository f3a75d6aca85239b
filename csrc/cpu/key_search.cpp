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

// What one thread works with.
template <class T>
class Worker {
   public:
    typedef acc_t<T> A;

    Worker(const KeySearch& search, const SearchScratch& scratch, int thread)
        : search_(search),
          lists_(static_cast<Candidate<A>*>(scratch.lists) +
                 thread * search.queries * scratch.capacity),
          counts_(scratch.counts + thread * search.queries),
          limits_(static_cast<A*>(scratch.limits) + thread * search.queries),
          query_(static_cast<const A*>(scratch.query)),
          rows_(static_cast<A*>(scratch.tiles) + thread * tile_size(search)),
          scores_(rows_ + chunk_keys(search) * padded_width(search)),
          scales_(scores_ + chunk_keys(search) * kQueryBlock),
          capacity_(scratch.capacity) {}

    // Offers the keys [first, last) to the queries [from, to).
    void run(int64_t first, int64_t last, int64_t from, int64_t to) {
        const int64_t chunk = chunk_keys(search_);
        for (; first < last; first += chunk) {
            const int64_t count = smaller(chunk, last - first);
            fetch(first, count);
            for (int64_t block = from; block < to; block += kQueryBlock) {
                const int64_t queries = smaller(kQueryBlock, to - block);
                score(block, queries, count);
                for (int64_t q = 0; q < queries; ++q) {
                    offer(lists_ + (block + q) * capacity_, counts_ + block + q,
                          limits_ + block + q, scores_ + q * chunk, first, count, search_.k,
                          capacity_);
                }
            }
        }
    }

    // Whether keys are used where they are.
    static bool in_place(const KeySearch& search) {
        return std::is_same<T, A>::value && search.width % kLanes<A> == 0;
    }

    static int64_t width(const KeySearch& search) {
        return in_place(search) ? search.width : padded_width(search);
    }

   private:
    // Makes keys_, and the scales of their scores.
    void fetch(int64_t first, int64_t count) {
        const T* given = static_cast<const T*>(search_.keys) + first * search_.key_stride;
        keys_ = rows_;
        key_stride_ = padded_width(search_);
        if constexpr (std::is_same<T, A>::value) {
            if (in_place(search_)) {
                keys_ = given;
                key_stride_ = search_.key_stride;
                bring_in(keys_, key_stride_, count, search_.width);
            }
        }
        for (int64_t j = 0; j < count && keys_ == rows_; ++j) {
            widen(rows_ + j * key_stride_, given + j * search_.key_stride, search_.width,
                  key_stride_);
        }
        for (int64_t j = 0; j < count && search_.metric == Metric::cosine; ++j) {
            scales_[j] = inverse_norm(keys_ + j * key_stride_, width(search_));
        }
    }

    void score(int64_t block, int64_t queries, int64_t count) {
        const int64_t stride = chunk_keys(search_);
        const A* query = query_ + block * width(search_);
        if (search_.metric == Metric::l2) {
            return score_block<true>(scores_, stride, query, queries, keys_, key_stride_, count,
                                     width(search_));
        }
        score_block<false>(scores_, stride, query, queries, keys_, key_stride_, count,
                           width(search_));
        for (int64_t q = 0; q < queries && search_.metric == Metric::cosine; ++q) {
            for (int64_t j = 0; j < count; ++j) scores_[q * stride + j] *= scales_[j];
        }
    }

    const KeySearch& search_;
    Candidate<A>* lists_;
    int64_t* counts_;
    A* limits_;
    const A* query_;
    A* rows_;
    A* scores_;
    A* scales_;
    int64_t capacity_;
    const A* keys_ = nullptr;
    int64_t key_stride_ = 0;
};

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <class T>
void search(const KeySearch& search, const SearchScratch& scratch) {
    widen_queries<T>(search, static_cast<acc_t<T>*>(scratch.query), Worker<T>::width(search));
    const int64_t wanted = scratch.threads * kTasks;
    const int64_t chunk = chunk_keys(search);
    const int64_t share = parts(search.key_count, chunk) / wanted;
    const int64_t task_keys = chunk * (share < 1 ? 1 : smaller(share, kTaskChunks));
    const int64_t key_tasks = parts(search.key_count, task_keys);
    // Where the keys alone are too few tasks, the queries are shared out too.
    const int64_t query_share = parts(search.queries, parts(wanted, key_tasks));
    const int64_t task_queries = parts(query_share, kQueryBlock) * kQueryBlock;
    const int64_t query_tasks = parts(search.queries, task_queries);
#pragma omp parallel num_threads(scratch.threads)
    {
        Worker<T> worker(search, scratch, omp_get_thread_num());
        // Monotonic and keys outermost: a list meets its keys in ascending order.
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t task = 0; task < key_tasks * query_tasks; ++task) {
            const int64_t first = task / query_tasks * task_keys;
            const int64_t from = task % query_tasks * task_queries;
            worker.run(first, smaller(first + task_keys, search.key_count), from,
                       smaller(from + task_queries, search.queries));
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
