#include "cpu/search_bindings.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <new>

#include "arguments.h"
#include "candidates.h"
#include "capability.h"
#include "cpu/key_search.h"
#include "cpu/mix_experts.h"
#include "cpu/pool_tokens.h"
#include "memory.h"
#include "threads.h"

namespace py = pybind11;

namespace sapt_fast {
namespace {

using std::int64_t;

// Bytes of lists at a time: more queries than these take another pass over the keys.
constexpr int64_t kListBytes = 1 << 25;
constexpr int64_t kMostQueries = 1024;
constexpr int64_t kFewestSpare = 32;

class NoRoomForLists : public std::bad_alloc {
   public:
    const char* what() const noexcept override {
        return "out of memory for the candidates of every query and thread: take a smaller k, "
               "fewer queries at a time or fewer threads";
    }
};

// Uninitialised memory on its own cache lines.
template <class T>
class Buffer {
   public:
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<std::size_t>(count), kLine,
                                               std::nothrow))) {
        if (data_ == nullptr) throw NoRoomForLists();
    }
    ~Buffer() { ::operator delete(data_, kLine); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    T* data() { return data_; }

   private:
    static constexpr std::align_val_t kLine{64};
    T* data_;
};

int64_t queries_per_pass(const KeySearch& search, int64_t capacity, int threads) {
    const int64_t bytes = threads * capacity * static_cast<int64_t>(sizeof(Candidate<double>));
    const int64_t queries = kListBytes / bytes / kQueryBlock * kQueryBlock;
    return std::min(search.queries, std::clamp(queries, kQueryBlock, kMostQueries));
}

// The k best of the threads' lists of every query. They gather in the first thread's list: nothing
// is allocated, since an exception could not leave a parallel region.
template <class A>
void merge(const KeySearch& search, const SearchScratch& scratch, A* scores, int64_t* index) {
    auto* lists = static_cast<Candidate<A>*>(scratch.lists);
#pragma omp parallel for num_threads(scratch.threads) schedule(static)
    for (int64_t q = 0; q < search.queries; ++q) {
        Candidate<A>* all = lists + q * scratch.capacity;
        int64_t count = scratch.counts[q];
        for (int thread = 1; thread < scratch.threads; ++thread) {
            const int64_t at = thread * search.queries + q;
            for (int64_t i = 0; i < scratch.counts[at]; ++i) {
                if (count == scratch.capacity) {
                    keep_best(all, count, search.k);
                    count = search.k;
                }
                all[count++] = lists[at * scratch.capacity + i];
            }
        }
        keep_best(all, count, search.k);
        sort_best(all, search.k);
        for (int64_t i = 0; i < search.k; ++i) {
            scores[q * search.k + i] = all[i].score;
            index[q * search.k + i] = all[i].index;
        }
    }
}

// scores [queries, k], best first, and index [queries, k].
template <class A>
void search_keys(const KeySearch& given, int threads, A* scores, int64_t* index) {
    const int64_t capacity = given.k + std::max(given.k, kFewestSpare);
    const int64_t most = queries_per_pass(given, capacity, threads);
    Buffer<A> query(most * padded_width(given));
    Buffer<A> query_scales(most);
    Buffer<Candidate<A>> lists(threads * most * capacity);
    Buffer<int64_t> counts(threads * most);
    Buffer<A> limits(threads * most);
    Buffer<A> tiles(threads * tile_size(given));
    const SearchScratch scratch = {query.data(),  query_scales.data(), lists.data(),
                                   counts.data(), limits.data(),       tiles.data(),
                                   capacity,      threads};
    const auto element = given.dtype == DType::float64   ? sizeof(double)
                         : given.dtype == DType::float32 ? sizeof(float)
                                                         : sizeof(std::uint16_t);
    for (int64_t first = 0; first < given.queries; first += most) {
        KeySearch part = given;
        part.queries = std::min(most, given.queries - first);
        part.query = static_cast<const char*>(given.query) +
                     first * given.query_stride * static_cast<int64_t>(element);
        std::fill_n(counts.data(), threads * part.queries, 0);
        std::fill_n(limits.data(), threads * part.queries, std::numeric_limits<A>::quiet_NaN());
        SAPT_FAST_PICK(key_search_kernels).search(part, scratch);
        merge(part, scratch, scores + first * given.k, index + first * given.k);
    }
}

KeySearch key_search(DType dtype, int metric, const Strided& query, const Strided& keys,
                     int64_t k) {
    require(metric >= 0 && metric <= static_cast<int>(Metric::l2), "metric: not a known code");
    require_rows("query", query, 2, size_of(dtype));
    require_rows("keys", keys, 2, size_of(dtype));
    require(query.sizes[1] > 0, "query: no columns");
    require(query.sizes[1] == keys.sizes[1], "keys: not as wide as query");
    require(k >= 1 && k <= keys.sizes[0], "k: not 1 to the number of keys");
    return {at(query.address), at(keys.address), query.sizes[0],   keys.sizes[0],
            query.sizes[1],    query.strides[0], keys.strides[0],  k,
            static_cast<Metric>(metric), dtype};
}

void topk_keys(int dtype, int metric, const Strided& query, const Strided& keys,
               const Memory& scores, const Memory& index, int64_t k, int threads) {
    const KeySearch search = key_search(dtype_of(dtype), metric, query, keys, k);
    threads = team(search.queries * search.key_count * search.width, threads);
    require_holds("scores", scores, {search.queries, k}, acc_size(search.dtype));
    require_holds("index", index, {search.queries, k}, sizeof(int64_t));
    if (search.queries == 0) return;
    if (search.dtype == DType::float64) {
        search_keys(search, threads, at<double>(scores), at<int64_t>(index));
    } else {
        search_keys(search, threads, at<float>(scores), at<int64_t>(index));
    }
}

template <class A>
void find_nearest(const KeySearch& search, const A* radius, A* distance, int64_t* index,
                  int64_t* nearest, int threads) {
    search_keys(search, threads, distance, nearest);
    for (int64_t q = 0; q < search.queries; ++q) {
        distance[q] = std::sqrt(-distance[q]);
        if (!(distance[q] < std::numeric_limits<A>::infinity())) {
            distance[q] = std::numeric_limits<A>::infinity();
            nearest[q] = -1;
        }
        const bool accepted = nearest[q] >= 0 && distance[q] <= radius[nearest[q]];
        index[q] = accepted ? nearest[q] : -1;
    }
}

void nearest_key(int dtype, const Strided& query, const Strided& keys, const Memory& radius,
                 const Memory& distance, const Memory& index, const Memory& nearest, int threads) {
    const KeySearch search =
        key_search(dtype_of(dtype), static_cast<int>(Metric::l2), query, keys, 1);
    threads = team(search.queries * search.key_count * search.width, threads);
    const int64_t acc = acc_size(search.dtype);
    require_holds("radius", radius, {search.key_count}, acc);
    require_holds("distance", distance, {search.queries}, acc);
    require_holds("index", index, {search.queries}, sizeof(int64_t));
    require_holds("nearest", nearest, {search.queries}, sizeof(int64_t));
    if (search.queries == 0) return;
    if (search.dtype == DType::float64) {
        find_nearest(search, at<const double>(radius), at<double>(distance), at<int64_t>(index),
                     at<int64_t>(nearest), threads);
    } else {
        find_nearest(search, at<const float>(radius), at<float>(distance), at<int64_t>(index),
                     at<int64_t>(nearest), threads);
    }
}

void pool_tokens_max(int dtype, const Memory& pooled, const Memory& winner, const Memory& ids,
                     const Memory& mask, const Strided& table, int64_t samples, int64_t tokens,
                     int threads) {
    const DType type = dtype_of(dtype);
    require_rows("table", table, 2, size_of(type));
    const int64_t vocabulary = table.sizes[0];
    const int64_t width = table.sizes[1];
    const PoolTokens args = {at(pooled),
                             at<std::int32_t>(winner),
                             at<const int64_t>(ids),
                             at<const std::uint8_t>(mask),
                             at(table.address),
                             samples,
                             tokens,
                             width,
                             table.strides[0],
                             type};
    require(samples >= 0 && tokens >= 0, "samples, tokens: negative");
    threads = team(samples * tokens * width, threads);
    require_holds("pooled", pooled, {samples, width}, size_of(type));
    require_holds("ids", ids, {samples, tokens}, sizeof(int64_t));
    if (mask) require_holds("mask", mask, {samples, tokens}, sizeof(std::uint8_t));
    if (winner) require_holds("winner", winner, {samples, width}, sizeof(std::int32_t));
    if (samples == 0 || width == 0) return;
    require(!winner || vocabulary <= std::numeric_limits<std::int32_t>::max(),
            "vocabulary: too large for winners of 32 bits");
    for (int64_t i = 0; i < samples * tokens; ++i) {
        const bool known = args.ids[i] >= 0 && args.ids[i] < vocabulary;
        require(known || (mask && args.mask[i] == 0), "input_ids: an id is not in [0, V)");
    }
    SAPT_FAST_PICK(pool_tokens_kernels).pool_max(args, threads);
}

void require_bank_dtype(DType dtype, DType bank_dtype) {
    require(bank_dtype == dtype || (bank_dtype == DType::float32 && dtype != DType::float64),
            "bank_dtype: neither dtype nor float32");
}

ChosenExperts chosen_experts(int dtype, int bank_dtype, const Strided& bank, const Memory& index,
                             int64_t rows, int64_t k) {
    const DType type = dtype_of(dtype);
    const DType bank_type = dtype_of(bank_dtype);
    require_bank_dtype(type, bank_type);
    require_rows("bank", bank, 3, size_of(bank_type));
    require(bank.empty() || bank.sizes[1] == 1 || bank.strides[1] == bank.sizes[2],
            "bank: gaps between the rows of an expert");
    require_holds("index", index, {rows, k}, sizeof(int64_t));
    return {at(bank.address), at<const int64_t>(index), bank.strides[0], rows, k,
            bank.sizes[0],    bank.sizes[1],            bank.sizes[2],   type, bank_type};
}

void experts_dot(int dtype, int bank_dtype, const Memory& out, const Memory& values,
                 const Strided& bank, const Memory& index, int64_t rows, int64_t k, int threads) {
    const ChosenExperts chosen = chosen_experts(dtype, bank_dtype, bank, index, rows, k);
    threads = team(rows * k * chosen.rank * chosen.width, threads);
    require_holds("out", out, {rows, k, chosen.rank}, acc_size(chosen.dtype));
    require_holds("values", values, {rows, chosen.width}, size_of(chosen.dtype));
    if (rows * k * chosen.rank == 0) return;
    SAPT_FAST_PICK(mix_experts_kernels).dot(chosen, at(out), at(values), threads);
}

void experts_sum(int dtype, int bank_dtype, const Memory& out, const Memory& coefficients,
                 const Strided& bank, const Memory& index, int64_t rows, int64_t k, int threads) {
    const ChosenExperts chosen = chosen_experts(dtype, bank_dtype, bank, index, rows, k);
    threads = team(rows * k * chosen.rank * chosen.width, threads);
    require_holds("out", out, {rows, chosen.width}, size_of(chosen.dtype));
    require_holds("coefficients", coefficients, {rows, k, chosen.rank}, acc_size(chosen.dtype));
    if (rows * chosen.width == 0) return;
    SAPT_FAST_PICK(mix_experts_kernels).sum(chosen, at(out), at(coefficients), threads);
}

void experts_grad(int dtype, int bank_dtype, const Memory& out, const Memory& coefficients,
                  const Memory& values, const Memory& order, const Memory& target, int64_t pairs,
                  int64_t out_rows, int64_t rows, int64_t k, int64_t rank, int64_t width,
                  int threads) {
    const ExpertGrad args = {at(out),
                             at(coefficients),
                             at(values),
                             at<const int64_t>(order),
                             at<const int64_t>(target),
                             pairs,
                             out_rows,
                             k,
                             rank,
                             width,
                             dtype_of(dtype),
                             dtype_of(bank_dtype)};
    require_bank_dtype(args.dtype, args.bank_dtype);
    require_holds("out", out, {out_rows, rank, width}, size_of(args.bank_dtype));
    require_holds("coefficients", coefficients, {rows, k, rank}, acc_size(args.dtype));
    require_holds("values", values, {rows, width}, size_of(args.dtype));
    require_holds("order", order, {pairs}, sizeof(int64_t));
    require_holds("target", target, {pairs}, sizeof(int64_t));
    threads = team(pairs * rank * width, threads);
    if (pairs * out_rows * rank * width == 0) return;
    for (int64_t p = 0; p < pairs; ++p) {
        require(args.order[p] >= 0 && args.order[p] < rows * k, "order: not a pair");
    }
    SAPT_FAST_PICK(mix_experts_kernels).grad(args, threads);
}

}  // namespace

void bind_searches(py::module_& m) {
    using py::arg;
    m.attr("METRIC_DOT") = static_cast<int>(Metric::dot);
    m.attr("METRIC_COSINE") = static_cast<int>(Metric::cosine);
    m.attr("METRIC_L2") = static_cast<int>(Metric::l2);
    m.def("topk_keys", &topk_keys, arg("dtype"), arg("metric"), arg("query"), arg("keys"),
          arg("scores"), arg("index"), arg("k"), arg("threads"),
          py::call_guard<py::gil_scoped_release>(), "The k best keys of every query.");
    m.def("nearest_key", &nearest_key, arg("dtype"), arg("query"), arg("keys"), arg("radius"),
          arg("distance"), arg("index"), arg("nearest"), arg("threads"),
          py::call_guard<py::gil_scoped_release>(),
          "The nearest key of every query, and whether it lies within its radius.");
    m.def("pool_tokens_max", &pool_tokens_max, arg("dtype"), arg("pooled"), arg("winner"),
          arg("ids"), arg("mask"), arg("table"), arg("samples"), arg("tokens"), arg("threads"),
          py::call_guard<py::gil_scoped_release>(),
          "The maximum of the embeddings of every sample's tokens.");
    m.def("experts_dot", &experts_dot, arg("dtype"), arg("bank_dtype"), arg("out"), arg("values"),
          arg("bank"), arg("index"), arg("rows"), arg("k"), arg("threads"),
          py::call_guard<py::gil_scoped_release>(),
          "Products of every row with the rows of its experts.");
    m.def("experts_sum", &experts_sum, arg("dtype"), arg("bank_dtype"), arg("out"),
          arg("coefficients"), arg("bank"), arg("index"), arg("rows"), arg("k"), arg("threads"),
          py::call_guard<py::gil_scoped_release>(), "The weighted sum of every row's experts.");
    m.def("experts_grad", &experts_grad, arg("dtype"), arg("bank_dtype"), arg("out"),
          arg("coefficients"), arg("values"), arg("order"), arg("target"), arg("pairs"),
          arg("out_rows"), arg("rows"), arg("k"), arg("rank"), arg("width"), arg("threads"),
          py::call_guard<py::gil_scoped_release>(), "The gradient of a bank of experts.");
}

}  // namespace sapt_fast
