#include "cuda/runtime.h"

#include <cuda_runtime_api.h>

namespace sapt_fast {

CudaRuntime cuda_runtime() {
    CudaRuntime report{SAPT_FAST_CUDA_ARCHS, SAPT_FAST_CUDA_SOURCES, 0, 0, "", {}};
    cudaRuntimeGetVersion(&report.runtime_version);
    cudaDriverGetVersion(&report.driver_version);
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    for (int index = 0; index < count && status == cudaSuccess; ++index) {
        cudaDeviceProp properties;
        status = cudaGetDeviceProperties(&properties, index);
        if (status != cudaSuccess) break;
        report.devices.push_back({properties.name, properties.major, properties.minor,
                                  properties.multiProcessorCount, properties.totalGlobalMem});
    }
    if (status != cudaSuccess) {
        report.error = cudaGetErrorString(status);
        cudaGetLastError();  // a failed query must not surface at somebody's next launch
    }
    return report;
}

}  // namespace sapt_fast
