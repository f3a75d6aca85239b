// The CUDA part of sapt_fast._C with its kernels running on the CPU.
#include <pybind11/pybind11.h>

#include "arguments.h"
#include "cuda/bindings.h"
#include "emulation.h"
#include "toys.h"

PYBIND11_MODULE(emulated_cuda, m) {
    using namespace sapt_fast;
    m.attr("FLOAT32") = static_cast<int>(DType::float32);
    m.attr("BFLOAT16") = static_cast<int>(DType::bfloat16);
    m.attr("FLOAT16") = static_cast<int>(DType::float16);
    m.attr("FLOAT64") = static_cast<int>(DType::float64);
    bind_cuda(m);
    m.def("set_order", &emulation::set_order);
    m.def("refuse_next", &emulation::refuse_next);
    m.def("synchronize", &emulation::synchronize);
    m.def("run_toy", [](const std::string& name, Address from, Address to) {
        run_toy(name, at<const float>(from), at<float>(to));
    });
}
