// The functions of sapt_fast._C that look up keys, embeddings and experts on the CPU.
#pragma once

#include <pybind11/pybind11.h>

namespace sapt_fast {

void bind_searches(pybind11::module_& m);

}  // namespace sapt_fast
