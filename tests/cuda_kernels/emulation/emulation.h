// What the tests ask of the emulator; the kernels' side of it is in cuda_runtime.h.
#pragma once

#include <stdint.h>

namespace emulation {

// The order in which blocks, threads and overlapping kernels run; 0 is ascending.
void set_order(uint64_t seed);

// The next launch fails with an error of CUDA's, by its number, and runs nothing.
void refuse_next(int status);

// Runs what is pending. Throws std::runtime_error for a kernel that broke the rules.
void synchronize();

}  // namespace emulation
