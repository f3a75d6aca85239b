// Kernels with the faults that the emulator must find, and one without.
#include "toys.h"

#include "cuda/launch.h"
#include "cuda/vec.h"

namespace sapt_fast {
namespace {

constexpr int kThreads = 64;

struct Toy {
    const float* from;
    float* to;
};

typedef float Row[kThreads];

template <bool WITH_BARRIER>
__global__ void reverse(Toy toy) {
    Row& row = shared_memory<Row>();
    wait_for_previous_kernel();
    let_next_kernel_start();
    const int at = threadIdx.x;
    row[at] = toy.from[blockIdx.x * kThreads + at];
    if (WITH_BARRIER) __syncthreads();
    toy.to[blockIdx.x * kThreads + at] = row[kThreads - 1 - at];
}

// Right as long as the warps keep pace with each other.
__global__ void late_race(Toy toy) {
    Row& row = shared_memory<Row>();
    wait_for_previous_kernel();
    row[threadIdx.x] = toy.from[threadIdx.x];
    for (int i = 0; i < 5; ++i) __ballot_sync(kAllLanes, true);
    toy.to[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

__global__ void every_block_writes(Toy toy) {
    wait_for_previous_kernel();
    toy.to[threadIdx.x] = toy.from[blockIdx.x];
}

__global__ void barrier_for_half(Toy) {
    wait_for_previous_kernel();
    if (threadIdx.x % 2) __syncthreads();
    __ballot_sync(kAllLanes, true);
}

__global__ void beyond_shared(Toy toy) {
    Row& row = shared_memory<Row>();
    wait_for_previous_kernel();
    row[threadIdx.x + 1] = toy.from[threadIdx.x];
}

__global__ void reads_beyond(Toy toy) {
    wait_for_previous_kernel();
    toy.to[threadIdx.x] = toy.from[blockIdx.x * kThreads + threadIdx.x + 1];
}

__global__ void reads_too_early(Toy toy) {
    const float value = toy.from[threadIdx.x];
    wait_for_previous_kernel();
    toy.to[threadIdx.x] = value;
}

__global__ void never_waits(Toy toy) { toy.to[threadIdx.x] = toy.from[threadIdx.x]; }

__global__ void half_wait(Toy toy) {
    if (threadIdx.x % 2) wait_for_previous_kernel();
    __syncthreads();
    toy.to[threadIdx.x] = toy.from[threadIdx.x];
}

__global__ void lets_go_before_waiting(Toy) {
    let_next_kernel_start();
    wait_for_previous_kernel();
}

template <auto kernel>
void run(const Toy& toy) {
    launch<kernel>("toy", 2, kThreads, sizeof(Row), {0, nullptr}, toy);
}

}  // namespace

void run_toy(const std::string& name, const float* from, float* to) {
    const Toy toy = {from, to};
    if (name == "reverse") return run<reverse<true>>(toy);
    if (name == "race") return run<reverse<false>>(toy);
    if (name == "late_race") return run<late_race>(toy);
    if (name == "every_block_writes") return run<every_block_writes>(toy);
    if (name == "barrier_for_half") return run<barrier_for_half>(toy);
    if (name == "beyond_shared") return run<beyond_shared>(toy);
    if (name == "reads_beyond") return run<reads_beyond>(toy);
    if (name == "reads_too_early") return run<reads_too_early>(toy);
    if (name == "never_waits") return run<never_waits>(toy);
    if (name == "half_wait") return run<half_wait>(toy);
    if (name == "lets_go_before_waiting") return run<lets_go_before_waiting>(toy);
    throw std::invalid_argument("no toy " + name);
}

}  // namespace sapt_fast
