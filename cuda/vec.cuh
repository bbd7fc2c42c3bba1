// 按运行时 dtype 读写 V 个连续元素（V >= 4 时宽访存，地址须对齐）；寄存器里一律 fp32。
// 这些核受限于显存带宽，dtype 的分支在整个网格上一致，几乎不花时间，却省掉成倍的模板实例。
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <launch.cuh>
#include <ptx.cuh>

#include "dso.h"

namespace dso {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__host__ __device__ inline int min_of(int a, int b) { return a < b ? a : b; }

template <int V>
struct Vec {
  float v[V];
};

__device__ inline float half_bits(unsigned short bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ inline unsigned short to_half_bits(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

__device__ inline float bf16_bits(unsigned short bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

__device__ inline unsigned short to_bf16_bits(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

__host__ __device__ inline int64_t bytes_of(dso_dtype dtype) {
  return dtype == DSO_F32 ? 4 : dtype == DSO_BF16 || dtype == DSO_F16 ? 2 : 1;
}

// 量化的潜变量（int8、fp8）：一个元素一个字节，另有每词元的尺度。
__host__ __device__ inline bool quantized(dso_dtype dtype) { return bytes_of(dtype) == 1; }

// e4m3fn：指数与尾数移到 fp32 的位置再乘 2^120，规格、次正规都对。
__device__ inline float e4m3_bits(unsigned char bits) {
  unsigned magnitude = bits & 0x7f, sign = static_cast<unsigned>(bits & 0x80) << 24;
  return magnitude == 0x7f ? __uint_as_float(0x7fc00000 | sign)
                           : __uint_as_float(magnitude << 20 | sign) * 0x1p120f;
}

// 就近取偶，超出范围的取最大的数，同 csrc/isa/convert.h。
__device__ inline unsigned char to_e4m3_bits(float x) {
  float a = fminf(fabsf(x), static_cast<float>(DSO_F8_MOST));
  unsigned bits = __float_as_uint(a), sign = __float_as_uint(x) >> 24 & 0x80;
  unsigned code = a < 0x1p-6f ? __float_as_uint(a + 16384.0f) - __float_as_uint(16384.0f)
                              : (bits + 0x7ffff + (bits >> 20 & 1) - 0x3c000000) >> 20;
  return static_cast<unsigned char>((x != x ? 0x7f : code) | sign);
}

// 一个字节的元素，int8 或 fp8；存 int8 的数由调用者取整并截断。
__device__ inline float byte_value(dso_dtype dtype, unsigned char bits) {
  return dtype == DSO_F8 ? e4m3_bits(bits) : static_cast<float>(static_cast<signed char>(bits));
}

__device__ inline unsigned char byte_code(dso_dtype dtype, float x) {
  return dtype == DSO_F8 ? to_e4m3_bits(x)
                         : static_cast<unsigned char>(static_cast<signed char>(x));
}

// 低 16 位里的两个 e4m3fn，低字节在前。
__device__ inline float2 e4m3_pair(uint32_t bits) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves = unpack_e4m3(static_cast<unsigned short>(bits));
  return make_float2(half_bits(static_cast<unsigned short>(halves)),
                     half_bits(static_cast<unsigned short>(halves >> 16)));
#else
  return make_float2(e4m3_bits(static_cast<unsigned char>(bits)),
                     e4m3_bits(static_cast<unsigned char>(bits >> 8)));
#endif
}

// 相邻的两个，低地址在前。
__device__ inline float2 byte_pair(dso_dtype dtype, unsigned char low, unsigned char high) {
  if (dtype == DSO_F8) return e4m3_pair(low | static_cast<uint32_t>(high) << 8);
  return make_float2(byte_value(dtype, low), byte_value(dtype, high));
}

// 一个元素。
__device__ inline float load_one(const void *base, dso_dtype dtype, int64_t i) {
  switch (dtype) {
    case DSO_F32:
      return static_cast<const float *>(base)[i];
    case DSO_BF16:
      return bf16_bits(static_cast<const unsigned short *>(base)[i]);
    case DSO_F16:
      return half_bits(static_cast<const unsigned short *>(base)[i]);
    default:
      return byte_value(dtype, static_cast<const unsigned char *>(base)[i]);
  }
}

__device__ inline void store_one(void *base, dso_dtype dtype, int64_t i, float x) {
  switch (dtype) {
    case DSO_F32:
      static_cast<float *>(base)[i] = x;
      break;
    case DSO_BF16:
      static_cast<unsigned short *>(base)[i] = to_bf16_bits(x);
      break;
    case DSO_F16:
      static_cast<unsigned short *>(base)[i] = to_half_bits(x);
      break;
    default:
      static_cast<unsigned char *>(base)[i] = byte_code(dtype, x);
  }
}

// 16 位元素的一次宽访存：V 个 unsigned short。
template <int V>
struct alignas(2 * V) Half16 {
  unsigned short v[V];
};

template <int V>
struct alignas(V) Bytes {
  unsigned char v[V];
};

template <int V>
__device__ inline Vec<V> load(const void *base, dso_dtype dtype, int64_t i) {
  Vec<V> r;
  if constexpr (V < 4) {  // 地址不保证对齐：逐个读
    for (int j = 0; j < V; j++) r.v[j] = load_one(base, dtype, i + j);
  } else if (dtype == DSO_F32) {
    const float4 *p = reinterpret_cast<const float4 *>(static_cast<const float *>(base) + i);
#pragma unroll
    for (int j = 0; j < V / 4; j++) {
      float4 f = p[j];
      r.v[4 * j] = f.x, r.v[4 * j + 1] = f.y, r.v[4 * j + 2] = f.z, r.v[4 * j + 3] = f.w;
    }
  } else if (quantized(dtype)) {
    Bytes<V> b = *reinterpret_cast<const Bytes<V> *>(static_cast<const unsigned char *>(base) + i);
#pragma unroll
    for (int j = 0; j < V; j++) r.v[j] = byte_value(dtype, b.v[j]);
  } else {
    const unsigned short *p = static_cast<const unsigned short *>(base) + i;
    Half16<V> h = *reinterpret_cast<const Half16<V> *>(p);
#pragma unroll
    for (int j = 0; j < V; j++) r.v[j] = dtype == DSO_BF16 ? bf16_bits(h.v[j]) : half_bits(h.v[j]);
  }
  return r;
}

template <int V>
__device__ inline void store(void *base, dso_dtype dtype, int64_t i, const Vec<V> &x) {
  if constexpr (V < 4) {
    for (int j = 0; j < V; j++) store_one(base, dtype, i + j, x.v[j]);
  } else if (dtype == DSO_F32) {
    float4 *p = reinterpret_cast<float4 *>(static_cast<float *>(base) + i);
#pragma unroll
    for (int j = 0; j < V / 4; j++)
      p[j] = make_float4(x.v[4 * j], x.v[4 * j + 1], x.v[4 * j + 2], x.v[4 * j + 3]);
  } else if (quantized(dtype)) {
    Bytes<V> b;
#pragma unroll
    for (int j = 0; j < V; j++) b.v[j] = byte_code(dtype, x.v[j]);
    *reinterpret_cast<Bytes<V> *>(static_cast<unsigned char *>(base) + i) = b;
  } else {
    Half16<V> h;
#pragma unroll
    for (int j = 0; j < V; j++)
      h.v[j] = dtype == DSO_BF16 ? to_bf16_bits(x.v[j]) : to_half_bits(x.v[j]);
    *reinterpret_cast<Half16<V> *>(static_cast<unsigned short *>(base) + i) = h;
  }
}

// 先舍入到 dtype 再取回：与“先存成该 dtype”的结果一致。
__device__ inline float round_to(dso_dtype dtype, float x) {
  if (dtype == DSO_BF16) return bf16_bits(to_bf16_bits(x));
  if (dtype == DSO_F16) return half_bits(to_half_bits(x));
  return x;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

// NaN 不被吞掉的最大值：输入里有 NaN，结果就是 NaN。
__device__ inline float max_nan(float a, float b) { return (b > a || b != b) ? b : a; }

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2)
    x = max_nan(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}

// 主机侧：dim、步长与地址能否用 V = 8 的宽访存。
inline bool wide_ok(const void *data, dso_dtype dtype, int64_t stride, int width = 8) {
  int64_t bytes = bytes_of(dtype) * width;
  if (bytes > 16) bytes = 16;
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(bytes) == 0 &&
         stride % width == 0;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dso
