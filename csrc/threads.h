// How many threads a piece of work on the CPU gets.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace sapt_fast {

// Threads for so many multiplications: all or one. Teams of changing sizes would make the OpenMP
// runtime end and start threads.
inline int team(std::int64_t work, int threads) {
    require(threads > 0, "threads: not positive");
    constexpr std::int64_t kWorthSharing = 1 << 15;
    return work < kWorthSharing ? 1 : threads;
}

}  // namespace sapt_fast
