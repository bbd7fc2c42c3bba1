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

/* out 的一行：加上原有的值（要加时），转成它的类型。 */
static void store_row(const dso_gemm *g, const dso_gemm_out *out, int64_t i, int64_t n0, int64_t nc,
                      float *row, float *old) {
  void *to = dso_at_mut(out->data, out->dtype, i * out->rs + n0);
  if (out->add) {
    g->isa->to_f32(old, to, out->dtype, nc);
    g->isa->vaxpy(row, 1.0f, old, nc);
  }
  (out->stream ? g->isa->stream : g->isa->from_f32)(to, out->dtype, row, nc);
}

enum { STORE_COLUMNS = 256 }; /* 一个面板的行 x 这么多列：中转 16 KiB，留在一级缓存里 */

/* 一个面板的行，k 的一段；last 时随即写出。 */
static void store_panel(const dso_gemm *g, const dso_gemm_out *out, int64_t m0, int64_t mc,
                        int64_t n0, int64_t nc, int64_t kc, const void *rows, const void *packed,
                        float *c, int64_t ldc, int add, int last, float *old) {
  int64_t stride = dso_panel_elems(g->fmt, kc), k_pad = stride / DSO_PANEL;
  for (int64_t j = 0; j < nc; j += STORE_COLUMNS) {
    int64_t width = dso_min(STORE_COLUMNS, nc - j);
    g->isa->gemm_t(g->fmt, mc, dso_ceil_div(width, DSO_PANEL), k_pad, rows, stride,
                   dso_at(packed, g->fmt, j / DSO_PANEL * stride), stride, c + j, ldc, add);
    for (int64_t r = 0; last && r < mc; r++)
      store_row(g, out, m0 + r, n0 + j, width, c + r * ldc + j, old);
  }
}

/* k 的最后一段逐面板算完就写出，趁结果还在一级缓存里；只有一段时中转只用得到一个面板的行。 */
void dso_gemm_store(const dso_gemm *g, int64_t m0, int64_t mc, int64_t n0, int64_t nc,
                    const dso_gemm_out *out, float *c, int64_t ldc, void *scratch) {
  int64_t depth = depth_of(g->fmt, nc);
  char *packed = scratch, *rows = packed + (size_t)DSO_NB * DSO_KB_BYTES;
  float *old = (float *)(rows + (size_t)DSO_MB * DSO_KB_BYTES);
  for (int64_t k0 = 0; k0 < g->k || k0 == 0; k0 += depth) {
    int64_t kc = dso_min(depth, g->k - k0), stride = dso_panel_elems(g->fmt, kc);
    int last = k0 + kc == g->k, once = k0 == 0 && last;
    pack_b(g, n0, nc, k0, kc, packed, stride);
    const void *from = dso_at(g->a.data, g->a.dtype, k0 * g->a.rs + m0);
    g->isa->pack_n(rows, g->fmt, stride, from, g->a.dtype, g->a.rs, mc, kc);
    for (int64_t i = 0; i < mc; i += DSO_PANEL)
      store_panel(g, out, m0 + i, dso_min(DSO_PANEL, mc - i), n0, nc, kc,
                  dso_at(rows, g->fmt, i / DSO_PANEL * stride), packed, once ? c : c + i * ldc, ldc,
                  k0 > 0, last, old);
  }
  if (out->stream) g->isa->stream_end();
}
