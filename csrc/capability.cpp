#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sapt_fast {
namespace {

std::atomic<Capability> current{Capability::default_};

constexpr Capability kAll[] = {Capability::default_, Capability::avx2, Capability::avx512,
                               Capability::avx512_bf16};

bool cpu_supports(Capability capability) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    switch (capability) {
        case Capability::avx512_bf16:
            return __builtin_cpu_supports("avx512bf16") && cpu_supports(Capability::avx512);
        case Capability::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   cpu_supports(Capability::avx2);
        case Capability::avx2:
            // Every CPU with AVX2 has F16C; compilers know no name for it here before GCC 13.
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Capability::default_:
            return true;
    }
#endif
    return capability == Capability::default_;
}

#if defined(__x86_64__)
// Compilers know no name for AVX512-FP16 before GCC 12.
bool cpu_has_avx512_fp16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & (1u << 23)) != 0;
}
#endif

}  // namespace

const char* name_of(Capability capability) {
    switch (capability) {
        case Capability::avx512_bf16:
            return "avx512_bf16";
        case Capability::avx512:
            return "avx512";
        case Capability::avx2:
            return "avx2";
        case Capability::default_:
            break;
    }
    return "default";
}

std::vector<Capability> supported_capabilities() {
    std::vector<Capability> found;
    for (Capability capability : kAll) {
        if (cpu_supports(capability)) found.push_back(capability);
    }
    return found;
}

Capability current_capability() { return current.load(std::memory_order_relaxed); }

void set_capability(const std::string& name) {
    std::string supported;
    for (Capability capability : supported_capabilities()) {
        if (name == name_of(capability)) {
            current.store(capability, std::memory_order_relaxed);
            return;
        }
        supported += std::string(supported.empty() ? "" : ", ") + name_of(capability);
    }
    throw std::invalid_argument("CPU capability '" + name + "': this CPU offers " + supported);
}

bool multiplies(DType dtype) {
#if defined(__x86_64__)
    static const bool has_fp16 = cpu_has_avx512_fp16();
    const bool newest = current_capability() == Capability::avx512_bf16;
    if (dtype == DType::bfloat16) return newest;
    if (dtype == DType::float16) return newest && has_fp16;
#else
    (void)dtype;
#endif
    return true;
}

void init_capability() {
    const char* asked = std::getenv("SAPT_FAST_CPU_CAPABILITY");
    if (asked != nullptr && *asked != '\0') {
        set_capability(asked);
    } else {
        current.store(supported_capabilities().back(), std::memory_order_relaxed);
    }
}

}  // namespace sapt_fast
