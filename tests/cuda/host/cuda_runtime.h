// CUDA 运行时与语言扩展的主机替身：cuda/ 用到的子集。把本目录放在 -I 的最前面，用 g++ -x c++ 编译 .cu。
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sim.h"

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

#define threadIdx (cuda_host::thread_index())
#define blockIdx (cuda_host::block_index())
#define blockDim (cuda_host::block_size())
#define gridDim (cuda_host::grid_size())

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

typedef int cudaError_t;
typedef void *cudaStream_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719;
constexpr cudaError_t cudaErrorNoKernelImageForDevice = 209;

inline const char *cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_host::last_failure();
}

inline cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

inline void __syncthreads() { cuda_host::named_barrier(0, 0, true); }

inline void __syncwarp(unsigned = ~0u) {
  cuda_host::collective("syncwarp", nullptr, 1, [](void **, int) {});
}

namespace cuda_host {
template <class T>
struct Shuffle {
  T value, result;
  int from;
};

// 各线程交出 value，取第 from 个线程的。
template <class T>
T exchange(const char *name, T value, int from) {
  Shuffle<T> record{value, value, from & (LANES - 1)};
  collective(name, &record, 1, [](void **records, int count) {
    for (int i = 0; i < count; i++) {
      auto *mine = static_cast<Shuffle<T> *>(records[i]);
      mine->result = static_cast<Shuffle<T> *>(records[mine->from])->value;
    }
  });
  return record.result;
}

inline int lane() {
  const dim3 &t = threadIdx, &size = blockDim;
  return static_cast<int>((t.x + size.x * (t.y + size.y * t.z)) % LANES);
}
}  // namespace cuda_host

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_host::exchange("shfl_xor", value, cuda_host::lane() ^ mask);
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_host::exchange("shfl", value, lane);
}

template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  int lane = cuda_host::lane(), from = lane - static_cast<int>(delta);
  return cuda_host::exchange("shfl_up", value, from < 0 ? lane : from);
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  struct Vote {
    int predicate;
    unsigned result;
  } record{predicate, 0};
  cuda_host::collective("ballot", &record, 1, [](void **records, int count) {
    unsigned bits = 0;
    for (int i = 0; i < count; i++)
      bits |= static_cast<unsigned>(static_cast<Vote *>(records[i])->predicate != 0) << i;
    for (int i = 0; i < count; i++) static_cast<Vote *>(records[i])->result = bits;
  });
  return record.result;
}

inline int __reduce_max_sync(unsigned, int value) {
  struct Most {
    int value, result;
  } record{value, value};
  cuda_host::collective("reduce_max", &record, 1, [](void **records, int count) {
    int most = static_cast<Most *>(records[0])->value;
    for (int i = 1; i < count; i++) most = std::max(most, static_cast<Most *>(records[i])->value);
    for (int i = 0; i < count; i++) static_cast<Most *>(records[i])->result = most;
  });
  return record.result;
}

// 与本线程的值相同的线程。
inline unsigned __match_any_sync(unsigned, int value) {
  struct Match {
    int value;
    unsigned result;
  } record{value, 0};
  cuda_host::collective("match_any", &record, 1, [](void **records, int count) {
    for (int i = 0; i < count; i++) {
      auto *mine = static_cast<Match *>(records[i]);
      for (int j = 0; j < count; j++)
        mine->result |=
            static_cast<unsigned>(static_cast<Match *>(records[j])->value == mine->value) << j;
    }
  });
  return record.result;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// 线程块逐个运行，纤程不会在中间切换。
template <class T>
T atomicAdd(T *p, T value) {
  T before = *p;
  *p += value;
  return before;
}

inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }

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
