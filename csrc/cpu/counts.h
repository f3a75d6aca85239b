// Sizes of blocks, for csrc/cpu/*.cpp; internal linkage as in vec.h.
#pragma once

#include <stdint.h>

namespace sapt_fast {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Parts of `size` that hold `count`, the last of them perhaps not full.
inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace
}  // namespace sapt_fast
