/* AVX2 + FMA + F16C：fp32 乘加；bf16 与 fp16 在读入时转 fp32。 */
#include <string.h>

#include "avx2_vec.h"
#include "simd_rows.h"

/* 8x8 转置：unpack、shuffle、跨 128 位交换各一轮。 */
static void transpose8(float *dst, int64_t ldd, const float *src, int64_t lds) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(src + i * lds);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(dst + i * ldd, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * ldd, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

/* dst [n][m] = srcᵀ。 */
static void transpose(float *dst, int64_t ldd, const float *src, int64_t lds, int64_t m,
                      int64_t n) {
  for (int64_t i = 0; i < m; i += 8)
    for (int64_t j = 0; j < n; j += 8) {
      if (i + 8 <= m && j + 8 <= n) {
        transpose8(dst + j * ldd + i, ldd, src + i * lds + j, lds);
        continue;
      }
      for (int64_t x = i; x < dso_min(i + 8, m); x++)
        for (int64_t y = j; y < dso_min(j + 8, n); y++) dst[y * ldd + x] = src[x * lds + y];
    }
}

/* 16 个寄存器：6x1 个面板（每面板 2 个向量）= 12 个累加器 + 2 个 B + 1 个广播。 */
#define GEMM_MAX_MR 6
#define GEMM_MAX_NV 1
#define GEMM_TILES(X) X(1, 1) X(2, 1) X(3, 1) X(4, 1) X(5, 1) X(6, 1)
#define GEMM_NV(left) ((void)(left), 1)
#define GEMM_MR(nv) ((void)(nv), 6)
#define DOT_MR 2
#define DOT_NR 5
#define DOT_NR_WIDE 8
#define AXPY_MR 2
#define AXPY_MAX 8
#define DOT_NR_QUANT 4
#include "simd_gemm.h"
#include "simd_quant.h"

static void pack_t(void *dst, dso_dtype fmt, int64_t ps, const void *src, dso_dtype dtype,
                   int64_t ld, int64_t n, int64_t k) {
  (void)fmt; /* 本指令集只用 fp32 计算格式 */
  pack_t_f32((float *)dst, ps, src, dtype, ld, n, k);
}

static void pack_n(void *dst, dso_dtype fmt, int64_t ps, const void *src, dso_dtype dtype,
                   int64_t ld, int64_t n, int64_t k) {
  (void)fmt;
  pack_n_f32((float *)dst, ps, src, dtype, ld, n, k);
}

static void gemm_strided(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, const void *a,
                         int64_t lda, int64_t ks, const void *b, int64_t ps, float *c, int64_t ldc,
                         int accumulate) {
  (void)fmt;
  gemm_f32(m, panels, k, (const float *)a, lda, ks, (const float *)b, ps, c, ldc, accumulate);
}

#include "gemm_layouts.h"

static void dot(dso_dtype fmt, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
                const void *w, dso_dtype w_dtype, int64_t ldw, float *c, int64_t ldc) {
  (void)fmt;
  dot_f32(m, n, k, (const float *)a, lda, w, w_dtype, ldw, c, ldc);
}

static void stream_end(void) {}

void dso_isa_init_avx2(dso_isa *isa) {
  *isa = (dso_isa){
      .name = "avx2",
      .to_f32 = to_f32,
      .from_f32 = from_f32,
      .stream = from_f32,
      .stream_end = stream_end,
      .pack_t = pack_t,
      .pack_n = pack_n,
      .gemm = gemm,
      .gemm_t = gemm_t,
      .dot = dot,
      .axpy_n = axpy_n,
      .pack_q = pack_q,
      .dot_q = dot_q,
      .dequant = dequant,
      .transpose = transpose,
      .softmax_row = softmax_row,
      .softmax_backward = softmax_backward,
      .activate = activate,
      .activate_backward = activate_backward,
      .vdot = vdot,
      .vaxpy = vaxpy,
      .vscale = vscale,
      .vamax = vamax,
      .vmax = vmax,
  };
}
