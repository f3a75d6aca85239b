// The module sapt_fast._C. No torch headers, no ABI to match: of each tensor its address and its size
// are asked, and compared with what a kernel is going to read or write.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "arguments.h"
#include "capability.h"
#include "cpu/dropout.h"
#include "cpu/mixed_lora.h"
#include "cpu/own_lora.h"
#ifdef SAPT_FAST_WITH_CUDA
#include "cuda/bindings.h"
#include "cuda/runtime.h"
#endif
#include "cpu/search_bindings.h"
#include "memory.h"
#include "threads.h"

namespace py = pybind11;

namespace sapt_fast {
namespace {

const MixedLoraKernels& mixed_lora() { return SAPT_FAST_PICK(mixed_lora_kernels); }

RankWeights rank_weights(DType dtype, const Memory& mixture, const Memory& row_adapter,
                         const Memory& row_scale, std::int64_t rows, std::int64_t samples,
                         std::int64_t adapters, std::int64_t ranks) {
    require(rows >= 0 && ranks >= 0 && adapters > 0, "rows, ranks, adapters: negative or zero");
    require(rows == 0 || (samples > 0 && rows % samples == 0), "samples: does not divide rows");
    if (rows > 0 && ranks > 0) {
        const std::int64_t acc = acc_size(dtype);
        require_holds("mixture", mixture, {samples, adapters}, acc);
        require_holds("row_adapter", row_adapter, {ranks}, sizeof(std::int32_t));
        require_holds("row_scale", row_scale, {ranks}, acc);
        const auto* owners = at<const std::int32_t>(row_adapter);
        bool known = true;
        for (std::int64_t j = 0; j < ranks; ++j) known &= owners[j] >= 0 && owners[j] < adapters;
        require(known, "row_adapter: not an adapter");
    }
    return {at(mixture), at<const std::int32_t>(row_adapter), at(row_scale), rows, samples,
            adapters,    ranks};
}

std::unique_ptr<char[]> scratch(std::int64_t count, DType dtype) {
    return std::unique_ptr<char[]>(new char[static_cast<std::size_t>(count * acc_size(dtype))]);
}

// Whether some rank has a weight of exactly 0 in some sample.
template <class A>
bool holds_zero(const RankWeights& weights) {
    const A* mixture = static_cast<const A*>(weights.mixture);
    const A* scale = static_cast<const A*>(weights.row_scale);
    bool zero = false;
    for (std::int64_t s = 0; s < weights.samples; ++s, mixture += weights.adapters) {
        for (std::int64_t j = 0; j < weights.ranks; ++j) {
            const A weight = mixture[weights.row_adapter[j]];
            zero |= weight == 0 || weight * scale[j] == 0;
        }
    }
    return zero;
}

void weight_ranks(int dtype, const Memory& out, const Memory& h, const Memory& mixture,
                  const Memory& row_adapter, const Memory& row_scale, std::int64_t rows,
                  std::int64_t samples, std::int64_t adapters, std::int64_t ranks, int threads) {
    const DType type = dtype_of(dtype);
    const RankWeights weights =
        rank_weights(type, mixture, row_adapter, row_scale, rows, samples, adapters, ranks);
    threads = team(rows * ranks, threads);
    if (rows == 0 || ranks == 0) return;
    require_holds("out", out, {rows, ranks}, size_of(type));
    require_holds("h", h, {rows, ranks}, size_of(type));
    mixed_lora().weight_ranks(type, at(out), at(h), weights, threads);
}

void weight_ranks_backward(int dtype, const Memory& g, const Memory& h, const Memory& d_mixture,
                           const Memory& packed_g, const Memory& packed_h,
                           const std::vector<std::int64_t>& ranges, const Memory& mixture,
                           const Memory& row_adapter, const Memory& row_scale, std::int64_t rows,
                           std::int64_t samples, std::int64_t adapters, std::int64_t ranks,
                           int threads) {
    const DType type = dtype_of(dtype);
    const RankWeights weights =
        rank_weights(type, mixture, row_adapter, row_scale, rows, samples, adapters, ranks);
    threads = team(rows * ranks, threads);
    require(ranges.size() % 2 == 0, "ranges: an odd number of bounds");
    std::int64_t before = 0;
    for (std::int64_t bound : ranges) {
        require(bound >= before && bound <= ranks, "ranges: not ascending within the ranks");
        before = bound;
    }
    std::int64_t packed = 0;
    for (std::size_t i = 0; i < ranges.size(); i += 2) packed += ranges[i + 1] - ranges[i];
    if (rows == 0) return;
    require_holds("g", g, {rows, ranks}, size_of(type));
    require_holds("h", h, {rows, ranks}, size_of(type));
    if (d_mixture) require_holds("d_mixture", d_mixture, {samples, adapters}, acc_size(type));
    if (packed_g) require_holds("packed_g", packed_g, {rows, packed}, size_of(type));
    if (packed_h) require_holds("packed_h", packed_h, {rows, packed}, size_of(type));
    const std::int64_t chunks = chunks_per_sample(weights);
    std::unique_ptr<char[]> partial;
    if (d_mixture && chunks > 1) partial = scratch(samples * chunks * ranks, type);
    const auto count = static_cast<std::int64_t>(ranges.size() / 2);
    const RankBackward args = {at(g),        at(h),         at(d_mixture), at(packed_g),
                               at(packed_h), ranges.data(), count,         partial.get()};
    mixed_lora().weight_ranks_backward(type, args, weights, threads);
}

// False, with nothing done, if one of the tensors that are read has gaps.
bool decode(int dtype, int lora_dtype, const Memory& y, const Memory& h, const Memory& x,
            const Memory& weight, const Memory& bias, const Memory& lora_a, const Memory& lora_b,
            const Memory& mixture, const Memory& row_adapter, const Memory& row_scale,
            std::int64_t rows, std::int64_t inputs, std::int64_t outputs, std::int64_t samples,
            std::int64_t adapters, std::int64_t ranks, bool accumulate, int threads) {
    if (x.gaps || weight.gaps || bias.gaps || lora_a.gaps || lora_b.gaps || mixture.gaps ||
        row_adapter.gaps || row_scale.gaps) {
        return false;
    }
    const DType type = dtype_of(dtype);
    const DType lora_type = dtype_of(lora_dtype);
    require(lora_type == type || (lora_type == DType::float32 && type != DType::float64),
            "lora_dtype: neither dtype nor float32");
    const RankWeights weights =
        rank_weights(type, mixture, row_adapter, row_scale, rows, samples, adapters, ranks);
    require(inputs >= 0 && outputs >= 0, "inputs, outputs: negative");
    threads = team(rows * (weight ? inputs * outputs : ranks * (inputs + outputs)), threads);
    if (rows == 0) return true;
    require_holds("y", y, {rows, outputs}, size_of(type));
    require_holds("x", x, {rows, inputs}, size_of(type));
    if (weight) require_holds("weight", weight, {outputs, inputs}, size_of(type));
    if (bias) require_holds("bias", bias, {outputs}, size_of(type));
    if (ranks > 0) {
        if (h) require_holds("h", h, {rows, ranks}, size_of(type));
        require_holds("lora_a", lora_a, {ranks, inputs}, size_of(lora_type));
        require_holds("lora_b", lora_b, {ranks, outputs}, size_of(lora_type));
    }
    const std::unique_ptr<char[]> hw = scratch(rows * ranks, type);
    const bool packs = weight && packs_rows(type, rows);
    const std::unique_ptr<char[]> packed = packs ? scratch(inputs * kLaneRows, type) : nullptr;
    const bool skips = type == DType::float64 ? holds_zero<double>(weights)
                                              : holds_zero<float>(weights);
    const Decode args = {at(y),      at(h),      at(x),      at(weight), at(bias),
                         at(lora_a), at(lora_b), hw.get(),   packed.get(), inputs,
                         outputs,    accumulate, skips,      type,       lora_type};
    mixed_lora().decode(args, weights, threads);
    return true;
}

void factor_grad(int dtype, int factor_dtype, const Memory& out, const Memory& g, const Memory& x,
                 std::int64_t rows, std::int64_t ranks, std::int64_t columns, int threads) {
    const DType type = dtype_of(dtype);
    const DType factor_type = dtype_of(factor_dtype);
    require(factor_type == type || (factor_type == DType::float32 && type != DType::float64),
            "factor_dtype: neither dtype nor float32");
    require(rows >= 0 && columns >= 0, "rows, columns: negative");
    require(ranks >= 0 && ranks <= kFewRanks, "ranks: more than FEW_RANKS");
    require_holds("out", out, {ranks, columns}, size_of(factor_type));
    require_holds("g", g, {rows, ranks}, size_of(type));
    require_holds("x", x, {rows, columns}, size_of(type));
    if (ranks == 0 || columns == 0) return;
    const FactorGrad args = {at(out), at(g), at(x), rows, ranks, columns, type, factor_type};
    mixed_lora().factor_grad(args, team(rows * ranks * columns, threads));
}

void drop(int dtype, const Memory& out, const Memory& x, std::int64_t seed, std::int64_t first_row,
          std::int64_t rows, std::int64_t columns, std::int64_t drops, int threads) {
    require(first_row >= 0 && rows >= 0 && columns >= 0, "first_row, rows, columns: negative");
    require(drops >= 0 && drops <= 65536, "drops: not in [0, 65536]");
    const std::int64_t element = size_of(dtype_of(dtype));
    require_holds("out", out, {rows, columns}, element);
    require_holds("x", x, {rows, columns}, element);
    const Dropout args = {at(out), at(x),   static_cast<std::uint64_t>(seed),  first_row, rows,
                          columns, element, static_cast<std::uint32_t>(drops)};
    SAPT_FAST_PICK(dropout_kernels).drop(args, team(rows * columns, threads));
}

void own_lora(int dtype, int lora_dtype, const Memory& y, const Memory& x,
              const std::vector<Memory>& a, const std::vector<Memory>& b,
              const std::vector<std::int64_t>& ranks, const std::vector<double>& scales,
              const std::vector<std::int64_t>& owner, std::int64_t rows, std::int64_t inputs,
              std::int64_t outputs, int threads) {
    const DType type = dtype_of(dtype);
    const DType lora_type = dtype_of(lora_dtype);
    require(lora_type == type || (lora_type == DType::float32 && type != DType::float64),
            "lora_dtype: neither dtype nor float32");
    require(a.size() == ranks.size() && b.size() == ranks.size() && scales.size() == ranks.size(),
            "a, b, ranks, scales: of different lengths");
    const std::int64_t count = static_cast<std::int64_t>(ranks.size());
    const std::int64_t samples = static_cast<std::int64_t>(owner.size());
    require(rows >= 0 && inputs >= 0 && outputs >= 0, "rows, inputs, outputs: negative");
    require(rows == 0 || (samples > 0 && rows % samples == 0), "owner: does not divide rows");
    require_holds("y", y, {rows, outputs}, size_of(type));
    require_holds("x", x, {rows, inputs}, size_of(type));
    std::vector<OwnAdapter> adapters;
    for (std::int64_t k = 0; k < count; ++k) {
        require(ranks[k] >= 0 && ranks[k] <= kMostOwnRanks, "ranks: negative or too many");
        require_holds("a", a[k], {ranks[k], inputs}, size_of(lora_type));
        require_holds("b", b[k], {outputs, ranks[k]}, size_of(lora_type));
        adapters.push_back({at(a[k]), at(b[k]), ranks[k], scales[k]});
    }
    if (rows == 0 || outputs == 0) return;
    // Rows that share one read of their adapter, where enough blocks remain for the threads.
    const std::int64_t most = rows >= threads * kOwnRows ? kOwnRows : kOwnRows / 4;
    std::vector<OwnRows> blocks;
    std::int64_t work = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t adapter = owner[row / (rows / samples)];
        require(adapter >= -1 && adapter < count, "owner: not an adapter");
        if (adapter < 0) continue;
        work += ranks[adapter] * (inputs + outputs);
        const bool extends = !blocks.empty() && blocks.back().adapter == adapter &&
                             blocks.back().count < most &&
                             blocks.back().first + blocks.back().count == row;
        if (extends) {
            ++blocks.back().count;
        } else {
            blocks.push_back({row, 1, adapter});
        }
    }
    const OwnLora args = {at(y),  at(x),   adapters.data(), blocks.data(),
                          static_cast<std::int64_t>(blocks.size()),
                          inputs, outputs, type,            lora_type};
    SAPT_FAST_PICK(own_lora_kernels).add(args, team(work, threads));
}

py::list cpu_capabilities() {
    py::list names;
    for (Capability capability : supported_capabilities()) names.append(name_of(capability));
    return names;
}

py::dict cuda_report() {
    py::dict report;
#ifdef SAPT_FAST_WITH_CUDA
    const CudaRuntime runtime = cuda_runtime();
    py::list devices;
    for (const CudaDevice& device : runtime.devices) {
        py::dict entry;
        entry["name"] = device.name;
        entry["capability"] = py::make_tuple(device.major, device.minor);
        entry["multiprocessors"] = device.multiprocessors;
        entry["memory"] = device.memory;
        devices.append(entry);
    }
    report["compiled"] = true;
    report["architectures"] = py::str(runtime.architectures).attr("split")();
    py::dict sources;
    for (py::handle entry : py::str(runtime.sources).attr("split")()) {
        const py::tuple parts = entry.attr("partition")("=");
        sources[parts[0]] = parts[2];
    }
    report["sources"] = sources;
    report["runtime_version"] = runtime.runtime_version;
    report["driver_version"] = runtime.driver_version;
    report["error"] = runtime.error;
    report["devices"] = devices;
#else
    report["compiled"] = false;
    report["architectures"] = py::list();
    report["sources"] = py::dict();
    report["runtime_version"] = 0;
    report["driver_version"] = 0;
    report["error"] = "built without CUDA";
    report["devices"] = py::list();
#endif
    return report;
}

}  // namespace
}  // namespace sapt_fast

PYBIND11_MODULE(_C, m) {
    using namespace sapt_fast;
    using py::arg;
    init_capability();
    m.doc() = "Native kernels of sapt_fast.";
    m.attr("FLOAT32") = static_cast<int>(DType::float32);
    m.attr("BFLOAT16") = static_cast<int>(DType::bfloat16);
    m.attr("FLOAT16") = static_cast<int>(DType::float16);
    m.attr("FLOAT64") = static_cast<int>(DType::float64);
    m.attr("FEW_RANKS") = kFewRanks;
    m.def("cpu_capability", [] { return std::string(name_of(current_capability())); },
          "Instruction set in use: default, avx2, avx512 or avx512_bf16.");
    m.def("cpu_capabilities", &cpu_capabilities, "Those of this CPU, lowest first.");
    m.def("set_cpu_capability", &set_capability, arg("name"),
          "Use another one of cpu_capabilities().");
    m.def("multiplies", [](int dtype) { return multiplies(dtype_of(dtype)); }, arg("dtype"),
          "Whether products of the dtype are as fast as those of float32.");
    m.def("cuda_runtime", &cuda_report, "Compiled architectures, versions and visible devices.");
    m.def("weight_ranks", &weight_ranks, arg("dtype"), arg("out"), arg("h"), arg("mixture"),
          arg("row_adapter"), arg("row_scale"), arg("rows"), arg("samples"), arg("adapters"),
          arg("ranks"), arg("threads"), py::call_guard<py::gil_scoped_release>(),
          "out = h * weights of every rank.");
    m.def("weight_ranks_backward", &weight_ranks_backward, arg("dtype"), arg("g"), arg("h"),
          arg("d_mixture"), arg("packed_g"), arg("packed_h"), arg("ranges"), arg("mixture"),
          arg("row_adapter"), arg("row_scale"), arg("rows"), arg("samples"), arg("adapters"),
          arg("ranks"), arg("threads"), py::call_guard<py::gil_scoped_release>(),
          "g *= weights in place; the gradient of the mixture; the ranges' weighted g and h.");
    m.def("mixed_lora_decode", &decode, arg("dtype"), arg("lora_dtype"), arg("y"), arg("h"),
          arg("x"), arg("weight"), arg("bias"), arg("lora_a"), arg("lora_b"), arg("mixture"),
          arg("row_adapter"), arg("row_scale"), arg("rows"), arg("inputs"), arg("outputs"),
          arg("samples"), arg("adapters"), arg("ranks"), arg("accumulate"), arg("threads"),
          py::call_guard<py::gil_scoped_release>(), "The whole layer for a few rows, in one call.");
    m.def("factor_grad", &factor_grad, arg("dtype"), arg("factor_dtype"), arg("out"), arg("g"),
          arg("x"), arg("rows"), arg("ranks"), arg("columns"), arg("threads"),
          py::call_guard<py::gil_scoped_release>(), "out = g^T x for a few ranks.");
    m.def("drop", &drop, arg("dtype"), arg("out"), arg("x"), arg("seed"), arg("first_row"),
          arg("rows"), arg("columns"), arg("drops"), arg("threads"),
          py::call_guard<py::gil_scoped_release>(), "out = x, 0 where dropout drops it.");
    m.attr("MOST_OWN_RANKS") = kMostOwnRanks;
    m.def("own_lora", &own_lora, arg("dtype"), arg("lora_dtype"), arg("y"), arg("x"), arg("a"),
          arg("b"), arg("ranks"), arg("scales"), arg("owner"), arg("rows"), arg("inputs"),
          arg("outputs"), arg("threads"), py::call_guard<py::gil_scoped_release>(),
          "y += scale (x a^T) b^T, every sample with its own adapter.");
    bind_searches(m);
#ifdef SAPT_FAST_WITH_CUDA
    bind_cuda(m);
#endif
}
