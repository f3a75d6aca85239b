#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "emulation.h"

namespace sapt_fast {
// What extern __shared__ names in the kernels.
uint4 shared_bytes[emulation::kMaxSharedBytes / sizeof(uint4)];
}  // namespace sapt_fast

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kWarp = 32;
constexpr unsigned kMaxGrid = 65535;  // in y and z
constexpr unsigned char kPoison = 0xff;  // a NaN as a float, -1 as an int

enum class State { ready, at_block_barrier, at_warp_operation, done };

struct Fiber {
    uint3 index;
    State state;
    bool started;
    ucontext_t context;
    jmp_buf resume;
    int operations;  // of its warp, that it has taken part in
    bool waited;     // for the previous kernel
};

// What the lanes of a warp give each other. The values of an operation stay until all lanes have
// arrived at the next but one.
struct Warp {
    uint64_t values[2][kWarp];
};

struct Block {
    const Launch* launch;
    uint3 index;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Fiber* running;
    jmp_buf scheduler;
};

Block* current = nullptr;
std::unique_ptr<Launch> pending;
uint64_t order_seed = 0;
uint64_t generator = 0;
std::string error;
cudaError_t refused = cudaSuccess;
unsigned grid_limit = kMaxGrid;
std::vector<std::unique_ptr<char[]>> free_stacks;

uint64_t random_below(uint64_t count) {
    generator ^= generator << 13;
    generator ^= generator >> 7;
    generator ^= generator << 17;
    return generator % count;
}

char* shared_begin() { return reinterpret_cast<char*>(sapt_fast::shared_bytes); }

void fail(const std::string& what) {
    if (error.empty()) error = what;
    if (current != nullptr && current->running != nullptr) _longjmp(current->scheduler, 1);
}

// Fibres begin here; the switches after that need no system call.
void fiber_main() {
    Fiber* self = current->running;
    current->launch->kernel();
    self->state = State::done;
    _longjmp(current->scheduler, 1);
}

void give_way(State state) {
    Fiber* self = current->running;
    self->state = state;
    if (_setjmp(self->resume) == 0) _longjmp(current->scheduler, 1);
}

void set_indices() {
    threadIdx = current->running->index;
    blockIdx = current->index;
    blockDim = current->launch->block;
    gridDim = current->launch->grid;
}

void resume(Block& block, Fiber& fiber) {
    block.running = &fiber;
    set_indices();
    if (_setjmp(block.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        setcontext(&fiber.context);
    }
    block.running = nullptr;
}

bool all_are(const Block& block, size_t warp, State state) {
    const Fiber* first = &block.fibers[warp * kWarp];
    return std::all_of(first, first + kWarp,
                       [state](const Fiber& fiber) { return fiber.state == state; });
}

bool can_run(const Block& block, size_t warp) {
    const Fiber* first = &block.fibers[warp * kWarp];
    return all_are(block, warp, State::at_warp_operation) ||
           std::any_of(first, first + kWarp,
                       [](const Fiber& fiber) { return fiber.state == State::ready; });
}

// Runs the lanes of a warp up to where each of them has to wait.
void run_warp(Block& block, size_t warp) {
    Fiber* lanes[kWarp];
    const bool arrived = all_are(block, warp, State::at_warp_operation);
    for (int i = 0; i < kWarp; ++i) {
        lanes[i] = &block.fibers[warp * kWarp + i];
        if (arrived) lanes[i]->state = State::ready;
    }
    for (int i = kWarp; order_seed && i > 1; --i) std::swap(lanes[i - 1], lanes[random_below(i)]);
    for (Fiber* lane : lanes) {
        if (lane->state == State::ready && error.empty()) resume(block, *lane);
    }
}

// Lets the threads go on once all of them have arrived or are done; false where nobody waits.
bool release_barrier(Block& block) {
    bool released = false;
    for (Fiber& fiber : block.fibers) {
        if (fiber.state == State::at_warp_operation) {
            fail("threads wait at different barriers, or some have left");
            return false;
        }
        released = released || fiber.state == State::at_block_barrier;
    }
    for (Fiber& fiber : block.fibers) {
        if (fiber.state == State::at_block_barrier) fiber.state = State::ready;
    }
    return released;
}

void run_block(const Launch& launch, uint3 index) {
    const size_t threads = launch.block.x;
    Block block = {};
    block.launch = &launch;
    block.index = index;
    block.fibers.resize(threads);
    block.warps.resize(threads / kWarp);
    std::vector<std::unique_ptr<char[]>> stacks;
    for (size_t i = 0; i < threads; ++i) {
        if (free_stacks.empty()) free_stacks.emplace_back(new char[kStackBytes]);
        stacks.push_back(std::move(free_stacks.back()));
        free_stacks.pop_back();
        Fiber& fiber = block.fibers[i];
        fiber.index = {static_cast<unsigned>(i), 0, 0};
        fiber.state = State::ready;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[i].get();
        fiber.context.uc_stack.ss_size = kStackBytes;
        makecontext(&fiber.context, fiber_main, 0);
    }
    memset(shared_begin(), kPoison, kMaxSharedBytes);
    Block* outer = current;
    current = &block;
    std::vector<size_t> able;
    size_t last = 0;
    while (error.empty()) {
        able.clear();
        for (size_t warp = 0; warp < block.warps.size(); ++warp) {
            if (can_run(block, warp)) able.push_back(warp);
        }
        if (able.empty()) {
            if (!release_barrier(block)) break;
            continue;
        }
        // Odd seeds let a warp run ahead of the others as far as it can, even ones mix them.
        const bool goes_on = order_seed % 2 && std::count(able.begin(), able.end(), last);
        if (!goes_on) last = able[order_seed ? random_below(able.size()) : 0];
        run_warp(block, last);
    }
    const auto waited = std::count_if(block.fibers.begin(), block.fibers.end(),
                                      [](const Fiber& fiber) { return fiber.waited; });
    if (error.empty() && launch.overlaps && static_cast<size_t>(waited) != threads) {
        fail(std::to_string(waited) + " of " + std::to_string(threads) +
             " threads have waited for the previous kernel");
    }
    current = outer;
    for (size_t i = launch.shared_bytes; i < kMaxSharedBytes && error.empty(); ++i) {
        if (static_cast<unsigned char>(shared_begin()[i]) != kPoison) {
            fail("a write beyond the " + std::to_string(launch.shared_bytes) +
                 " bytes of shared memory");
        }
    }
    for (auto& stack : stacks) free_stacks.push_back(std::move(stack));
}

void run_all(const Launch& launch) {
    const dim3& grid = launch.grid;
    std::vector<uint3> blocks;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
        }
    }
    for (size_t i = blocks.size(); order_seed && i > 1; --i) {
        std::swap(blocks[i - 1], blocks[random_below(i)]);
    }
    for (const uint3& block : blocks) {
        if (error.empty()) run_block(launch, block);
    }
}

void run_pending() {
    if (!pending) return;
    const std::unique_ptr<Launch> launch = std::move(pending);
    if (current == nullptr) return run_all(*launch);
    // In the middle of the next kernel's block, whose shared memory must stay as it is.
    std::vector<char> saved(shared_begin(), shared_begin() + kMaxSharedBytes);
    run_all(*launch);
    std::copy(saved.begin(), saved.end(), shared_begin());
}

}  // namespace

const char* last_error() { return error.c_str(); }

cudaError_t submit(Launch launch) {
    error.clear();
    launched_on = current_device;
    ++launches;
    if (refused != cudaSuccess) {
        error = "refused";
        return std::exchange(refused, cudaSuccess);
    }
    const dim3& grid = launch.grid;
    if (launch.block.x == 0 || launch.block.x > 1024 || launch.block.x % kWarp != 0 ||
        launch.block.y != 1 || launch.block.z != 1) {
        fail("a block of " + std::to_string(launch.block.x) + " threads");
    } else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > grid_limit ||
               grid.z > grid_limit) {
        fail("a grid that is empty or too large");
    } else if (launch.shared_bytes > kMaxSharedBytes) {
        fail(std::to_string(launch.shared_bytes) + " bytes of shared memory");
    } else {
        auto next = std::make_unique<Launch>(std::move(launch));
        // With a pending kernel, either this one starts before the pending one has begun, or the
        // pending one ends now and the following launch may start before this one has begun.
        const bool starts_early = pending && (order_seed == 0 || random_below(2));
        if (!next->overlaps || !starts_early) run_pending();
        if (next->overlaps && !starts_early) {
            pending = std::move(next);
        } else if (error.empty()) {
            run_all(*next);
        }
    }
    return error.empty() ? cudaSuccess : cudaErrorUnknown;
}

void synchronize() {
    error.clear();
    run_pending();
    if (!error.empty()) throw std::runtime_error(error);
}

void copy_late(void* to, const void* from, size_t bytes) {
    const auto copy = [=] {
        wait_for_previous();
        if (threadIdx.x == 0) memcpy(to, from, bytes);
    };
    submit({copy, dim3(1), dim3(kWarp), 0, true});
}

void limit_grid(unsigned blocks) { grid_limit = blocks; }

void set_order(uint64_t seed) {
    order_seed = seed;
    generator = seed * 0x9e3779b97f4a7c15u;
}

void refuse_next(int status) { refused = static_cast<cudaError_t>(status); }

void block_barrier() { give_way(State::at_block_barrier); }

void wait_for_previous() {
    current->running->waited = true;
    if (current->launch->overlaps) run_pending();
    if (!error.empty()) fail(error);
    set_indices();
}

void let_next_start() {
    if (!current->running->waited) fail("the next kernel is let go before this one has waited");
}

const uint64_t* exchange(uint64_t bits) {
    Fiber* self = current->running;
    uint64_t* values =
        current->warps[self->index.x / kWarp].values[self->operations++ % 2];
    values[self->index.x % kWarp] = bits;
    give_way(State::at_warp_operation);
    return values;
}

unsigned ballot(bool value) {
    const uint64_t* values = exchange(value);
    unsigned mask = 0;
    for (int lane = 0; lane < kWarp; ++lane) mask |= static_cast<unsigned>(values[lane]) << lane;
    return mask;
}

}  // namespace emulation
