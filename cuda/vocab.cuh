// 一行词表上的核共用：保序的键、argmax 的键、分块。
#pragma once

#include "block.cuh"
#include "config.cuh"

namespace dso {

// 保序的整数键，NaN 最大；-0 与 +0 相同。
__device__ inline uint32_t ordered_key(float v) {
  if (v != v) return 0xffffffffu;
  uint32_t bits = __float_as_uint(v + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ inline float key_value(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// argmax 的键：先比数，相同时下标小的大；整数的最大值与次序无关，怎样划分都逐位相同。0 是还没有。
using Best = unsigned long long;

__device__ inline Best best_of(float v, int64_t index) {
  return static_cast<Best>(ordered_key(v)) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

__device__ inline bool best_is_nan(Best best) { return best >> 32 == 0xffffffffu; }

__device__ inline int64_t best_index(Best best) {
  return 0xffffffffu - static_cast<uint32_t>(best);
}

__host__ __device__ inline int64_t vocab_chunks(int64_t vocab) {
  return (vocab + VOCAB_CHUNK - 1) / VOCAB_CHUNK;
}

// 第 chunk 块是 [begin, end)。
struct VocabChunk {
  int64_t begin, end;
  __device__ VocabChunk(int64_t chunk, int64_t vocab)
      : begin(chunk * VOCAB_CHUNK),
        end(begin + VOCAB_CHUNK < vocab ? begin + VOCAB_CHUNK : vocab) {}
};

// 主机侧：各位置的一行能否用宽访存。
inline bool wide_positions(const dso_positions &x, int64_t vocab) {
  return wide_ok(x.data, x.dtype, x.rs) && x.ps % 8 == 0 && vocab % 8 == 0;
}

}  // namespace dso
