// Scores of keys, for csrc/cpu/*.cpp: products, or negative squared distances, of rows of queries
// and keys; internal linkage as in vec.h.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "cpu/counts.h"
#include "cpu/vec.h"

namespace sapt_fast {
namespace {

constexpr int kQueries = 4;  // of a tile in registers
#if defined(__AVX512F__)
constexpr int kKeys = 4;
#else
constexpr int kKeys = 2;  // more would not fit the registers
#endif

// Values of R in a vector.
template <class R>
constexpr int kRowLanes = kVectorBytes / static_cast<int>(sizeof(R));

// Rows are scored as values of R: float or double, or bfloat16 where the CPU multiplies that.
template <class R>
struct Row {
    typedef vec_t<R> vec;
    static vec load(const R* from) { return ::load(from); }
    static vec_t<R> add_product(vec_t<R> sum, vec a, vec b) { return sum + a * b; }
    static vec_t<R> minus_square(vec_t<R> sum, vec a, vec b) {
        const vec difference = a - b;
        return sum - difference * difference;
    }
};

#if defined(__AVX512BF16__)
template <>
struct Row<BFloat16> {
    typedef __m512bh vec;
    static vec load(const BFloat16* from) {
        vec value;
        memcpy(&value, from, sizeof value);
        return value;
    }
    // Products and sums are those of float, except that subnormal numbers count as zero.
    static vec_t<float> add_product(vec_t<float> sum, vec a, vec b) {
        return _mm512_dpbf16_ps(sum, a, b);
    }
};
#endif

// The sum with one more product, or less one more squared difference.
template <bool L2, class R>
inline __attribute__((always_inline)) vec_t<acc_t<R>> add_score(vec_t<acc_t<R>> sum,
                                                               typename Row<R>::vec a,
                                                               typename Row<R>::vec b) {
    if constexpr (L2) {
        return Row<R>::minus_square(sum, a, b);
    } else {
        return Row<R>::add_product(sum, a, b);
    }
}

// The last values of rows whose width is no whole number of vectors: one vector that ends with the
// row, in which the lanes of the vector before it are cleared.
template <class R>
class RowEnd {
   public:
    explicit RowEnd(int64_t width) : whole(width / kRowLanes<R> * kRowLanes<R>), width_(width) {
        for (int i = 0; i < kRowLanes<R>; ++i) mask_[i] = i < whole + kRowLanes<R> - width ? 0 : -1;
    }
    bool exists() const { return whole < width_; }
    typename Row<R>::vec load(const R* row) const {
        mask_vec bits;
        memcpy(&bits, row + width_ - kRowLanes<R>, sizeof bits);
        bits &= mask_;
        typename Row<R>::vec value;
        memcpy(&value, &bits, sizeof value);
        return value;
    }
    const int64_t whole;  // values before the end

   private:
    typedef typename std::conditional<
        sizeof(R) == 2, int16_t,
        typename std::conditional<sizeof(R) == 4, int32_t, int64_t>::type>::type Lane;
    typedef Lane mask_vec __attribute__((vector_size(kVectorBytes)));
    int64_t width_;
    mask_vec mask_;
};

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
template <int QUERIES, int KEYS, bool L2, class R>
inline __attribute__((always_inline)) void score_tile(acc_t<R>* out, int64_t out_stride,
                                                      const R* query, const R* key,
                                                      int64_t key_stride, int64_t width) {
    typedef acc_t<R> A;
    vec_t<A> sum[QUERIES * KEYS] = {};
    for (int64_t i = 0; i < width; i += kRowLanes<R>) {
        typename Row<R>::vec column[KEYS];
        for (int j = 0; j < KEYS; ++j) column[j] = Row<R>::load(key + j * key_stride + i);
        for (int q = 0; q < QUERIES; ++q) {
            const auto value = Row<R>::load(query + q * width + i);
            for (int j = 0; j < KEYS; ++j) {
                vec_t<A>& each = sum[q * KEYS + j];
                each = add_score<L2, R>(each, value, column[j]);
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
template <class R>
inline void bring_in(const R* rows, int64_t stride, int64_t count, int64_t width) {
    constexpr int64_t kLine = 64;
    for (int64_t j = 0; j < count; ++j) {
        const char* row = reinterpret_cast<const char*>(rows + j * stride);
        const char* end = reinterpret_cast<const char*>(rows + j * stride + width);
        for (; row < end; row += kLine) asm volatile("" : : "r"(*row));
    }
}

template <int QUERIES, bool L2, class R>
void score_keys(acc_t<R>* out, int64_t out_stride, const R* query, const R* keys,
                int64_t key_stride, int64_t count, int64_t width) {
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

template <bool L2, class R>
void score_block(acc_t<R>* out, int64_t out_stride, const R* query, int64_t queries, const R* keys,
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

// Of one query, keys one after the other as the prefetchers of a CPU like it, odd widths in place.
template <bool L2, class R>
void score_rows(acc_t<R>* out, const R* query, const R* keys, int64_t key_stride, int64_t count,
                const RowEnd<R>& end) {
    typedef acc_t<R> A;
    constexpr int kRows = 16;  // whose sums over lanes are made together
    const auto last = end.exists() ? end.load(query) : typename Row<R>::vec{};
    for (int64_t first = 0; first < count; first += kRows) {
        const int64_t rows = smaller(kRows, count - first);
        vec_t<A> sum[kRows] = {};
        for (int64_t j = 0; j < rows; ++j) {
            const R* key = keys + (first + j) * key_stride;
            vec_t<A> each = {};
            for (int64_t i = 0; i < end.whole; i += kRowLanes<R>) {
                each = add_score<L2, R>(each, Row<R>::load(query + i),
                                                      Row<R>::load(key + i));
            }
            if (end.exists()) each = add_score<L2, R>(each, last, end.load(key));
            sum[j] = each;
        }
        A total[kRows];
        sum_each<kRows>(total, sum);
        memcpy(out + first, total, sizeof(A) * static_cast<size_t>(rows));
    }
}

}  // namespace
}  // namespace sapt_fast
