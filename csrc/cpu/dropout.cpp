#include "cpu/dropout.h"

#include "cpu/counts.h"

namespace sapt_fast {
namespace {

constexpr int kRounds = 10;
constexpr int64_t kGroup = 8;       // columns of a counter
constexpr int64_t kCounters = 16;  // at a time, for vectors
constexpr int64_t kColumns = kGroup * kCounters;

// Philox 4x32-10 (Salmon et al., 2011) of counters (group + j, row, 0, 0): four words of each.
inline void philox(uint32_t words[4][kCounters], uint64_t seed, uint32_t group, uint32_t row) {
    uint32_t* c0 = words[0];
    uint32_t* c1 = words[1];
    uint32_t* c2 = words[2];
    uint32_t* c3 = words[3];
    for (int64_t j = 0; j < kCounters; ++j) {
        c0[j] = group + static_cast<uint32_t>(j);
        c1[j] = row;
        c2[j] = 0;
        c3[j] = 0;
    }
    uint32_t low = static_cast<uint32_t>(seed);
    uint32_t high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
        for (int64_t j = 0; j < kCounters; ++j) {
            const uint64_t a = uint64_t(0xD2511F53u) * c0[j];
            const uint64_t b = uint64_t(0xCD9E8D57u) * c2[j];
            c0[j] = static_cast<uint32_t>(b >> 32) ^ c1[j] ^ low;
            c2[j] = static_cast<uint32_t>(a >> 32) ^ c3[j] ^ high;
            c1[j] = static_cast<uint32_t>(b);
            c3[j] = static_cast<uint32_t>(a);
        }
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
}

// keep[column], of columns [start, start + kColumns) of a row of the mask
inline void fill_mask(bool* keep, const Dropout& args, int64_t row, int64_t start) {
    uint32_t words[4][kCounters];
    philox(words, args.seed, static_cast<uint32_t>(start / kGroup), static_cast<uint32_t>(row));
    for (int64_t j = 0; j < kCounters; ++j) {
        for (int64_t word = 0; word < 4; ++word) {
            keep[j * kGroup + 2 * word] = (words[word][j] & 0xffffu) >= args.drops;
            keep[j * kGroup + 2 * word + 1] = (words[word][j] >> 16) >= args.drops;
        }
    }
}

template <class T>
void drop(const Dropout& args, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < args.rows; ++row) {
        for (int64_t start = 0; start < args.columns; start += kColumns) {
            bool keep[kColumns];
            fill_mask(keep, args, args.first_row + row, start);
            const int64_t count = smaller(kColumns, args.columns - start);
            const T* x = static_cast<const T*>(args.x) + row * args.columns + start;
            T* out = static_cast<T*>(args.out) + row * args.columns + start;
            for (int64_t i = 0; i < count; ++i) out[i] = keep[i] ? x[i] : T(0);
        }
    }
}

void drop_any(const Dropout& args, int threads) {
    switch (args.element) {  // bits are copied: the type of the number does not matter
        case 2:
            return drop<uint16_t>(args, threads);
        case 4:
            return drop<uint32_t>(args, threads);
        default:
            return drop<uint64_t>(args, threads);
    }
}

}  // namespace

namespace SAPT_FAST_CAPABILITY {
extern const DropoutKernels dropout_kernels = {drop_any};
}

}  // namespace sapt_fast
