/* 单个数值的类型转换，全部按 IEEE 就近取偶；scalar 路径与各指令集的尾部共用。 */
#ifndef DSO_CONVERT_H
#define DSO_CONVERT_H

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float dso_bits_f32(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

static inline uint32_t dso_f32_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}

static inline float dso_bf16_to_f32(uint16_t h) { return dso_bits_f32((uint32_t)h << 16); }

static inline uint16_t dso_f32_to_bf16(float f) {
  uint32_t u = dso_f32_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40); /* NaN 保持安静 */
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

static inline float dso_f16_to_f32(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 0x3ff;
  if (exp == 31) return dso_bits_f32(sign | 0x7f800000u | (man << 13));
  if (exp) return dso_bits_f32(sign | ((exp + 112) << 23) | (man << 13));
  float tiny = (float)man * 0x1p-24f; /* 次正规数 */
  return sign ? -tiny : tiny;
}

static inline uint16_t dso_f32_to_f16(float f) {
  uint32_t u = dso_f32_bits(f), sign = (u >> 16) & 0x8000, abs = u & 0x7fffffffu;
  if (abs > 0x7f800000u) return (uint16_t)(sign | 0x7e00 | ((abs >> 13) & 0x3ff));
  if (abs >= 0x477ff000u) return (uint16_t)(sign | 0x7c00); /* 舍入后溢出 */
  if (abs < 0x38800000u) {                                  /* 次正规：借助浮点加法舍入 */
    float scaled = dso_bits_f32(abs) + 0.5f;
    return (uint16_t)(sign | (dso_f32_bits(scaled) - 0x3f000000u));
  }
  uint32_t rounded = abs + 0xfffu + ((abs >> 13) & 1);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

/* e4m3fn：4 位指数（偏移 7）、3 位尾数。 */
static inline float dso_f8_to_f32(uint8_t b) {
  uint32_t sign = (uint32_t)(b & 0x80) << 24, exp = (b >> 3) & 15, man = b & 7;
  if ((b & 0x7f) == 0x7f) return dso_bits_f32(sign | 0x7fc00000u);
  if (exp) return dso_bits_f32(sign | ((exp + 120) << 23) | (man << 20));
  float tiny = (float)man * 0x1p-9f; /* 次正规数 */
  return sign ? -tiny : tiny;
}

/* 超出范围的（含无穷）取最大的数 448。 */
static inline uint8_t dso_f32_to_f8(float f) {
  uint32_t u = dso_f32_bits(f), sign = (u >> 24) & 0x80, abs = u & 0x7fffffffu;
  if (abs > 0x7f800000u) return (uint8_t)(sign | 0x7f);
  if (abs >= 0x43e00000u) return (uint8_t)(sign | 0x7e);
  if (abs < 0x3c800000u) /* 次正规（小于 2^-6，步长 2^-9）：借助浮点加法舍入 */
    return (uint8_t)(sign | (dso_f32_bits(dso_bits_f32(abs) + 16384.0f) - 0x46800000u));
  return (uint8_t)(sign | ((abs + 0x7ffffu + ((abs >> 20) & 1) - 0x3c000000u) >> 20));
}

#endif
