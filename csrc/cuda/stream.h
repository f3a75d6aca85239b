// Where a launch goes.
#pragma once

namespace sapt_fast {

struct Stream {
    int device;    // the stream's, by its index
    void* handle;  // a cudaStream_t
};

}  // namespace sapt_fast
