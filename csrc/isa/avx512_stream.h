/* 绕过缓存的写出，由 avx512.c、avx512bf16.c 各包含一次（转 bf16 的指令不同）。 */

static inline __attribute__((always_inline)) __m512i stream_line(const float *src,
                                                                 dso_dtype dtype) {
  __m256i half[2];
  for (int i = 0; i < 2; i++) {
    vf v = v_load(src + i * VL);
    half[i] = dtype == DSO_BF16 ? v_to_bf16(v)
                                : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  return _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
}

/* 一次写满一条缓存行（64 字节）；没有对齐的目标与尾部照常写。 */
static void stream(void *dst, dso_dtype dtype, const float *src, int64_t n) {
  int64_t i = 0;
  if ((uintptr_t)dst % 64 == 0 && dtype == DSO_F32)
    for (; i + VL <= n; i += VL) _mm512_stream_ps((float *)dst + i, v_load(src + i));
  else if ((uintptr_t)dst % 64 == 0 && dtype == DSO_BF16)
    for (; i + 2 * VL <= n; i += 2 * VL)
      _mm512_stream_si512((void *)((uint16_t *)dst + i), stream_line(src + i, DSO_BF16));
  else if ((uintptr_t)dst % 64 == 0 && dtype == DSO_F16)
    for (; i + 2 * VL <= n; i += 2 * VL)
      _mm512_stream_si512((void *)((uint16_t *)dst + i), stream_line(src + i, DSO_F16));
  STREAM_REST(dso_at_mut(dst, dtype, i), dtype, src + i, n - i);
}
