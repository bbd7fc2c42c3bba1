// 线程块（一维，线程数是 32 的倍数）内的归约与前缀和：次序只取决于线程数。每个线程都要走到。
#pragma once

#include "vec.cuh"

namespace dso {

constexpr int MOST_BLOCK_WARPS = 32;

struct AddOp {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct MaxOp {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};
struct MinOp {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct MaxNanOp {
  __device__ float operator()(float a, float b) const { return max_nan(a, b); }
};

template <class T, class Op>
__device__ T warp_reduce(T x, Op op) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}

// 结果每个线程都有。
template <class T, class Op>
__device__ T block_reduce(T x, Op op) {
  __shared__ T part[MOST_BLOCK_WARPS];
  x = warp_reduce(x, op);
  __syncthreads();  // 上一次的 part 都读过了
  if (threadIdx.x % WARP == 0) part[threadIdx.x / WARP] = x;
  __syncthreads();
  x = part[0];
  for (int w = 1; w < static_cast<int>(blockDim.x) / WARP; w++) x = op(x, part[w]);
  return x;
}

// 前面各线程的 x 之和（不含自己）。
template <class T>
__device__ T block_before(T x) {
  __shared__ T part[MOST_BLOCK_WARPS];
  int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    T other = __shfl_up_sync(ALL_LANES, x, step);
    if (lane >= step) x = x + other;
  }
  __syncthreads();  // 上一次的 part 都读过了
  if (lane == WARP - 1) part[warp] = x;
  __syncthreads();
  T before = 0, previous = __shfl_up_sync(ALL_LANES, x, 1);
  for (int w = 0; w < warp; w++) before = before + part[w];
  return lane == 0 ? before : before + previous;
}

}  // namespace dso
