/* AVX-512 的向量小词汇：16 个 fp32。avx512.c 与 avx512bf16.c 共用。 */
#ifndef DSO_AVX512_VEC_H
#define DSO_AVX512_VEC_H

#include <immintrin.h>

#include "convert.h"
#include "isa.h"

#define VL 16
typedef __m512 vf;

static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
static inline vf v_set1(float x) { return _mm512_set1_ps(x); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
/* 第二个操作数是 NaN 时返回它：NaN 会传下去。 */
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf v_abs(vf a) { return _mm512_abs_ps(a); }
static inline float v_hsum(vf v) { return _mm512_reduce_add_ps(v); }
static inline float v_hmax(vf v) { return _mm512_reduce_max_ps(v); }
static inline vf v_exp2_scale(vf mantissa, vf exponent) {
  return _mm512_scalef_ps(mantissa, exponent);
}
static inline vf v_round(vf v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline vf v_load_bf16(const uint16_t *p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline vf v_load_f16(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
static inline vf v_load_i8(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
/* 数的 2^-8 倍：指数与尾数移到 fp16 的位置；0x7f 在那里是 480 / 256，换成 NaN。 */
static inline vf v_load_f8_256th(const uint8_t *p) {
  __m256i h = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p)), 7);
  vf v = _mm512_cvtph_ps(_mm256_and_si256(h, _mm256_set1_epi16((short)0xbfff)));
  __mmask16 nan = _mm512_cmp_ps_mask(v_abs(v), v_set1(1.875f), _CMP_EQ_OQ);
  return _mm512_mask_or_ps(v, nan, v, v_set1(NAN));
}
/* 32 个码的 2^-8 倍，不管 NaN；most 记下各字节两倍的码的最大值：是 0xfe 的有过 NaN。 */
typedef __m256i v_bytes;
static inline v_bytes v_bytes_zero(void) { return _mm256_setzero_si256(); }
static inline __attribute__((always_inline)) void v8_unpack(vf *out, const uint8_t *p,
                                                            v_bytes *most) {
  __m256i codes = _mm256_loadu_si256((const __m256i *)p);
  __m512i h = _mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7);
  h = _mm512_and_si512(h, _mm512_set1_epi16((short)0xbfff));
  out[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(h));
  out[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(h, 1));
  *most = _mm256_max_epu8(*most, _mm256_add_epi8(codes, codes));
}
static inline int v_bytes_nan(v_bytes most) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(most, _mm256_set1_epi8((char)0xfe))) != 0;
}
static inline vf v_load_f8(const uint8_t *p) { return v_load_f8_256th(p) * v_set1(256.0f); }
static inline __m256i v_to_bf16(vf v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  __m512i u = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}
static inline void v_store_bf16(uint16_t *p, vf v) {
  _mm256_storeu_si256((__m256i *)p, v_to_bf16(v));
}
static inline void v_store_f16(uint16_t *p, vf v) {
  _mm256_storeu_si256((__m256i *)p,
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void v_store_i8(int8_t *p, vf v) {
  _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
}
/* 各步同 dso_f32_to_f8；v_min 让 NaN 留到最后。 */
static inline void v_store_f8(uint8_t *p, vf v) {
  vf abs = v_min(v_set1(448.0f), v_abs(v));
  __m512i u = _mm512_castps_si512(abs);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 20), _mm512_set1_epi32(1));
  __m512i shifted = _mm512_add_epi32(u, _mm512_set1_epi32(0x7ffff - 0x3c000000));
  __m512i code = _mm512_srli_epi32(_mm512_add_epi32(shifted, odd), 20);
  __mmask16 small = _mm512_cmp_ps_mask(abs, v_set1(0x1p-6f), _CMP_LT_OQ);
  code = _mm512_mask_sub_epi32(code, small, _mm512_castps_si512(abs + v_set1(16384.0f)),
                               _mm512_set1_epi32(0x46800000));
  code =
      _mm512_mask_mov_epi32(code, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7f));
  __m512i sign = _mm512_srli_epi32(_mm512_castps_si512(v), 24);
  code = _mm512_or_si512(code, _mm512_and_si512(sign, _mm512_set1_epi32(0x80)));
  _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(code));
}

/* 4 位权重：16 个码的值（scale * 码 + offset）正好是一个向量，查表即反量化。 */
typedef vf v4;
static inline v4 v4_make(float scale, float offset) {
  vf code = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return v_fma(code, v_set1(scale), v_set1(offset));
}
/* 16 字节解成 32 个 fp32；低 4 位是前 16 个，高 4 位是后 16 个。查表只看下标的低 4 位，不必先屏蔽。 */
static inline __attribute__((always_inline)) void v4_unpack(vf *out, const uint8_t *p, v4 t) {
  __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
  out[0] = _mm512_permutexvar_ps(codes, t);
  out[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), t);
}

/* 16x16 个 32 位元素转置：四轮蝶形交换。 */
static inline void v_transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#endif
