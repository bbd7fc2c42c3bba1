// 主机模拟：fp16 与 fp32 互转（含非规格数、无穷与 NaN），最近舍入、平局取偶。
#pragma once

#include <cuda_runtime.h>

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

// 指数移到 fp32 的位置再乘 2^112：规格、非规格数都对；无穷与 NaN 另外补上指数。
inline float __half2float(__half value) {
  unsigned magnitude = (value.bits & 0x7fffu) << 13, sign = (value.bits & 0x8000u) << 16;
  float f = __uint_as_float(magnitude) * 0x1p112f;
  if (magnitude >= 0x7c00u << 13) f = __uint_as_float(magnitude | 0x7f800000u);
  return __uint_as_float(__float_as_uint(f) | sign);
}

inline __half __float2half_rn(float value) {
  unsigned short sign = std::signbit(value) ? 0x8000 : 0;
  if (value != value) return {static_cast<unsigned short>(sign | 0x7e00)};
  float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7c00)};
  int exponent;
  std::frexp(magnitude, &exponent);    // magnitude = m 2^exponent，0.5 <= m < 1
  if (exponent < -13) exponent = -13;  // 非规格数的步长固定为 2^-24
  int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  int bits = magnitude == 0 ? 0 : steps + ((exponent + 13) << 10);  // 进位自然进到指数
  return {static_cast<unsigned short>(sign | bits)};
}
