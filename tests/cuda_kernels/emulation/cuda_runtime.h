// Enough of the CUDA runtime to compile the kernels of csrc/cuda with a host compiler and to run
// them on the CPU. The directory of this file comes before the toolkit's in the include path.
//
// The blocks of a launch run one after another. The threads of a block are fibres that give way at
// barriers and warp operations only, and the next one is chosen by a seeded generator, in which warps
// also run far ahead of others: a result that depends on the order depends on the seed.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <type_traits>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__

using std::max;
using std::min;

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

// Those of the fibre that runs.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorMemoryAllocation = 2,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorUnknown = 999
};
typedef struct CUstream_st* cudaStream_t;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    union {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim;
    dim3 blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
struct cudaFuncAttributes {
    int ptxVersion;
};

namespace emulation {

struct Launch {
    std::function<void()> kernel;
    dim3 grid;
    dim3 block;
    size_t shared_bytes;
    bool overlaps;  // launched before the previous kernel has ended
};

constexpr size_t kMaxSharedBytes = 48 << 10;

// Chosen among those that a test has put into the kernels; 0 is none.
inline int fault = 0;
inline bool has_fault(int number) { return number == fault; }

// Since the module was loaded.
inline size_t launches = 0;
inline size_t bytes_from_l2 = 0;  // read by __ldcg

inline int current_device = 0;
inline int launched_on = -1;  // the current device at the last launch

// A launch that may overlap stays pending until the next one waits for it, so that what the next one
// reads too early is not there yet.
cudaError_t submit(Launch launch);
const char* last_error();
void block_barrier();
void wait_for_previous();
void let_next_start();
// Gives `bits` to the other lanes of the warp and returns theirs, which stay until the next one.
const uint64_t* exchange(uint64_t bits);
unsigned ballot(bool value);

}  // namespace emulation


inline cudaError_t cudaGetDevice(int* device) {
    *device = emulation::current_device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    emulation::current_device = device;
    return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    attributes->ptxVersion = 90;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulation::last_error(); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    // Parameters are copied at the launch, as the driver does.
    auto call = std::bind(kernel, std::decay_t<Parameters>(arguments)...);
    return emulation::submit({call, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                              config->numAttrs > 0});
}

inline void __syncthreads() { emulation::block_barrier(); }
inline void cudaGridDependencySynchronize() { emulation::wait_for_previous(); }
inline void cudaTriggerProgrammaticLaunchCompletion() { emulation::let_next_start(); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "at most 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = emulation::exchange(bits)[from & 31];
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
    return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ offset);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int offset) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return __shfl_sync(mask, value, lane + offset < 32 ? lane + offset : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int offset) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return __shfl_sync(mask, value, lane >= offset ? lane - offset : lane);
}
inline unsigned __ballot_sync(unsigned, bool value) { return emulation::ballot(value); }
inline bool __any_sync(unsigned, bool value) { return emulation::ballot(value) != 0; }
inline bool __all_sync(unsigned, bool value) { return emulation::ballot(value) == 0xffffffffu; }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::ballot(false); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }

template <class T>
T __ldcg(const T* from) {
    emulation::bytes_from_l2 += sizeof(T);
    return *from;
}
