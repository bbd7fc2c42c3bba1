// 得分的整数键：保序，-0 与 +0 相同，NaN 最大（同 csrc/moe_route.c）；一个 warp 里取最大的。
#pragma once

#include "vec.cuh"

namespace dso {

constexpr int GONE = -2147483647 - 1;  // 没有一个浮点的键这么小：已经取走

__device__ inline int key_of(float v) {
  if (v != v) return 2147483647;
  int bits = static_cast<int>(__float_as_uint(v + 0.0f));  // -0 变 +0
  return bits < 0 ? bits ^ 2147483647 : bits;
}

// 最大的键对应的也是 NaN。
__device__ inline float value_of(int key) {
  return __uint_as_float(static_cast<unsigned>(key < 0 ? key ^ 2147483647 : key));
}

// (first, second) 与另一对合起来的最大两个；各对里 first 不小于 second。
__device__ inline void merge_top2(int *first, int *second, int other, int other_second) {
  int low = *first < other ? *first : other;
  *first = *first < other ? other : *first;
  int next = *second > other_second ? *second : other_second;
  *second = low > next ? low : next;
}

struct Best {
  int key, index;
};

// keys [count] 里最大的，相同时下标小的；整个 warp 一起调用，各线程得到同样的结果。
__device__ inline Best warp_best(const int *keys, int count, int lane) {
  Best best = {GONE, 2147483647};
  for (int i = lane; i < count; i += WARP)
    if (keys[i] > best.key || best.index == 2147483647) best = {keys[i], i};
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) {
    int key = __shfl_xor_sync(ALL_LANES, best.key, step);
    int index = __shfl_xor_sync(ALL_LANES, best.index, step);
    if (key > best.key || (key == best.key && index < best.index)) best = {key, index};
  }
  return best;
}

}  // namespace dso
