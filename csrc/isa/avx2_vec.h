/* AVX2 + FMA + F16C 的向量小词汇：8 个 fp32。 */
#ifndef DSO_AVX2_VEC_H
#define DSO_AVX2_VEC_H

#include <immintrin.h>

#include "convert.h"
#include "isa.h"

#define VL 8
typedef __m256 vf;

static inline vf v_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void v_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
static inline vf v_set1(float x) { return _mm256_set1_ps(x); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
/* 第二个操作数是 NaN 时返回它：NaN 会传下去。 */
static inline vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf v_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline float v_hsum(vf v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline float v_hmax(vf v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline vf v_round(vf v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* mantissa * 2^exponent；exponent 低于 -126 时得 0（次正规数归零）。 */
static inline vf v_exp2_scale(vf mantissa, vf exponent) {
  vf tiny = _mm256_cmp_ps(exponent, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
  __m256i bits = _mm256_slli_epi32(_mm256_cvtps_epi32(exponent), 23);
  vf scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(mantissa), bits));
  scaled = _mm256_andnot_ps(tiny, scaled);
  return _mm256_blendv_ps(scaled, mantissa, _mm256_cmp_ps(mantissa, mantissa, _CMP_UNORD_Q));
}

static inline vf v_load_bf16(const uint16_t *p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline vf v_load_f16(const uint16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
static inline vf v_load_i8(const int8_t *p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
/* 数的 2^-8 倍：指数与尾数移到 fp16 的位置；0x7f 在那里是 480 / 256，换成 NaN。 */
static inline vf v_load_f8_256th(const uint8_t *p) {
  __m128i h = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i *)p)), 7);
  vf v = _mm256_cvtph_ps(_mm_and_si128(h, _mm_set1_epi16((short)0xbfff)));
  vf nan = _mm256_cmp_ps(v_abs(v), v_set1(1.875f), _CMP_EQ_OQ);
  return _mm256_or_ps(v, _mm256_and_ps(nan, v_set1(NAN)));
}
static inline vf v_load_f8(const uint8_t *p) { return v_load_f8_256th(p) * v_set1(256.0f); }
/* 32 个码的 2^-8 倍，不管 NaN；most 记下各字节两倍的码的最大值：是 0xfe 的有过 NaN。 */
typedef __m256i v_bytes;
static inline v_bytes v_bytes_zero(void) { return _mm256_setzero_si256(); }
static inline __attribute__((always_inline)) void v8_unpack(vf *out, const uint8_t *p,
                                                            v_bytes *most) {
  __m256i codes = _mm256_loadu_si256((const __m256i *)p);
  for (int i = 0; i < 2; i++) {
    __m128i half = i ? _mm256_extracti128_si256(codes, 1) : _mm256_castsi256_si128(codes);
    __m256i h = _mm256_slli_epi16(_mm256_cvtepi8_epi16(half), 7);
    h = _mm256_and_si256(h, _mm256_set1_epi16((short)0xbfff));
    out[2 * i] = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
    out[2 * i + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
  }
  *most = _mm256_max_epu8(*most, _mm256_add_epi8(codes, codes));
}
static inline int v_bytes_nan(v_bytes most) {
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(most, _mm256_set1_epi8((char)0xfe))) != 0;
}
static inline void v_store_bf16(uint16_t *p, vf v) {
  __m256i u = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}
static inline void v_store_f16(uint16_t *p, vf v) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline void v_store_i8(int8_t *p, vf v) {
  __m256i q = _mm256_cvtps_epi32(v);
  __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(h, h));
}
/* 各步同 dso_f32_to_f8；v_min 让 NaN 留到最后。 */
static inline void v_store_f8(uint8_t *p, vf v) {
  vf abs = v_min(v_set1(448.0f), v_abs(v));
  __m256i u = _mm256_castps_si256(abs);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 20), _mm256_set1_epi32(1));
  __m256i shifted = _mm256_add_epi32(u, _mm256_set1_epi32(0x7ffff - 0x3c000000));
  __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(shifted, odd), 20);
  __m256i tiny =
      _mm256_sub_epi32(_mm256_castps_si256(abs + v_set1(16384.0f)), _mm256_set1_epi32(0x46800000));
  __m256i small = _mm256_castps_si256(_mm256_cmp_ps(abs, v_set1(0x1p-6f), _CMP_LT_OQ));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  __m256i code = _mm256_blendv_epi8(normal, tiny, small);
  code = _mm256_blendv_epi8(code, _mm256_set1_epi32(0x7f), nan);
  __m256i sign = _mm256_srli_epi32(_mm256_castps_si256(v), 24);
  code = _mm256_or_si256(code, _mm256_and_si256(sign, _mm256_set1_epi32(0x80)));
  __m128i h = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
  _mm_storel_epi64((__m128i *)p, _mm_packus_epi16(h, h));
}

/* 4 位权重：每个码的值是 scale * 码 + offset。 */
typedef struct {
  vf scale, offset;
} v4;
static inline v4 v4_make(float scale, float offset) { return (v4){v_set1(scale), v_set1(offset)}; }
/* 16 字节解成 32 个 fp32；低 4 位是前 16 个，高 4 位是后 16 个。 */
static inline __attribute__((always_inline)) void v4_unpack(vf *out, const uint8_t *p, v4 t) {
  for (int i = 0; i < 2; i++) {
    __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p + 8 * i)));
    __m256i low = _mm256_and_si256(codes, _mm256_set1_epi32(15));
    out[i] = v_fma(_mm256_cvtepi32_ps(low), t.scale, t.offset);
    out[2 + i] = v_fma(_mm256_cvtepi32_ps(_mm256_srli_epi32(codes, 4)), t.scale, t.offset);
  }
}

#endif
