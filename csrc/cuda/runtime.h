// What the CUDA part of this build and this machine's driver offer.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace sapt_fast {

struct CudaDevice {
    std::string name;
    int major;
    int minor;
    int multiprocessors;
    std::size_t memory;  // bytes
};

struct CudaRuntime {
    std::string architectures;  // those compiled in, such as "sm_80 sm_90a compute_100"
    std::string sources;        // digests of the kernels' sources, such as "mixed_lora=0a1b2c"
    int runtime_version;        // 13000 is 13.0
    int driver_version;         // 0 without a driver
    std::string error;          // why there are no devices; empty where there are
    std::vector<CudaDevice> devices;
};

// Never throws for want of a driver or a device.
CudaRuntime cuda_runtime();

}  // namespace sapt_fast
