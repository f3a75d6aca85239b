// Kernel launches: the stream is the caller's, errors become exceptions, nothing synchronises.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace sapt_fast {

inline void check(cudaError_t status, const char* kernel) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // it is reported here, not at somebody's next launch
    std::string message = std::string(kernel) + ": " + cudaGetErrorString(status);
    if (status == cudaErrorNoKernelImageForDevice) {
        message += "; this build lacks the GPU's architecture: add it to SAPT_FAST_CUDA_ARCHS"
                   " and reinstall";
    } else if (status == cudaErrorMemoryAllocation) {
        message += "; free GPU memory, or pass fewer rows or queries at a time";
    }
    throw std::runtime_error(message);
}

// Whether the code that runs on the current device waits for the kernel before it by itself. That
// is up to the architecture it was compiled for, which may be older than the device.
template <auto kernel>
bool waits_by_itself(const char* name) {
    constexpr int kDevices = 64;
    static std::atomic<signed char> known[kDevices];  // 0: not asked yet, 1: yes, -1: no
    int device = 0;
    check(cudaGetDevice(&device), name);
    if (device >= kDevices) return false;
    if (known[device].load(std::memory_order_relaxed) == 0) {
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), name);
        known[device].store(attributes.ptxVersion >= 90 ? 1 : -1, std::memory_order_relaxed);
    }
    return known[device].load(std::memory_order_relaxed) > 0;
}

// Launches a kernel that calls wait_for_previous_kernel() before it touches memory that the
// previous kernel in the stream may write.
template <auto kernel, class Argument>
void launch(const char* name, dim3 grid, int threads, size_t shared_bytes, void* stream,
            const Argument& argument) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = waits_by_itself<kernel>(name) ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, argument), name);
}

inline bool aligned16(const void* address, int64_t row_bytes) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0 && row_bytes % 16 == 0;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sapt_fast
