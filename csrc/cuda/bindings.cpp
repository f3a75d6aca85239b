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
#include "cuda/router.h"
#include "cuda/topk_keys.h"

namespace py = pybind11;

namespace sapt_fast {
namespace {

DType supported(int dtype) {
    const DType type = dtype_of(dtype);
    require(type != DType::float64, "dtype: float64 has no CUDA kernel");
    return type;
}

// y, lora_a, lora_b, row_adapter, row_scale; ranks, outputs; whether to add to y
using Projection = std::tuple<Address, Address, Address, Address, Address, std::int64_t,
                              std::int64_t, bool>;

void decode(int dtype, int lora_dtype, Address x, Address mixture,
            const std::vector<Projection>& projections, Address workspace,
            std::int64_t workspace_size, std::int64_t rows, std::int64_t inputs,
            std::int64_t samples, std::int64_t adapters, Address stream) {
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
    std::int64_t total_ranks = 0;
    for (int p = 0; p < group.count; ++p) {
        const auto& [y, a, b, row_adapter, row_scale, ranks, outputs, accumulate] = projections[p];
        require(ranks >= 0 && outputs >= 0, "ranks, outputs: negative");
        require(outputs == 0 || y, "y: null address");
        require(ranks == 0 || inputs == 0 || (a && x), "lora_a, x: null address");
        require(ranks == 0 || outputs == 0 || b, "lora_b: null address");
        require(ranks == 0 || (mixture && row_adapter && row_scale), "mixture: null address");
        group.projections[p] = {at(y),
                                at(a),
                                at(b),
                                at<const std::int32_t>(row_adapter),
                                at<const float>(row_scale),
                                ranks,
                                outputs,
                                accumulate};
        total_ranks += ranks;
    }
    const std::int64_t needed = mixed_lora_workspace(rows, inputs, total_ranks);
    require(workspace_size >= needed && (needed == 0 || workspace), "workspace: too small");
    mixed_lora_decode(group, at(stream));
}

void search_nearest(int dtype, Address query, Address keys, Address radius, Address distance,
                    Address index, Address nearest, Address workspace, std::int64_t workspace_size,
                    std::int64_t queries, std::int64_t count, std::int64_t width, Address stream) {
    require(queries >= 0 && width >= 0, "queries, width: negative");
    require(count > 0 && count < kMaxKeys, "count: no keys, or 2^32 and more");
    if (queries == 0) return;
    require(query && keys && radius, "query, keys, radius: null address");
    require(distance && index && nearest, "distance, index, nearest: null address");
    require(workspace && workspace_size >= nearest_key_workspace(queries, count),
            "workspace: too small");
    nearest_key({at(query), at(keys), at<const float>(radius), at<float>(distance),
                 at<std::int64_t>(index), at<std::int64_t>(nearest), at<std::uint64_t>(workspace),
                 queries, count, width, supported(dtype)},
                at(stream));
}

using Typed = std::pair<Address, int>;  // address, dtype

TypedAddress typed(const Typed& tensor) { return {at(tensor.first), supported(tensor.second)}; }

void route_samples(const Typed& pooled, const std::vector<Typed>& projection, const Typed& keys,
                   Address workspace, std::int64_t workspace_size, Address scores, Address weights,
                   std::int64_t samples, std::int64_t width, std::int64_t hidden,
                   std::int64_t count, std::int64_t top_k, float eps, float divisor,
                   float threshold, Address stream) {
    require(samples >= 0 && samples <= 65535, "samples: negative, or more than 65535");
    require(width >= 0 && hidden >= 0 && count >= 0, "width, hidden, count: negative");
    require(projection.empty() || projection.size() == 4, "projection: not 4 tensors");
    require(!weights || count <= kMaxRoutedKeys, "count: more than MAX_ROUTED_KEYS");
    require(!weights || top_k >= 1, "top_k: below 1");
    if (samples == 0 || count == 0) return;
    require(scores && (width == 0 || (pooled.first && keys.first)), "pooled, keys: null address");
    Route arguments = {};
    arguments.pooled = typed(pooled);
    if (!projection.empty()) {
        TypedAddress* const parts[] = {&arguments.down, &arguments.up, &arguments.norm_weight,
                                       &arguments.norm_bias};
        for (int i = 0; i < 4; ++i) {
            require(projection[i].first != 0, "projection: null address");
            *parts[i] = typed(projection[i]);
        }
        require(workspace && workspace_size >= samples * (hidden + width), "workspace: too small");
    }
    arguments.keys = typed(keys);
    arguments.workspace = at<float>(workspace);
    arguments.scores = at<float>(scores);
    arguments.weights = at<float>(weights);
    arguments.samples = samples;
    arguments.width = width;
    arguments.hidden = hidden;
    arguments.count = count;
    arguments.top_k = top_k;
    arguments.eps = eps;
    arguments.divisor = divisor;
    arguments.threshold = threshold;
    route(arguments, at(stream));
}

void prompts_and_embeds(const Typed& prompts, Address mixture, const Typed& source, Address ids,
                        bool wide_ids, Address out, std::int64_t samples, std::int64_t adapters,
                        std::int64_t length, std::int64_t tokens, std::int64_t width,
                        std::int64_t vocabulary, std::int64_t sample_stride,
                        std::int64_t row_stride, Address stream) {
    require(samples >= 0 && adapters >= 0 && length >= 0 && tokens >= 0 && width >= 0,
            "samples, adapters, length, tokens, width: negative");
    require(samples <= 65535, "samples: more than 65535");
    if (samples == 0 || length + tokens == 0 || width == 0) return;
    require(out != 0, "out: null address");
    require(adapters == 0 || length == 0 || (prompts.first && mixture),
            "prompts, mixture: null address");
    require(tokens == 0 || source.first || (ids && vocabulary == 0), "source: null address");
    const TypedAddress from = typed(source);
    const TypedAddress mixed = typed(prompts);
    require(mixed.dtype == from.dtype || mixed.dtype == DType::float32,
            "prompts: neither source's dtype nor float32");
    mix_prompts({mixed.data, mixed.dtype, at<const float>(mixture), from.data, from.dtype, at(ids),
                 wide_ids, at(out), samples, adapters, length, tokens, width, vocabulary,
                 sample_stride, row_stride},
                at(stream));
}

void search_best(int dtype, int metric, Address query, Address keys, Address scores, Address index,
                 Address workspace, std::int64_t workspace_size, std::int64_t queries,
                 std::int64_t count, std::int64_t width, std::int64_t k, Address stream) {
    require(queries >= 0 && width >= 0, "queries, width: negative");
    require(count > 0 && count < kMaxKeys, "count: no keys, or 2^32 and more");
    require(k >= 1 && k <= count && k <= kMaxTopK, "k: not in 1 to count, or more than MAX_TOP_K");
    require(metric >= 0 && metric <= static_cast<int>(Metric::l2), "metric: not a known code");
    if (queries == 0) return;
    require(query && keys && scores && index, "query, keys, scores, index: null address");
    require(workspace && workspace_size >= topk_keys_workspace(queries, count),
            "workspace: too small");
    topk_keys({at(query), at(keys), at<float>(scores), at<std::int64_t>(index),
               at<std::uint64_t>(workspace), queries, count, width, static_cast<int>(k),
               static_cast<Metric>(metric), supported(dtype)},
              at(stream));
}

}  // namespace

void bind_cuda(py::module_& m) {
    using py::arg;
    m.attr("MAX_PROJECTIONS") = kMaxProjections;
    m.def("cuda_mixed_lora_workspace", &mixed_lora_workspace, arg("rows"), arg("inputs"),
          arg("total_ranks"), "Floats of scratch memory that cuda_mixed_lora_decode needs.");
    m.def("cuda_mixed_lora_decode", &decode, arg("dtype"), arg("lora_dtype"), arg("x"),
          arg("mixture"), arg("projections"), arg("workspace"), arg("workspace_size"), arg("rows"),
          arg("inputs"), arg("samples"), arg("adapters"), arg("stream"),
          py::call_guard<py::gil_scoped_release>(),
          "The mixture of every projection of x, for a few rows, in two launches.");
    m.def("cuda_nearest_key_workspace", &nearest_key_workspace, arg("queries"), arg("count"),
          "64-bit words of scratch memory that cuda_nearest_key needs.");
    m.def("cuda_nearest_key", &search_nearest, arg("dtype"), arg("query"), arg("keys"),
          arg("radius"), arg("distance"), arg("index"), arg("nearest"), arg("workspace"),
          arg("workspace_size"), arg("queries"), arg("count"), arg("width"), arg("stream"),
          py::call_guard<py::gil_scoped_release>(), "The nearest key of every query.");
    m.attr("MAX_TOP_K") = kMaxTopK;
    m.def("cuda_topk_keys_workspace", &topk_keys_workspace, arg("queries"), arg("count"),
          "64-bit words of scratch memory that cuda_topk_keys needs.");
    m.def("cuda_topk_keys", &search_best, arg("dtype"), arg("metric"), arg("query"), arg("keys"),
          arg("scores"), arg("index"), arg("workspace"), arg("workspace_size"), arg("queries"),
          arg("count"), arg("width"), arg("k"), arg("stream"),
          py::call_guard<py::gil_scoped_release>(), "The k best keys of every query.");
    m.attr("MAX_ROUTED_KEYS") = kMaxRoutedKeys;
    m.def("cuda_route", &route_samples, arg("pooled"), arg("projection"), arg("keys"),
          arg("workspace"), arg("workspace_size"), arg("scores"), arg("weights"), arg("samples"),
          arg("width"), arg("hidden"), arg("count"), arg("top_k"), arg("eps"), arg("divisor"),
          arg("threshold"), arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "Scores, and weights unless their address is 0, of every key for each sample.");
    m.def("cuda_mix_prompts", &prompts_and_embeds, arg("prompts"), arg("mixture"), arg("source"),
          arg("ids"), arg("wide_ids"), arg("out"), arg("samples"), arg("adapters"), arg("length"),
          arg("tokens"), arg("width"), arg("vocabulary"), arg("sample_stride"), arg("row_stride"),
          arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "Each sample's mixture of prompts, followed by its embeddings.");
}

}  // namespace sapt_fast
