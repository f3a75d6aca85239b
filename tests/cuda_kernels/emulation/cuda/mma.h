// In the place of csrc/cuda/mma.h, whose comment says what lies where.
#pragma once

#include "cuda/vec.h"

namespace sapt_fast {

// COUNT registers of every lane, each holding two elements of T.
template <class T, int COUNT>
struct Fragments {
    unsigned registers[COUNT][kWarp];

    explicit Fragments(const unsigned (&own)[COUNT]) {
        for (int i = 0; i < COUNT; ++i) {
            const uint64_t* all = emulation::exchange(own[i]);
            for (int lane = 0; lane < kWarp; ++lane) {
                registers[i][lane] = static_cast<unsigned>(all[lane]);
            }
        }
    }

    float at(int index, int lane, int half) const {
        const auto bits = static_cast<uint16_t>(registers[index][lane] >> (16 * half));
        T value;
        memcpy(&value, &bits, sizeof value);
        return to_float(value);
    }
};

template <class T>
inline void multiply_add(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const Fragments<T, 4> all_a(a);
    const Fragments<T, 2> all_b(b);
    const int lane = threadIdx.x % kWarp;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8;
        const int column = lane % 4 * 2 + i % 2;
        double total = sum[i];
        for (int k = 0; k < 16; ++k) {
            const int owner = k % 8 / 2;
            total += static_cast<double>(all_a.at(row / 8 + k / 8 * 2, row % 8 * 4 + owner, k % 2)) *
                     all_b.at(k / 8, column * 4 + owner, k % 2);
        }
        sum[i] = static_cast<float>(total);
    }
}

}  // namespace sapt_fast
