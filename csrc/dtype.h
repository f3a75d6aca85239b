// The dtypes of tensors that come as addresses.
#pragma once

namespace sapt_fast {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// Passes a type to code that is called with one for each dtype.
template <class T>
struct Type {
    typedef T type;
};

}  // namespace sapt_fast
