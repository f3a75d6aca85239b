// The best of a list of scored keys. Compiled once, for every CPU: the kernels of csrc/cpu call
// this seldom, and templates of the standard library must not be instantiated there.
#pragma once

#include <stdint.h>

namespace sapt_fast {

template <class A>
struct Candidate {
    A score;
    int64_t index;
};

// Moves the k best to the front, the worst of them to place k - 1; 1 <= k <= count. Better is the
// larger score, of equal ones the lower index; NaN is worse than everything.
void keep_best(Candidate<float>* list, int64_t count, int64_t k);
void keep_best(Candidate<double>* list, int64_t count, int64_t k);

// Best first.
void sort_best(Candidate<float>* list, int64_t count);
void sort_best(Candidate<double>* list, int64_t count);

}  // namespace sapt_fast
