// Runs the kernels of csrc/cuda on the CPU, for tests without a GPU. Blocks run sequentially; the threads of a block
// are fibers that switch at __syncthreads and at shuffles. Include it before all other headers (-include).
//
// Detects wrong indices, barriers and sums, and, with -fsanitize=alignment, misaligned vector loads. Does not detect
// races between threads that no barrier separates.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static // blocks run sequentially
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

constexpr int kThreads = 256, kWarp = 32;
constexpr size_t kStack = 64 << 10;

struct Index {
  unsigned x;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStack);
  bool done;
};

inline std::vector<Fiber> fibers(kThreads);
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int current;
inline int64_t progress; // completed barriers and fibers: a round without any is a deadlock

inline void yield() {
  swapcontext(&fibers[current].context, &scheduler);
}

struct Barrier {
  int expected;
  int arrived = 0;
  int64_t generation = 0;

  void wait() {
    const int64_t waiting_for = generation;
    if (++arrived == expected) {
      arrived = 0;
      ++generation;
      ++progress;
    }
    while (generation == waiting_for) {
      yield();
    }
  }
};

inline Barrier block_barrier{kThreads};
inline std::vector<Barrier> warp_barriers(kThreads / kWarp, Barrier{kWarp});
inline double shuffled[kThreads];

} // namespace emulator

inline emulator::Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() {
  emulator::block_barrier.wait();
}

inline double __shfl_xor_sync(unsigned mask, double value, int distance) {
  const unsigned thread = threadIdx.x;
  if (mask != 0xffffffffu) {
    std::abort();
  }
  emulator::Barrier& barrier = emulator::warp_barriers[thread / emulator::kWarp];
  emulator::shuffled[thread] = value;
  barrier.wait();
  value = emulator::shuffled[thread ^ static_cast<unsigned>(distance)];
  barrier.wait();
  return value;
}

namespace emulator {

inline void run_fiber() {
  body();
  fibers[current].done = true;
  ++progress;
}

inline void run(int64_t blocks, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    for (Fiber& fiber : fibers) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data();
      fiber.context.uc_stack.ss_size = fiber.stack.size();
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, run_fiber, 0);
    }
    for (int64_t before = -1; before != progress;) {
      before = progress;
      for (current = 0; current < kThreads; ++current) {
        if (!fibers[current].done) {
          threadIdx.x = static_cast<unsigned>(current);
          swapcontext(&scheduler, &fibers[current].context);
        }
      }
    }
    for (const Fiber& fiber : fibers) {
      if (!fiber.done) {
        std::fprintf(stderr, "deadlock: a thread waits at a barrier that others never reach\n");
        std::abort();
      }
    }
  }
}

} // namespace emulator
