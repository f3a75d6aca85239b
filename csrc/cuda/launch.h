// Kernel launches: the stream is the caller's, errors become exceptions, nothing synchronises.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "cuda/stream.h"

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

// Makes a device the current one of this thread, and on leaving the one that was before. The runtime
// is linked statically: it is told the device, not left to find what torch's own has set.
class OnDevice {
   public:
    OnDevice(int device, const char* name) : device_(device) {
        check(cudaGetDevice(&before_), name);
        if (before_ != device_) check(cudaSetDevice(device_), name);
    }
    ~OnDevice() {
        if (before_ != device_ && cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

   private:
    int device_;
    int before_ = 0;
};

// Whether the code that runs on the current device waits for the kernel before it by itself. That
// is up to the architecture it was compiled for, which may be older than the device.
template <auto kernel>
bool waits_by_itself(int device, const char* name) {
    constexpr int kDevices = 64;
    static std::atomic<signed char> known[kDevices];  // 0: not asked yet, 1: yes, -1: no
    if (device >= kDevices) return false;
    if (known[device].load(std::memory_order_relaxed) == 0) {
        cudaFuncAttributes attributes;
        check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), name);
        known[device].store(attributes.ptxVersion >= 90 ? 1 : -1, std::memory_order_relaxed);
    }
    return known[device].load(std::memory_order_relaxed) > 0;
}

// Launches a kernel that calls wait_for_previous_kernel() before it touches memory that the
// previous kernel in the stream may write. Blocks are numbered in x alone, where a grid has room for
// more than there is memory for; a kernel finds its place by division.
template <auto kernel, class Argument>
void launch(const char* name, int64_t blocks, int threads, size_t shared_bytes,
            const Stream& stream, const Argument& argument) {
    if (blocks > INT32_MAX) {
        throw std::invalid_argument(std::string(name) + ": got " + std::to_string(blocks) +
                                    " blocks, expected at most 2^31 - 1");
    }
    const OnDevice on_device(stream.device, name);
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream.handle);
    config.attrs = &attribute;
    config.numAttrs = waits_by_itself<kernel>(stream.device, name) ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, argument), name);
}

inline bool aligned16(const void* address, int64_t row_bytes) {
    return reinterpret_cast<uintptr_t>(address) % 16 == 0 && row_bytes % 16 == 0;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sapt_fast
