#include "cuda/bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cuda/mix_prompts.h"
#include "cuda/mixed_lora.h"
#include "cuda/nearest_key.h"
#include "cuda/route.h"
#include "cuda/topk_keys.h"
#include "memory.h"

namespace py = pybind11;

namespace sapt_fast {
namespace {

DType supported(int dtype) {
    const DType type = dtype_of(dtype);
    require(type != DType::float64, "dtype: float64 has no CUDA kernel");
    return type;
}

typedef std::pair<int, Address> Place;  // index of a device, one of its streams

Stream stream_of(const Place& place) { return {place.first, at(place.second)}; }

// Raises unless scratch memory has so many elements, of so many bytes.
void require_workspace(const Memory& workspace, std::int64_t count, std::int64_t element) {
    require(count == 0 || (workspace && workspace.bytes / element >= count),
            "workspace: too small");
}

// y, weight, bias, lora_a, lora_b, row_adapter, row_scale; ranks, outputs; whether to add to y
using Member = std::tuple<Memory, Memory, Memory, Memory, Memory, Memory, Memory, std::int64_t,
                          std::int64_t, bool>;

void decode(int dtype, int lora_dtype, const Memory& x, const Memory& mixture,
            const std::vector<Member>& projections, const Memory& workspace, std::int64_t rows,
            std::int64_t inputs, std::int64_t samples, std::int64_t adapters, const Place& place) {
    require(projections.size() <= kMaxProjections, "projections: more than MAX_PROJECTIONS");
    require(rows >= 0 && inputs >= 0 && adapters > 0, "rows, inputs, adapters: negative or zero");
    require(rows == 0 || (samples > 0 && rows % samples == 0), "samples: does not divide rows");
    DecodeGroup group = {};
    group.count = static_cast<int>(projections.size());
    group.x = at(x);
    group.mixture = at<const float>(mixture);
    group.workspace = at<float>(workspace);
    group.rows = rows;
    group.samples = samples;
    group.adapters = adapters;
    group.inputs = inputs;
    group.dtype = supported(dtype);
    group.lora_dtype = dtype_of(lora_dtype);
    require(group.lora_dtype == group.dtype || group.lora_dtype == DType::float32,
            "lora_dtype: neither dtype nor float32");
    if (rows == 0) return;
    require_holds("x", x, {rows, inputs}, size_of(group.dtype));
    require_holds("mixture", mixture, {samples, adapters}, sizeof(float));
    const std::int64_t lora_size = size_of(group.lora_dtype);
    std::int64_t total_ranks = 0;
    for (int p = 0; p < group.count; ++p) {
        const auto& [y, weight, bias, a, b, row_adapter, row_scale, ranks, outputs, accumulate] =
            projections[p];
        require(!weight || rows <= kMaxBaseRows, "weight: more than MAX_BASE_ROWS rows");
        require_holds("y", y, {rows, outputs}, size_of(group.dtype));
        if (weight) require_holds("weight", weight, {outputs, inputs}, size_of(group.dtype));
        if (bias) require_holds("bias", bias, {outputs}, size_of(group.dtype));
        require_holds("lora_a", a, {ranks, inputs}, lora_size);
        require_holds("lora_b", b, {ranks, outputs}, lora_size);
        require_holds("row_adapter", row_adapter, {ranks}, sizeof(std::int32_t));
        require_holds("row_scale", row_scale, {ranks}, sizeof(float));
        group.projections[p] = {at(y),
                                at(weight),
                                at(bias),
                                at(a),
                                at(b),
                                at<const std::int32_t>(row_adapter),
                                at<const float>(row_scale),
                                ranks,
                                outputs,
                                accumulate};
        total_ranks += ranks;
    }
    require_workspace(workspace, mixed_lora_workspace(rows, inputs, total_ranks), sizeof(float));
    mixed_lora_decode(group, stream_of(place));
}

void search_nearest(int dtype, const Memory& query, const Memory& keys, const Memory& radius,
                    const Memory& distance, const Memory& index, const Memory& nearest,
                    const Memory& workspace, std::int64_t queries, std::int64_t count,
                    std::int64_t width, const Place& place) {
    const DType type = supported(dtype);
    require(queries >= 0 && width >= 0, "queries, width: negative");
    require(count > 0 && count < kMaxKeys, "count: no keys, or 2^32 and more");
    if (queries == 0) return;
    require_holds("query", query, {queries, width}, size_of(type));
    require_holds("keys", keys, {count, width}, size_of(type));
    require_holds("radius", radius, {count}, sizeof(float));
    require_holds("distance", distance, {queries}, sizeof(float));
    require_holds("index", index, {queries}, sizeof(std::int64_t));
    require_holds("nearest", nearest, {queries}, sizeof(std::int64_t));
    require_workspace(workspace, nearest_key_workspace(queries, count), sizeof(std::uint64_t));
    nearest_key({at(query), at(keys), at<const float>(radius), at<float>(distance),
                 at<std::int64_t>(index), at<std::int64_t>(nearest), at<std::uint64_t>(workspace),
                 queries, count, width, type},
                stream_of(place));
}

using Typed = std::pair<Memory, int>;  // tensor, dtype

// The tensor, which holds exactly the elements of `shape`.
TypedAddress typed(const char* name, const Typed& tensor,
                   std::initializer_list<std::int64_t> shape) {
    const DType type = supported(tensor.second);
    require_holds(name, tensor.first, shape, size_of(type));
    return {at(tensor.first), type};
}

void route_samples(const Typed& pooled, const std::vector<Typed>& projection, const Typed& keys,
                   const Memory& workspace, const Memory& scores, const Memory& weights,
                   std::int64_t samples, std::int64_t width, std::int64_t hidden,
                   std::int64_t key_width, std::int64_t count, std::int64_t top_k, float eps,
                   float divisor, float threshold, int gate, bool cosine, bool scales,
                   const Place& place) {
    require(samples >= 0 && width >= 0 && hidden >= 0 && key_width >= 0 && count >= 0,
            "samples, width, hidden, key_width, count: negative");
    const std::size_t parts = projection.size();
    require(parts == 0 || parts == 2 || parts == 4, "projection: not 2 or 4 tensors");
    require(parts == 2 || key_width == width, "key_width: not that of the queries");
    require(gate >= 0 && gate <= static_cast<int>(Gate::relu), "gate: not a known code");
    require(!weights || count <= kMaxRoutedKeys, "count: more than MAX_ROUTED_KEYS");
    require(!weights || top_k >= 1, "top_k: below 1");
    if (samples == 0 || count == 0) return;
    require_holds("scores", scores, {samples, count}, sizeof(float));
    if (weights) require_holds("weights", weights, {samples, count}, sizeof(float));
    Route arguments = {};
    arguments.pooled = typed("pooled", pooled, {samples, width});
    arguments.of_keys = parts == 2;
    if (arguments.of_keys) {
        arguments.down = typed("projection.down", projection[0], {count, hidden, width});
        arguments.up = typed("projection.up", projection[1], {count, key_width, hidden});
        require_workspace(workspace, samples * count * (hidden + key_width), sizeof(float));
    } else if (parts == 4) {
        arguments.down = typed("projection.down", projection[0], {hidden, width});
        arguments.up = typed("projection.up", projection[1], {width, hidden});
        arguments.norm_weight = typed("projection.norm_weight", projection[2], {width});
        arguments.norm_bias = typed("projection.norm_bias", projection[3], {width});
        require_workspace(workspace, samples * (hidden + width), sizeof(float));
    }
    arguments.keys = typed("keys", keys, {count, key_width});
    arguments.workspace = at<float>(workspace);
    arguments.scores = at<float>(scores);
    arguments.weights = at<float>(weights);
    arguments.samples = samples;
    arguments.width = width;
    arguments.key_width = key_width;
    arguments.hidden = hidden;
    arguments.count = count;
    arguments.top_k = top_k;
    arguments.eps = eps;
    arguments.divisor = divisor;
    arguments.threshold = threshold;
    arguments.gate = static_cast<Gate>(gate);
    arguments.cosine = cosine;
    arguments.scales = scales;
    route(arguments, stream_of(place));
}

// Embeddings [samples, tokens, width], or with `ids` the table [vocabulary, width] of their rows.
void prompts_and_embeds(const Typed& prompts, const Memory& mixture, const Strided& source,
                        int source_dtype, const Memory& ids, bool wide_ids, const Memory& out,
                        std::int64_t samples, std::int64_t adapters, std::int64_t length,
                        std::int64_t tokens, std::int64_t width, const Place& place) {
    require(samples >= 0 && adapters >= 0 && length >= 0 && tokens >= 0 && width >= 0,
            "samples, adapters, length, tokens, width: negative");
    const DType type = supported(source_dtype);
    const bool gathers = ids.address != 0;
    if (samples == 0 || length + tokens == 0 || width == 0) return;
    const std::int64_t id_size = wide_ids ? sizeof(std::int64_t) : sizeof(std::int32_t);
    if (gathers) require_holds("ids", ids, {samples, tokens}, id_size);
    require_rows("source", source, gathers ? 2 : 3, size_of(type));
    const int last = source.dims - 1;
    require(source.sizes[last] == width, "source: not as wide as prompts");
    require(gathers || (source.sizes[0] == samples && source.sizes[1] == tokens),
            "source: not [samples, tokens, width]");
    require_holds("out", out, {samples, length + tokens, width}, size_of(type));
    require_holds("mixture", mixture, {samples, adapters}, sizeof(float));
    const TypedAddress mixed = typed("prompts", prompts, {adapters, length, width});
    require(mixed.dtype == type || mixed.dtype == DType::float32,
            "prompts: neither source's dtype nor float32");
    mix_prompts({mixed.data, mixed.dtype, at<const float>(mixture), at(source.address), type,
                 at(ids), wide_ids, at(out), samples, adapters, length, tokens, width,
                 gathers ? source.sizes[0] : 0, gathers ? 0 : source.strides[0],
                 source.strides[last - 1]},
                stream_of(place));
}

void search_best(int dtype, int metric, const Memory& query, const Memory& keys,
                 const Memory& scores, const Memory& index, const Memory& workspace,
                 std::int64_t queries, std::int64_t count, std::int64_t width, std::int64_t k,
                 const Place& place) {
    const DType type = supported(dtype);
    require(queries >= 0 && width >= 0, "queries, width: negative");
    require(count > 0 && count < kMaxKeys, "count: no keys, or 2^32 and more");
    require(k >= 1 && k <= count && k <= kMaxTopK, "k: not in 1 to count, or more than MAX_TOP_K");
    require(metric >= 0 && metric <= static_cast<int>(Metric::l2), "metric: not a known code");
    if (queries == 0) return;
    require_holds("query", query, {queries, width}, size_of(type));
    require_holds("keys", keys, {count, width}, size_of(type));
    require_holds("scores", scores, {queries, k}, sizeof(float));
    require_holds("index", index, {queries, k}, sizeof(std::int64_t));
    require_workspace(workspace, topk_keys_workspace(queries, count), sizeof(std::uint64_t));
    topk_keys({at(query), at(keys), at<float>(scores), at<std::int64_t>(index),
               at<std::uint64_t>(workspace), queries, count, width, static_cast<int>(k),
               static_cast<Metric>(metric), type},
              stream_of(place));
}

}  // namespace

void bind_cuda(py::module_& m) {
    using py::arg;
    m.attr("MAX_PROJECTIONS") = kMaxProjections;
    m.attr("MAX_BASE_ROWS") = kMaxBaseRows;
    m.def("cuda_mixed_lora_workspace", &mixed_lora_workspace, arg("rows"), arg("inputs"),
          arg("total_ranks"), "Floats of scratch memory that cuda_mixed_lora_decode needs.");
    m.def("cuda_mixed_lora_decode", &decode, arg("dtype"), arg("lora_dtype"), arg("x"),
          arg("mixture"), arg("projections"), arg("workspace"), arg("rows"),
          arg("inputs"), arg("samples"), arg("adapters"), arg("place"),
          py::call_guard<py::gil_scoped_release>(),
          "The mixture of every projection of x, for a few rows, in two launches.");
    m.def("cuda_nearest_key_workspace", &nearest_key_workspace, arg("queries"), arg("count"),
          "64-bit words of scratch memory that cuda_nearest_key needs.");
    m.def("cuda_nearest_key", &search_nearest, arg("dtype"), arg("query"), arg("keys"),
          arg("radius"), arg("distance"), arg("index"), arg("nearest"), arg("workspace"),
          arg("queries"), arg("count"), arg("width"), arg("place"),
          py::call_guard<py::gil_scoped_release>(), "The nearest key of every query.");
    m.attr("MAX_TOP_K") = kMaxTopK;
    m.def("cuda_topk_keys_workspace", &topk_keys_workspace, arg("queries"), arg("count"),
          "64-bit words of scratch memory that cuda_topk_keys needs.");
    m.def("cuda_topk_keys", &search_best, arg("dtype"), arg("metric"), arg("query"), arg("keys"),
          arg("scores"), arg("index"), arg("workspace"), arg("queries"),
          arg("count"), arg("width"), arg("k"), arg("place"),
          py::call_guard<py::gil_scoped_release>(), "The k best keys of every query.");
    m.attr("MAX_ROUTED_KEYS") = kMaxRoutedKeys;
    m.def("cuda_route", &route_samples, arg("pooled"), arg("projection"), arg("keys"),
          arg("workspace"), arg("scores"), arg("weights"), arg("samples"),
          arg("width"), arg("hidden"), arg("key_width"), arg("count"), arg("top_k"), arg("eps"),
          arg("divisor"), arg("threshold"), arg("gate"), arg("cosine"), arg("scales"),
          arg("place"), py::call_guard<py::gil_scoped_release>(),
          "Scores, and weights unless they are None, of every key for each sample.");
    m.def("cuda_mix_prompts", &prompts_and_embeds, arg("prompts"), arg("mixture"), arg("source"),
          arg("source_dtype"), arg("ids"), arg("wide_ids"), arg("out"), arg("samples"),
          arg("adapters"), arg("length"), arg("tokens"), arg("width"), arg("place"), py::call_guard<py::gil_scoped_release>(),
          "Each sample's mixture of prompts, followed by its embeddings.");
}

}  // namespace sapt_fast
