// The CUDA part of sapt_fast._C with its kernels running on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "arguments.h"
#include "cuda/bindings.h"
#include "cuda_runtime.h"
#include "emulation.h"
#include "toys.h"

PYBIND11_MODULE(MODULE_NAME, m) {
    using namespace sapt_fast;
    m.attr("FLOAT32") = static_cast<int>(DType::float32);
    m.attr("BFLOAT16") = static_cast<int>(DType::bfloat16);
    m.attr("FLOAT16") = static_cast<int>(DType::float16);
    m.attr("FLOAT64") = static_cast<int>(DType::float64);
    bind_cuda(m);
    m.def("set_order", &emulation::set_order);
    m.def("copy_late", [](Address to, Address from, std::size_t bytes) {
        emulation::copy_late(at(to), at(from), bytes);
    });
    m.def("set_fault", [](int number) { emulation::fault = number; });
    m.def("traffic", [] { return std::pair(emulation::launches, emulation::bytes_from_l2); },
          "Launches, and bytes that kernels have read by __ldcg, up to now.");
    m.def("limit_grid", &emulation::limit_grid);
    m.def("refuse_next", &emulation::refuse_next);
    m.def("set_current_device", [](int device) { emulation::current_device = device; });
    m.def("devices", [] { return std::pair(emulation::current_device, emulation::launched_on); },
          "The current device, and the one that was at the last launch.");
    m.def("synchronize", &emulation::synchronize);
    m.def("run_toy", [](const std::string& name, Address from, Address to) {
        run_toy(name, at<const float>(from), at<float>(to));
    });
}
