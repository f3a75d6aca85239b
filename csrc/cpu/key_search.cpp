#include "cpu/key_search.h"

#include <math.h>
#include <omp.h>

#include <type_traits>

#include "cpu/by_dtype.h"
#include "cpu/counts.h"
#include "cpu/key_scores.h"
#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int64_t kTaskChunks = 32;  // chunks that a thread takes at a time, at most
constexpr int64_t kTasks = 8;        // tasks per thread, at least, where there are so many chunks
constexpr int64_t kGlance = 64;     // scores that are compared with the limit at once
constexpr int64_t kFewWithoutLimit = 64;  // of so many keys, one may be met without a limit

// One row in R, zeros from `width` to `padded`.
template <class R, class T>
inline void copy_row(R* to, const T* from, int64_t width, int64_t padded) {
    int64_t i = 0;
    if constexpr (std::is_same<R, T>::value) {
        memcpy(to, from, sizeof(T) * width);
        i = width;
    } else {
        for (; i + kLanes<T> <= width; i += kLanes<T>) store(to + i, load(from + i));
        for (; i < width; ++i) to[i] = to_acc(from[i]);
    }
    memset(to + i, 0, sizeof(R) * (padded - i));
}

// Whether distances are bounded by the rows' products, and computed only where these allow for
// one that is near enough.
template <class R>
constexpr bool kBounded = !std::is_same<R, acc_t<R>>::value;

template <class R>
inline bool needs_scales(Metric metric) {
    return metric == Metric::cosine || (metric == Metric::l2 && kBounded<R>);
}

// Of a row: one over its norm for cosines, for distances the norm's square.
template <class R>
acc_t<R> scale_of(Metric metric, const R* row, const RowEnd<R>& end) {
    typedef acc_t<R> A;
    vec_t<A> sum = {};
    for (int64_t i = 0; i < end.whole; i += kRowLanes<R>) {
        const auto value = Row<R>::load(row + i);
        sum = Row<R>::add_product(sum, value, value);
    }
    if (end.exists()) {
        const auto value = end.load(row);
        sum = Row<R>::add_product(sum, value, value);
    }
    const A square = sum_of<A>(sum);
    if (metric == Metric::l2) return square;
    return square == 0 ? 0 : 1 / static_cast<A>(sqrt(square));
}

template <class R>
acc_t<R> minus_squared_distance(const R* a, const R* b, int64_t width) {
    typedef acc_t<R> A;
    vec_t<A> sum = {};
    for (int64_t i = 0; i < width; i += kLanes<A>) {
        const vec_t<A> difference = load(a + i) - load(b + i);
        sum -= difference * difference;
    }
    return sum_of<A>(sum);
}

// The queries' rows and scales.
template <class R, class T>
void copy_queries(const KeySearch& search, R* rows, acc_t<R>* scales, int64_t padded,
                  const RowEnd<R>& end) {
    for (int64_t q = 0; q < search.queries; ++q) {
        R* row = rows + q * padded;
        copy_row(row, static_cast<const T*>(search.query) + q * search.query_stride, search.width,
                 padded);
        if (needs_scales<R>(search.metric)) scales[q] = scale_of(search.metric, row, end);
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

// What one thread works with: keys of T, scored as values of R.
template <class T, class R>
class Worker {
   public:
    typedef acc_t<T> A;

    Worker(const KeySearch& search, const SearchScratch& scratch, int thread)
        : search_(search),
          lists_(static_cast<Candidate<A>*>(scratch.lists) +
                 thread * search.queries * scratch.capacity),
          counts_(scratch.counts + thread * search.queries),
          limits_(static_cast<A*>(scratch.limits) + thread * search.queries),
          query_(static_cast<const R*>(scratch.query)),
          query_scales_(static_cast<const A*>(scratch.query_scales)),
          rows_(static_cast<A*>(scratch.tiles) + thread * tile_size(search)),
          scores_(static_cast<A*>(rows_) + chunk_keys(search) * padded_width(search)),
          scales_(scores_ + chunk_keys(search) * kQueryBlock),
          capacity_(scratch.capacity),
          end_(row_end(search)) {}

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

    // Whether keys are used where they are. Copies of an odd width pay for more than one query, and
    // where distances are bounded, whose sums read whole vectors of both rows.
    static bool in_place(const KeySearch& search) {
        const bool odd = search.width % kRowLanes<R> != 0;
        const bool reads_end = search.queries == 1 && search.width >= kRowLanes<R> &&
                               !(kBounded<R> && search.metric == Metric::l2);
        return std::is_same<T, R>::value && (!odd || reads_end);
    }

    static RowEnd<R> row_end(const KeySearch& search) {
        return RowEnd<R>(in_place(search) ? search.width : width(search));
    }

    // Values of a row, those that pad it included: at most padded_width.
    static int64_t width(const KeySearch& search) {
        return parts(search.width, kRowLanes<R>) * kRowLanes<R>;
    }

   private:
    // Makes keys_ and their scales.
    void fetch(int64_t first, int64_t count) {
        const T* given = static_cast<const T*>(search_.keys) + first * search_.key_stride;
        if constexpr (std::is_same<T, R>::value) {
            keys_ = given;
            key_stride_ = search_.key_stride;
            if (in_place(search_) && search_.queries > 1) bring_in(keys_, key_stride_, count, search_.width);
        }
        if (!in_place(search_)) {
            R* rows = static_cast<R*>(rows_);
            keys_ = rows;
            key_stride_ = width(search_);
            for (int64_t j = 0; j < count; ++j) {
                copy_row(rows + j * key_stride_, given + j * search_.key_stride, search_.width,
                         key_stride_);
            }
        }
        for (int64_t j = 0; j < count && needs_scales<R>(search_.metric); ++j) {
            scales_[j] = scale_of(search_.metric, keys_ + j * key_stride_, end_);
        }
    }

    template <bool L2>
    void score(const R* query, int64_t queries, int64_t count) {
        if (search_.queries == 1) {
            return score_rows<L2>(scores_, query, keys_, key_stride_, count, end_);
        }
        score_block<L2>(scores_, chunk_keys(search_), query, queries, keys_, key_stride_, count,
                        width(search_));
    }

    void score(int64_t block, int64_t queries, int64_t count) {
        const int64_t stride = chunk_keys(search_);
        const R* query = query_ + block * width(search_);
        if constexpr (std::is_same<R, A>::value) {
            if (search_.metric == Metric::l2) {
                return score<true>(query, queries, count);
            }
        }
        score<false>(query, queries, count);
        for (int64_t q = 0; q < queries && needs_scales<R>(search_.metric); ++q) {
            A* score = scores_ + q * stride;
            const A scale = query_scales_[block + q];
            if (search_.metric == Metric::l2) {
                from_products(score, block + q, count);
            } else {
                for (int64_t j = 0; j < count; ++j) score[j] = score[j] * scale * scales_[j];
            }
        }
    }

    // Makes a query's products scores: where one may enter the list, minus the squared distance,
    // elsewhere what it cannot exceed. With n additions one after the other, the sums behind
    // 2 qk - |q|^2 - |k|^2 and behind the squared distance itself, at most 2 (|q|^2 + |k|^2), are
    // off by n 2^-24 of |q|^2 + |k|^2 and four times that at most; subnormal products are lost.
    void from_products(A* score, int64_t q, int64_t count) {
        const A limit = limits_[q];
        const A square = query_scales_[q];
        const A additions = static_cast<A>(width(search_) / kLanes<A> + 16);
        const A slack = additions * 0x1p-21f;
        const A lost = static_cast<A>(width(search_)) * 0x1p-120f;
        int any = 0;
        for (int64_t j = 0; j < count; ++j) {
            const A squares = square + scales_[j];
            score[j] = 2 * score[j] - squares + (slack * squares + lost);
            any |= !(score[j] <= limit);
        }
        for (int64_t j = 0; j < count && any; ++j) {
            if (score[j] <= limit) continue;
            score[j] = minus_squared_distance(query_ + q * width(search_),
                                              keys_ + j * key_stride_, width(search_));
        }
    }

    const KeySearch& search_;
    Candidate<A>* lists_;
    int64_t* counts_;
    A* limits_;
    const R* query_;
    const A* query_scales_;
    void* rows_;
    A* scores_;
    A* scales_;
    int64_t capacity_;
    const RowEnd<R> end_;
    const R* keys_ = nullptr;
    int64_t key_stride_ = 0;
};

template <class T, class R = acc_t<T>>
void search(const KeySearch& search, const SearchScratch& scratch) {
    copy_queries<R, T>(search, static_cast<R*>(scratch.query),
                       static_cast<acc_t<R>*>(scratch.query_scales), Worker<T, R>::width(search),
                       Worker<T, R>::row_end(search));
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
        Worker<T, R> worker(search, scratch, omp_get_thread_num());
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
#if defined(__AVX512BF16__)
    // A thread has no limit until it has filled a list.
    const bool limited = given.key_count >= kFewWithoutLimit * scratch.capacity * scratch.threads;
    if (given.dtype == DType::bfloat16 && (given.metric != Metric::l2 || limited)) {
        return search<BFloat16, BFloat16>(given, scratch);
    }
#endif
    by_dtype(given.dtype,
             [&](auto type) { search<typename decltype(type)::type>(given, scratch); });
}

}  // namespace

namespace SAPT_FAST_CAPABILITY {
extern const KeySearchKernels key_search_kernels = {search_any};
}

}  // namespace sapt_fast
