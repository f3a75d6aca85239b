// What the tests ask of the emulator; the kernels' side of it is in cuda_runtime.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emulation {

// The order in which blocks, threads and overlapping kernels run; 0 is ascending.
void set_order(uint64_t seed);

// The next launch fails with an error of CUDA's, by its number, and runs nothing.
void refuse_next(int status);

// A kernel that copies, and is still pending when the next one starts, unless the order says else.
void copy_late(void* to, const void* from, size_t bytes);

// No grid may have more blocks in y or z from now on; CUDA's own limit is the default.
void limit_grid(unsigned blocks);

// Runs what is pending. Throws std::runtime_error for a kernel that broke the rules.
void synchronize();

}  // namespace emulation
