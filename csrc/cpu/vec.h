// Vectors of float or double as wide as the capability this file is compiled for, and the loads
// and stores that convert the 16-bit types. Included by csrc/cpu/*.cpp, which are compiled once per
// capability: everything here has internal linkage, so that no copy built for a wider instruction
// set can be merged into one for a narrower.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct AccOf {
    typedef float type;
};
template <>
struct AccOf<double> {
    typedef double type;
};
// What T is computed in.
template <class T>
using acc_t = typename AccOf<T>::type;

template <class A>
struct VecOf {
    typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using vec_t = typename VecOf<A>::type;

// Values of T that one vector of acc_t<T> takes.
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(acc_t<T>));

inline __attribute__((always_inline)) uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline __attribute__((always_inline)) float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline __attribute__((always_inline)) float to_acc(float value) { return value; }
inline __attribute__((always_inline)) double to_acc(double value) { return value; }
inline __attribute__((always_inline)) float to_acc(BFloat16 value) {
    return float_of(static_cast<uint32_t>(value.bits) << 16);
}
inline float to_acc(Float16 value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t exponent = (value.bits >> 10) & 0x1fu;
    const uint32_t fraction = value.bits & 0x3ffu;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        return float_of(bits_of(static_cast<float>(fraction) * 0x1p-24f) | sign);
    }
    const uint32_t biased = exponent == 31 ? 255 : exponent + 112;
    return float_of(sign | (biased << 23) | (fraction << 13));
#endif
}

template <class T>
T from_acc(acc_t<T> value);
template <>
inline __attribute__((always_inline)) float from_acc<float>(float value) {
    return value;
}
template <>
inline __attribute__((always_inline)) double from_acc<double>(double value) {
    return value;
}
template <>
inline __attribute__((always_inline)) BFloat16 from_acc<BFloat16>(float value) {
    const uint32_t bits = bits_of(value);
    if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Float16 from_acc<Float16>(float value) {
#if defined(__F16C__)
    return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
    const uint32_t bits = bits_of(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) {
        // Adding 0.5 leaves the subnormal, rounded to even, in the low bits of the fraction.
        const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        return {static_cast<uint16_t>(sign | rounded)};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

inline __attribute__((always_inline)) vec_t<float> load(const float* from) {
    vec_t<float> value;
    memcpy(&value, from, sizeof value);
    return value;
}
inline __attribute__((always_inline)) vec_t<double> load(const double* from) {
    vec_t<double> value;
    memcpy(&value, from, sizeof value);
    return value;
}
inline __attribute__((always_inline)) vec_t<float> load(const BFloat16* from) {
    constexpr int kCount = kLanes<float>;
    typedef uint16_t half_vec __attribute__((vector_size(kCount * 2)));
    typedef uint32_t word_vec __attribute__((vector_size(kCount * 4)));
    half_vec bits;
    memcpy(&bits, from, sizeof bits);
    const word_vec wide = __builtin_convertvector(bits, word_vec) << 16;
    vec_t<float> value;
    memcpy(&value, &wide, sizeof value);
    return value;
}
inline __attribute__((always_inline)) vec_t<float> load(const Float16* from) {
#if defined(__AVX512F__)
    // maskz: GCC 12 warns of the uninitialised register in the unmasked intrinsic.
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    vec_t<float> value;
    for (int i = 0; i < kLanes<float>; ++i) value[i] = to_acc(from[i]);
    return value;
#endif
}

inline __attribute__((always_inline)) void store(float* to, vec_t<float> value) {
    memcpy(to, &value, sizeof value);
}
inline __attribute__((always_inline)) void store(double* to, vec_t<double> value) {
    memcpy(to, &value, sizeof value);
}
inline __attribute__((always_inline)) void store(BFloat16* to, vec_t<float> value) {
    constexpr int kCount = kLanes<float>;
    typedef uint16_t half_vec __attribute__((vector_size(kCount * 2)));
    typedef uint32_t word_vec __attribute__((vector_size(kCount * 4)));
    word_vec bits;
    memcpy(&bits, &value, sizeof bits);
    const word_vec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const word_vec quiet = (bits >> 16) | 0x40u;
    const word_vec is_nan = reinterpret_cast<word_vec>(value != value);
    const word_vec chosen = (rounded & ~is_nan) | (quiet & is_nan);
    const half_vec narrow = __builtin_convertvector(chosen, half_vec);
    memcpy(to, &narrow, sizeof narrow);
}
inline __attribute__((always_inline)) void store(Float16* to, vec_t<float> value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) to[i] = from_acc<Float16>(value[i]);
#endif
}

template <class A>
inline __attribute__((always_inline)) A sum_of(vec_t<A> value) {
    constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(A));
    A parts[kCount];
    memcpy(parts, &value, sizeof parts);
    for (int width = kCount / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    }
    return parts[0];
}

// Four columns of a matrix of as many rows as lanes: columns[j][lane] = from[lane * stride + j].
#if defined(__AVX512F__) || defined(__AVX2__)
constexpr bool kTransposes = true;
inline __attribute__((always_inline)) void load_transposed(vec_t<float>* columns, const float* from,
                                                           int64_t stride) {
#if defined(__AVX512F__)
    __m512 rows[4];  // of four numbers each: lane l of rows[k] is row 4 l + k
    for (int k = 0; k < 4; ++k) {
        rows[k] = _mm512_zextps128_ps512(_mm_loadu_ps(from + k * stride));
        rows[k] = _mm512_insertf32x4(rows[k], _mm_loadu_ps(from + (4 + k) * stride), 1);
        rows[k] = _mm512_insertf32x4(rows[k], _mm_loadu_ps(from + (8 + k) * stride), 2);
        rows[k] = _mm512_insertf32x4(rows[k], _mm_loadu_ps(from + (12 + k) * stride), 3);
    }
    // maskz: GCC 12 warns of the uninitialised register in the unmasked intrinsics
    const __m512 low01 = _mm512_maskz_unpacklo_ps(0xffff, rows[0], rows[1]);
    const __m512 high01 = _mm512_maskz_unpackhi_ps(0xffff, rows[0], rows[1]);
    const __m512 low23 = _mm512_maskz_unpacklo_ps(0xffff, rows[2], rows[3]);
    const __m512 high23 = _mm512_maskz_unpackhi_ps(0xffff, rows[2], rows[3]);
    columns[0] = _mm512_shuffle_ps(low01, low23, 0x44);
    columns[1] = _mm512_shuffle_ps(low01, low23, 0xee);
    columns[2] = _mm512_shuffle_ps(high01, high23, 0x44);
    columns[3] = _mm512_shuffle_ps(high01, high23, 0xee);
#else
    __m256 rows[4];  // of four numbers each: lane l of rows[k] is row 4 l + k
    for (int k = 0; k < 4; ++k) {
        rows[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + k * stride)),
                                       _mm_loadu_ps(from + (4 + k) * stride), 1);
    }
    const __m256 low01 = _mm256_unpacklo_ps(rows[0], rows[1]);
    const __m256 high01 = _mm256_unpackhi_ps(rows[0], rows[1]);
    const __m256 low23 = _mm256_unpacklo_ps(rows[2], rows[3]);
    const __m256 high23 = _mm256_unpackhi_ps(rows[2], rows[3]);
    columns[0] = _mm256_shuffle_ps(low01, low23, 0x44);
    columns[1] = _mm256_shuffle_ps(low01, low23, 0xee);
    columns[2] = _mm256_shuffle_ps(high01, high23, 0x44);
    columns[3] = _mm256_shuffle_ps(high01, high23, 0xee);
#endif
}
#else
constexpr bool kTransposes = false;
#endif

template <class A>
inline __attribute__((always_inline)) vec_t<A> broadcast(A value) {
    return value - vec_t<A>{};
}

}  // namespace
