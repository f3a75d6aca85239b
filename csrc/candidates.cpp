#include "candidates.h"

#include <algorithm>

namespace sapt_fast {
namespace {

template <class A>
bool better(const Candidate<A>& a, const Candidate<A>& b) {
    if (a.score > b.score) return true;
    if (a.score < b.score) return false;
    const bool a_undefined = a.score != a.score;
    const bool b_undefined = b.score != b.score;
    return a_undefined != b_undefined ? b_undefined : a.index < b.index;
}

template <class A>
void keep(Candidate<A>* list, int64_t count, int64_t k) {
    std::nth_element(list, list + k - 1, list + count, better<A>);
}

}  // namespace

void keep_best(Candidate<float>* list, int64_t count, int64_t k) { keep(list, count, k); }
void keep_best(Candidate<double>* list, int64_t count, int64_t k) { keep(list, count, k); }

void sort_best(Candidate<float>* list, int64_t count) {
    std::sort(list, list + count, better<float>);
}
void sort_best(Candidate<double>* list, int64_t count) {
    std::sort(list, list + count, better<double>);
}

}  // namespace sapt_fast
