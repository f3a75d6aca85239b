// The functions of sapt_fast._C that search a table of keys on the CPU.
#pragma once

#include <pybind11/pybind11.h>

namespace sapt_fast {

void bind_search(pybind11::module_& m);

}  // namespace sapt_fast
