#include "cpu/dropout.h"

#include "cpu/counts.h"

namespace sapt_fast {
namespace {

constexpr int kRounds = 10;
constexpr int64_t kCounters = 16;                  // at a time, for vectors
constexpr int64_t kColumns = 4 * kCounters;        // that they serve
constexpr int64_t kGroups = kDropBlock / 4;        // counters of a line of a block
constexpr int64_t kLines = kDropBlock / 2;         // pairs of rows m, m + 8

// Philox 4x32-10 (Salmon et al., 2011) of counters (group + j, line, 0, 0): four words of each.
inline void philox(uint32_t words[4][kCounters], uint64_t seed, uint32_t group, uint32_t line) {
    uint32_t* c0 = words[0];
    uint32_t* c1 = words[1];
    uint32_t* c2 = words[2];
    uint32_t* c3 = words[3];
    for (int64_t j = 0; j < kCounters; ++j) {
        c0[j] = group + static_cast<uint32_t>(j);
        c1[j] = line;
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

// keep[half of the block's rows][column], of columns [start, start + kColumns)
inline void fill_mask(bool keep[2][kColumns], const Dropout& args, int64_t line, int64_t start) {
    uint32_t words[4][kCounters];
    philox(words, args.seed, static_cast<uint32_t>(start / kDropBlock * kGroups),
           static_cast<uint32_t>(line));
    for (int64_t word = 0; word < 4; ++word) {
        bool* row = keep[word / 2] + word % 2 * kLines;
        for (int64_t j = 0; j < kCounters; ++j) {
            bool* pair = row + j / kGroups * kDropBlock + j % kGroups * 2;
            pair[0] = (words[word][j] & 0xffffu) >= args.drops;
            pair[1] = (words[word][j] >> 16) >= args.drops;
        }
    }
}

template <class T>
void drop(const Dropout& args, int threads) {
    const int64_t lines = parts(args.rows, kDropBlock) * kLines;
    const int64_t before = args.first_row / kDropBlock * kLines;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t line = 0; line < lines; ++line) {
        const int64_t row = line / kLines * kDropBlock + line % kLines;
        for (int64_t start = 0; start < args.columns; start += kColumns) {
            bool keep[2][kColumns];
            fill_mask(keep, args, before + line, start);
            const int64_t count = smaller(kColumns, args.columns - start);
            for (int64_t half = 0; half < 2; ++half) {
                const int64_t own = row + half * kLines;
                if (own >= args.rows) break;
                const T* x = static_cast<const T*>(args.x) + own * args.columns + start;
                T* out = static_cast<T*>(args.out) + own * args.columns + start;
                for (int64_t i = 0; i < count; ++i) out[i] = keep[half][i] ? x[i] : T(0);
            }
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
