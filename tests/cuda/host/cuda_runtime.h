// CUDA C 的主机模拟：只含 cuda/ 用到的子集。每个 CUDA 线程一个纤程，线程块逐个运行。
//
// 用法：把本目录放在 -I 的最前面，用 g++ -x c++ 编译 .cu。同一块的纤程在 __syncthreads 与洗牌处
// 交替运行；块内所有未结束的线程都停住却无人能继续时报告死锁（漏掉的屏障、分支里的屏障）。
// DSO_HOST_REVERSE=1 让纤程倒序运行：依赖线程次序的核（漏了屏障）会给出不同的结果。
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

typedef int cudaError_t;
typedef void *cudaStream_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorLaunchFailure = 719;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr size_t STACK_BYTES = 64 << 10;
constexpr unsigned WARP = 32;

// 一次会合：want 个线程都到了才放行。
struct Barrier {
  unsigned want = 0, here = 0, turn = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  bool done = false;
  dim3 index;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  std::vector<float> mailbox;  // 洗牌：每个线程一格
  Barrier all;
  ucontext_t scheduler;
  unsigned current = 0;
  bool progressed = false;
  std::function<void()> body;
};

inline Block *block;

inline unsigned linear_thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

inline void pause_fiber() {
  dim3 mine = threadIdx;
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
  threadIdx = mine;
}

inline void meet(Barrier &barrier) {
  unsigned turn = barrier.turn;
  block->progressed = true;
  if (++barrier.here == barrier.want) {
    barrier.here = 0;
    barrier.turn++;
    return;
  }
  while (barrier.turn == turn) pause_fiber();
}

inline void fiber_main() {
  block->body();
  block->fibers[block->current].done = true;
  block->progressed = true;
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

// 运行一块；死锁时返回 false。
inline bool run_block(bool reverse) {
  unsigned count = static_cast<unsigned>(block->fibers.size()), left = count;
  block->all = Barrier{count, 0, 0};
  for (unsigned w = 0; w < block->warps.size(); w++)
    block->warps[w] = Barrier{std::min(WARP, count - w * WARP), 0, 0};
  for (unsigned i = 0; i < count; i++) {
    Fiber &fiber = block->fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.done = false;
    fiber.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  }
  while (left > 0) {
    block->progressed = false;
    for (unsigned n = 0; n < count; n++) {
      unsigned i = reverse ? count - 1 - n : n;
      if (block->fibers[i].done) continue;
      block->current = i;
      threadIdx = block->fibers[i].index;
      swapcontext(&block->scheduler, &block->fibers[i].context);
      if (!block->fibers[i].done) continue;
      left--;
      block->all.want--;  // 已退出的线程不再参加屏障（与硬件一致）
      if (block->all.want > 0 && block->all.here == block->all.want) {
        block->all.here = 0;
        block->all.turn++;
      }
    }
    if (!block->progressed && left > 0) return false;
  }
  return true;
}

template <class Body>
cudaError_t launch(dim3 grid, dim3 threads, Body body) {
  const char *order = std::getenv("DSO_HOST_REVERSE");
  Block current;
  block = &current;
  gridDim = grid;
  blockDim = threads;
  unsigned count = threads.x * threads.y * threads.z;
  current.fibers = std::vector<Fiber>(count);
  current.warps.resize((count + WARP - 1) / WARP);
  current.mailbox.resize(count);
  current.body = body;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = dim3(x, y, z);
        if (!run_block(order && *order == '1')) return cudaErrorLaunchFailure;
      }
  return cudaSuccess;
}

}  // namespace cuda_host

#define DSO_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), cuda_host::launch((grid), (block), [&] { (kernel)(__VA_ARGS__); }))

inline void __syncthreads() { cuda_host::meet(cuda_host::block->all); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  unsigned me = cuda_host::linear_thread();
  cuda_host::Barrier &warp = cuda_host::block->warps[me / cuda_host::WARP];
  cuda_host::block->mailbox[me] = value;
  cuda_host::meet(warp);
  float other = cuda_host::block->mailbox[me ^ static_cast<unsigned>(mask)];
  cuda_host::meet(warp);  // 都读完才能写下一次
  return other;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
