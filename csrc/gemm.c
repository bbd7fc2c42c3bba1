#include "gemm.h"

#include <string.h>

dso_dtype dso_compute_format(const dso_isa *isa, int all_bf16) {
  return all_bf16 && isa->native_bf16 ? DSO_BF16 : DSO_F32;
}

static int64_t row_block(int64_t m) {
  int64_t blocks = dso_ceil_div(m, DSO_MB);
  return blocks ? dso_min(DSO_MB, dso_round_up(dso_ceil_div(m, blocks), 24)) : DSO_MB;
}

int64_t dso_block_count(int64_t m, int64_t n) {
  return dso_ceil_div(m, row_block(m)) * dso_ceil_div(n, DSO_NB);
}

dso_block dso_block_at(int64_t m, int64_t n, int64_t index) {
  int64_t rows = row_block(m), blocks = dso_ceil_div(m, rows);
  int64_t m0 = index % blocks * rows, n0 = index / blocks * DSO_NB;
  return (dso_block){m0, dso_min(rows, m - m0), n0, dso_min(DSO_NB, n - n0)};
}

/* 每次处理的 k：打包的 B 不超过 DSO_NB 列时的大小，列多则 k 少。 */
static int64_t depth_of(dso_dtype fmt, int64_t nc) {
  int64_t fit = DSO_NB * DSO_KB_BYTES / dso_round_up(dso_max(1, nc), DSO_PANEL) / dso_size_of(fmt);
  return dso_max(2, dso_min(DSO_KB_BYTES / dso_size_of(fmt), fit / 2 * 2));
}

size_t dso_gemm_scratch(void) { return (size_t)(DSO_NB + DSO_MB + 4) * DSO_KB_BYTES; }

/* A [m0:m0+mc, k0:k0+kc] 转成计算格式的连续行，行距 lda；BF16 的奇数尾补 0。 */
static void copy_rows(const dso_gemm *g, int64_t m0, int64_t mc, int64_t k0, int64_t kc, void *dst,
                      int64_t lda, float *row) {
  for (int64_t i = 0; i < mc; i++) {
    const void *src = dso_at(g->a.data, g->a.dtype, (m0 + i) * g->a.rs + k0);
    if (g->fmt == DSO_F32) {
      g->isa->to_f32((float *)dst + i * lda, src, g->a.dtype, kc);
      continue;
    }
    uint16_t *out = (uint16_t *)dst + i * lda;
    if (g->a.dtype == DSO_BF16) {
      memcpy(out, src, (size_t)kc * 2);
    } else {
      g->isa->to_f32(row, src, g->a.dtype, kc);
      g->isa->from_f32(out, DSO_BF16, row, kc);
    }
    if (kc & 1) out[kc] = 0;
  }
}

static void pack_b(const dso_gemm *g, int64_t n0, int64_t nc, int64_t k0, int64_t kc, void *dst,
                   int64_t panel_stride) {
  if (g->b_transposed)
    g->isa->pack_t(dst, g->fmt, panel_stride, dso_at(g->b.data, g->b.dtype, n0 * g->b.rs + k0),
                   g->b.dtype, g->b.rs, nc, kc);
  else
    g->isa->pack_n(dst, g->fmt, panel_stride, dso_at(g->b.data, g->b.dtype, k0 * g->b.rs + n0),
                   g->b.dtype, g->b.rs, nc, kc);
}

void dso_gemm_block(const dso_gemm *g, int64_t m0, int64_t mc, int64_t n0, int64_t nc, float *c,
                    int64_t ldc, int accumulate, void *scratch) {
  int64_t depth = depth_of(g->fmt, nc);
  for (int64_t i = 0; g->k == 0 && !accumulate && i < mc; i++)
    memset(c + i * ldc, 0, (size_t)nc * 4);
  char *packed = scratch, *rows = packed + (size_t)DSO_NB * DSO_KB_BYTES;
  float *row = (float *)(rows + (size_t)DSO_MB * DSO_KB_BYTES); /* 一行 fp32，至多 KB 个元素 */
  for (int64_t k0 = 0; k0 < g->k; k0 += depth) {
    int64_t kc = dso_min(depth, g->k - k0), k_pad = g->fmt == DSO_BF16 ? dso_round_up(kc, 2) : kc;
    int64_t panel_stride = dso_panel_elems(g->fmt, kc), lda = g->a.rs;
    const void *a = dso_at(g->a.data, g->a.dtype, m0 * g->a.rs + k0);
    pack_b(g, n0, nc, k0, kc, packed, panel_stride);
    int add = accumulate || k0 > 0;
    int64_t panels = dso_ceil_div(nc, DSO_PANEL);
    if (g->a_transposed) {
      const void *from = dso_at(g->a.data, g->a.dtype, k0 * g->a.rs + m0);
      g->isa->pack_n(rows, g->fmt, panel_stride, from, g->a.dtype, g->a.rs, mc, kc);
      g->isa->gemm_t(g->fmt, mc, panels, k_pad, rows, panel_stride, packed, panel_stride, c, ldc,
                     add);
      continue;
    }
    if (g->a.dtype != g->fmt || kc != k_pad) {
      copy_rows(g, m0, mc, k0, kc, rows, k_pad, row);
      a = rows, lda = k_pad;
    }
    g->isa->gemm(g->fmt, mc, panels, k_pad, a, lda, packed, panel_stride, c, ldc, add);
  }
}
