// Which instruction set the CPU kernels use; chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "dtype.h"

namespace sapt_fast {

enum class Capability { default_, avx2, avx512, avx512_bf16 };

const char* name_of(Capability capability);

// Those of this CPU, lowest first.
std::vector<Capability> supported_capabilities();

// The one in use: the best one, or SAPT_FAST_CPU_CAPABILITY.
Capability current_capability();

// Throws std::invalid_argument for an unknown name and for what this CPU lacks.
void set_capability(const std::string& name);

// Whether libraries multiply matrices of the dtype as fast as of float32 with the capability in use.
// Of CPUs other than x86 nothing is known: true.
bool multiplies(DType dtype);

// Reads SAPT_FAST_CPU_CAPABILITY; throws as set_capability does.
void init_capability();

// That one of the tables of kernels which is compiled for the capability in use.
template <class Table>
const Table& pick(const Table& baseline, const Table& avx2, const Table& avx512,
                  const Table& avx512_bf16) {
    switch (current_capability()) {
        case Capability::avx512_bf16:
            return avx512_bf16;
        case Capability::avx512:
            return avx512;
        case Capability::avx2:
            return avx2;
        case Capability::default_:
            break;
    }
    return baseline;
}

}  // namespace sapt_fast
