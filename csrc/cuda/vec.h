// What the kernels share: eight neighbouring elements at a time, and sums over a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

namespace sapt_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVector = 8;  // elements a thread loads at a time

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ inline T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float<__half>(float value) {
    return __float2half_rn(value);
}

// kVector elements as they lie in memory: half the registers of their values in float.
template <class T>
struct Packed {
    uint4 part[sizeof(T) * kVector / sizeof(uint4)];
};

template <class T>
__device__ inline Packed<T> zeros() {
    Packed<T> packed;
    for (uint4& part : packed.part) part = make_uint4(0, 0, 0, 0);
    return packed;
}

// Where loads look first. What is read before wait_for_previous_kernel(), and what is read once, comes
// from L2: no line of L1 that an earlier kernel left is taken for it, none is replaced by it.
enum class Cache { l1, l2 };

template <Cache CACHE, class E>
__device__ inline E read(const E* from) {
    if constexpr (CACHE == Cache::l2) {
        return __ldcg(from);
    } else {
        return *from;
    }
}

// The elements at `from`, zeros from `count` on. `aligned`: 16-byte loads are allowed.
template <Cache CACHE = Cache::l1, class T>
__device__ inline Packed<T> load(const T* from, int64_t count, bool aligned) {
    Packed<T> packed = zeros<T>();
    if (aligned && count >= kVector) {
        const uint4* parts = reinterpret_cast<const uint4*>(from);
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof packed / sizeof(uint4)); ++i) {
            packed.part[i] = read<CACHE>(parts + i);
        }
        return packed;
    }
    T elements[kVector];
    memcpy(elements, &packed, sizeof packed);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (i < count) elements[i] = read<CACHE>(from + i);
    }
    memcpy(&packed, elements, sizeof packed);
    return packed;
}

template <class T>
__device__ inline void unpack(float (&values)[kVector], const Packed<T>& packed) {
    T elements[kVector];
    memcpy(elements, &packed, sizeof packed);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = to_float(elements[i]);
}

template <class T>
__device__ inline Packed<T> pack(const float (&values)[kVector]) {
    T elements[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) elements[i] = from_float<T>(values[i]);
    Packed<T> packed;
    memcpy(&packed, elements, sizeof packed);
    return packed;
}

// The first `count` elements to `to`.
template <class T>
__device__ inline void store(T* to, const Packed<T>& packed, int64_t count, bool aligned) {
    if (aligned && count >= kVector) {
        uint4* parts = reinterpret_cast<uint4*>(to);
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof packed / sizeof(uint4)); ++i) {
            parts[i] = packed.part[i];
        }
        return;
    }
    T elements[kVector];
    memcpy(elements, &packed, sizeof packed);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (i < count) to[i] = elements[i];
    }
}

// The sums over a warp of COUNT values per lane (a power of two up to 32), in a fixed order. Value
// i is returned to the lanes from i * 32 / COUNT up to the next value's.
template <int COUNT>
__device__ inline float warp_sums(float (&values)[COUNT]) {
    const int lane = threadIdx.x % kWarp;
    int left = COUNT;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        if (left == 1) {
            values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
            continue;
        }
        // Each of two lanes keeps one half of the values and gets its partner's share of it.
        left /= 2;
        const bool upper = lane & offset;
#pragma unroll
        for (int i = 0; i < COUNT / 2; ++i) {
            if (i >= left) break;
            const float kept = upper ? values[i + left] : values[i];
            const float given = upper ? values[i] : values[i + left];
            values[i] = kept + __shfl_xor_sync(kAllLanes, given, offset);
        }
    }
    return values[0];
}

// The dynamic shared memory of the block.
template <class Shared>
__device__ inline Shared& shared_memory() {
    extern __shared__ uint4 shared_bytes[];
    return *reinterpret_cast<Shared*>(shared_bytes);
}

// Kernels of one op overlap on Hopper and newer: a kernel may start while the one before it in the
// stream still runs. All threads of all of them wait here, and only then let the next one start.
// Memory is promised to be as earlier kernels left it only after the wait. Before it, a kernel that
// follows another one of its op may read what that one does not write: everything else was complete
// when that one let it start. It must come from L2 (Cache::l2), as L1 may hold what was there before.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}

__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}

}  // namespace sapt_fast
