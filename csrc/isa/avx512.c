/* AVX-512（F、BW、VL、DQ）：fp32 乘加；bf16 与 fp16 在读入时转 fp32。 */
#include <string.h>

#include "avx512_vec.h"
#include "simd_rows.h"

/* dst [n][m] = srcᵀ；整块走寄存器内 16x16 转置。 */
static void transpose(float *dst, int64_t ldd, const float *src, int64_t lds, int64_t m,
                      int64_t n) {
  for (int64_t i = 0; i < m; i += 16)
    for (int64_t j = 0; j < n; j += 16) {
      int rows = (int)dso_min(16, m - i), cols = (int)dso_min(16, n - j);
      __mmask16 in = (__mmask16)((1u << cols) - 1), out = (__mmask16)((1u << rows) - 1);
      __m512i r[16];
      for (int x = 0; x < 16; x++)
        r[x] = x < rows ? _mm512_maskz_loadu_epi32(in, src + (i + x) * lds + j)
                        : _mm512_setzero_si512();
      v_transpose16(r);
      for (int x = 0; x < cols; x++) _mm512_mask_storeu_epi32(dst + (j + x) * ldd + i, out, r[x]);
    }
}

/* 32 个寄存器：6x4 = 24 个累加器 + 4 个 B + 1 个广播。 */
#define GEMM_MAX_MR 8
#define GEMM_MAX_NV 4
/* clang-format off */
#define GEMM_TILES(X) \
  X(1, 4) X(2, 4) X(3, 4) X(4, 4) X(5, 4) X(6, 4) \
  X(1, 2) X(2, 2) X(3, 2) X(4, 2) X(5, 2) X(6, 2) X(7, 2) X(8, 2) \
  X(1, 1) X(2, 1) X(3, 1) X(4, 1) X(5, 1) X(6, 1) X(7, 1) X(8, 1)
/* clang-format on */
#define GEMM_NV(left) ((left) >= 4 ? 4 : (left) >= 2 ? 2 : 1)
#define GEMM_MR(nv) ((nv) == 4 ? 6 : 8)
#define DOT_MR 4
#define DOT_NR 6
#define DOT_NR_WIDE 8
#define AXPY_MR 4
#define AXPY_MAX 16
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

#define STREAM_REST from_f32
#include "avx512_stream.h"

static void dot(dso_dtype fmt, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
                const void *w, dso_dtype w_dtype, int64_t ldw, float *c, int64_t ldc) {
  (void)fmt;
  dot_f32(m, n, k, (const float *)a, lda, w, w_dtype, ldw, c, ldc);
}

static void stream_end(void) { _mm_sfence(); }

void dso_isa_init_avx512(dso_isa *isa) {
  *isa = (dso_isa){
      .name = "avx512",
      .to_f32 = to_f32,
      .from_f32 = from_f32,
      .stream = stream,
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
