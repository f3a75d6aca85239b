// The dtypes of tensors that come as addresses.
#pragma once

namespace sapt_fast {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

}  // namespace sapt_fast
