// The functions of sapt_fast._C that launch CUDA kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace sapt_fast {

void bind_cuda(pybind11::module_& m);

}  // namespace sapt_fast
