/* moe_experts 与其反向共用的部分；见 moe_experts.h。 */
#include <string.h>

#include "moe_experts.h"

static size_t rows_bytes(const dso_moe_inputs *in) {
  int64_t most = in->transposed ? DSO_MOE_AXPY_ROWS : 0;
  return dso_moe_bytes(dso_min(most, in->most_rows) * in->widest, DSO_F32);
}

/* 解开的权重：DSO_NB 行的一段，或 DSO_DOT_UNIT 整行。 */
static size_t unpacked_bytes(const dso_moe_inputs *in) {
  if (!in->quantized || dso_moe_is_direct(in, in->most_rows)) return 0;
  int64_t whole = DSO_DOT_UNIT * dso_round_up(in->widest, 32) * 4;
  return (size_t)dso_max(whole, (int64_t)DSO_NB * DSO_KB_BYTES);
}

size_t dso_moe_scratch_bytes(const dso_moe_inputs *in, int packs) {
  return rows_bytes(in) + unpacked_bytes(in) + (packs ? dso_gemm_scratch() : 0);
}

dso_moe_scratch dso_moe_scratch_at(const dso_moe_inputs *in, void *base) {
  char *unpacked = (char *)base + rows_bytes(in);
  return (dso_moe_scratch){base, unpacked, unpacked + unpacked_bytes(in)};
}

static void add_bias(const dso_isa *isa, const dso_moe_product *p, float *out, int64_t ldc) {
  for (int64_t j = 0; p->bias && j < p->nc; j++) {
    float b;
    isa->to_f32(&b, dso_at(p->bias, p->bias_dtype, (p->n0 + j) * p->bias_step), p->bias_dtype, 1);
    for (int64_t i = 0; i < p->m; i++) out[i * ldc + j] += b;
  }
}

/* 行数不太多：每次把几列整行解成计算格式，直接做点积，与没有量化时相同。 */
static void multiply_columns(const dso_isa *isa, dso_dtype fmt, const dso_moe_product *p,
                             float *out, int64_t ldc, const dso_moe_scratch *scratch) {
  const dso_mat *w = &p->w;
  int64_t ld = dso_round_up(p->k, 32); /* 按缓存行取整 */
  for (int64_t j0 = 0; j0 < p->nc; j0 += DSO_DOT_UNIT) {
    int64_t columns = dso_min(DSO_DOT_UNIT, p->nc - j0);
    for (int64_t j = 0; j < columns; j++) {
      int64_t row = p->n0 + j0 + j;
      dso_quant q = dso_quant_at(p->quant, row, 0);
      isa->dequant(dso_at_mut(scratch->unpacked, fmt, j * ld), fmt,
                   dso_at(w->data, w->dtype, row * w->rs), w->dtype, &q, p->k);
    }
    isa->dot(fmt, p->m, columns, p->k, p->a, p->k, scratch->unpacked, fmt, ld, out + j0, ldc);
  }
}

/* 行数多：沿 k 逐段解成计算格式的 [nc][段长]，再走打包的矩阵乘。段长是 128（最大的组）的倍数。 */
static void multiply_unpacked(const dso_isa *isa, dso_dtype fmt, const dso_moe_product *p,
                              float *out, int64_t ldc, const dso_moe_scratch *scratch) {
  int64_t depth = DSO_KB_BYTES / dso_size_of(fmt);
  const dso_mat *w = &p->w;
  for (int64_t k0 = 0; k0 < p->k; k0 += depth) {
    int64_t kc = dso_min(depth, p->k - k0), at = w->dtype == DSO_I4 ? k0 / 2 : k0;
    int64_t group = p->quant->group ? k0 / p->quant->group : 0;
    for (int64_t j = 0; j < p->nc; j++) {
      dso_quant q = dso_quant_at(p->quant, p->n0 + j, group);
      isa->dequant(dso_at_mut(scratch->unpacked, fmt, j * depth), fmt,
                   dso_at(w->data, w->dtype, (p->n0 + j) * w->rs + at), w->dtype, &q, kc);
    }
    dso_gemm g = {.isa = isa,
                  .fmt = fmt,
                  .k = kc,
                  .a = {dso_at(p->a, fmt, k0), p->k, fmt},
                  .b = {scratch->unpacked, depth, fmt},
                  .b_transposed = 1};
    dso_gemm_block(&g, 0, p->m, 0, p->nc, out, ldc, k0 > 0, scratch->scratch);
  }
}

static void multiply_quantized(const dso_isa *isa, dso_dtype fmt, const dso_moe_product *p,
                               float *out, int64_t ldc, const dso_moe_scratch *scratch) {
  if (!p->packed_stride) {
    (p->m <= DSO_DOT_MAX_M ? multiply_columns : multiply_unpacked)(isa, fmt, p, out, ldc, scratch);
    return;
  }
  const dso_mat *w = &p->w;
  dso_quant q = dso_quant_at(p->quant, p->n0, 0);
  isa->dot_q(p->m, p->nc, p->k, p->a, p->packed_stride, dso_at(w->data, w->dtype, p->n0 * w->rs),
             w->dtype, w->rs, &q, out, ldc, p->next);
}

void dso_moe_multiply(const dso_isa *isa, const dso_moe_inputs *in, dso_dtype fmt,
                      const dso_moe_product *p, float *out, int64_t ldc,
                      const dso_moe_scratch *scratch) {
  const dso_mat *w = &p->w;
  if (p->k == 0) {
    for (int64_t i = 0; i < p->m; i++) memset(out + i * ldc, 0, (size_t)p->nc * 4);
  } else if (dso_moe_is_quantized(w)) {
    multiply_quantized(isa, fmt, p, out, ldc, scratch);
  } else if (!dso_moe_is_direct_plain(in, p->m)) {
    dso_gemm g = {.isa = isa,
                  .fmt = fmt,
                  .k = p->k,
                  .a = {p->a, p->k, fmt},
                  .b = *w,
                  .b_transposed = !in->transposed};
    dso_gemm_block(&g, 0, p->m, p->n0, p->nc, out, ldc, 0, scratch->scratch);
  } else if (in->transposed) {
    const float *a = p->a;
    if (fmt != DSO_F32) isa->to_f32(scratch->rows, p->a, fmt, p->m * p->k), a = scratch->rows;
    isa->axpy_n(p->m, p->nc, p->k, a, p->k, dso_at(w->data, w->dtype, p->n0), w->dtype, w->rs, out,
                ldc);
  } else {
    isa->dot(fmt, p->m, p->nc, p->k, p->a, p->k, dso_at(w->data, w->dtype, p->n0 * w->rs), w->dtype,
             w->rs, out, ldc);
  }
  add_bias(isa, p, out, ldc);
}

/* 交错：偶数列是 gate，奇数列是 up。原地分开，g 逐行覆盖自己已读过的部分。 */
static void split_pairs(float *g, float *u, int64_t m, int64_t nc, int64_t ld) {
  for (int64_t i = 0; i < m; i++) {
    float *both = g + i * ld, *odd = u + i * ld;
    for (int64_t j = 0; j < nc; j++) odd[j] = both[2 * j + 1], both[j] = both[2 * j];
  }
}

void dso_moe_gate_up(const dso_isa *isa, const dso_moe_inputs *in, dso_dtype fmt,
                     const dso_expert *e, int64_t m, int64_t n0, int64_t nc, const void *x,
                     float *g, float *u, int64_t ld, const dso_moe_scratch *scratch) {
  dso_moe_product p = {m,
                       in->k,
                       n0,
                       nc,
                       x,
                       e->gate,
                       e->gate_bias,
                       e->bias_dtype,
                       e->bias_step,
                       &e->gate_quant,
                       dso_moe_packed_stride(in, e - in->expert),
                       NULL};
  if (in->paired) {
    p.n0 = 2 * n0, p.nc = 2 * nc;
    dso_moe_multiply(isa, in, fmt, &p, g, ld, scratch);
    split_pairs(g, u, m, nc, ld);
    return;
  }
  if (p.packed_stride && in->gated) p.next = dso_at(e->up.data, e->up.dtype, n0 * e->up.rs);
  dso_moe_multiply(isa, in, fmt, &p, g, ld, scratch);
  if (!in->gated) return;
  p.w = e->up, p.bias = e->up_bias, p.quant = &e->up_quant, p.next = NULL;
  dso_moe_multiply(isa, in, fmt, &p, u, ld, scratch);
}

int64_t dso_moe_hidden_columns(const dso_moe_inputs *in, int64_t e) {
  if (in->paired) return DSO_NB / 2; /* 两倍的列一次算出 */
  if (in->transposed || !dso_moe_is_direct(in, dso_moe_rows(in, e))) return DSO_NB;
  if (in->backward) return DSO_MOE_WIDE;
  return dso_min(DSO_NB, dso_dot_columns(in->k, in->expert[e].gate.dtype));
}

static int64_t lower_bound(const int64_t *values, int64_t begin, int64_t end, int64_t want) {
  while (begin < end) {
    int64_t middle = begin + (end - begin) / 2;
    if (values[middle] < want)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

int64_t dso_moe_rows_in(const dso_moe_inputs *in, int64_t e, int64_t t0, int64_t t1,
                        int64_t *first) {
  *first = lower_bound(in->token, in->begin[e], in->begin[e + 1], t0);
  return lower_bound(in->token, *first, in->begin[e + 1], t1);
}

/* bf16 的计算格式：量化的权重解开后可以是 bf16。 */
static int allows_bf16(const dso_mat *w) { return w->dtype == DSO_BF16 || dso_moe_is_quantized(w); }

void dso_moe_prepare(dso_moe_inputs *in, int backward, int64_t *at) {
  int64_t *hidden_at = at, *task_at = hidden_at + in->experts + 1,
          *packed_at = task_at + in->experts + 1;
  in->backward = backward;
  in->hidden_at = hidden_at, in->task_at = task_at, in->packed_at = packed_at;
  in->most_rows = 0, in->widest = dso_max(in->k, in->n), in->inner_blocks = 1;
  in->all_bf16 = in->x.dtype == DSO_BF16, in->quantized = 0;
  for (int64_t i = 0; i < in->experts; i++)
    in->quantized |= dso_moe_is_quantized(&in->expert[i].down);
  hidden_at[0] = task_at[0] = packed_at[0] = 0;
  for (int64_t i = 0; i < in->experts; i++) {
    const dso_expert *e = &in->expert[i];
    int64_t rows = dso_moe_rows(in, i),
            blocks = dso_ceil_div(e->inner, dso_moe_hidden_columns(in, i));
    int packed = dso_moe_is_quantized(&e->down) && rows <= DSO_MOE_QUANT_ROWS;
    hidden_at[i + 1] = hidden_at[i] + rows * e->inner;
    task_at[i + 1] = task_at[i] + dso_ceil_div(rows, DSO_MB) * blocks;
    packed_at[i + 1] = packed_at[i] + (packed ? rows : 0);
    in->most_rows = dso_max(in->most_rows, rows);
    in->widest = dso_max(in->widest, e->inner);
    in->inner_blocks = dso_max(in->inner_blocks, blocks);
    in->all_bf16 = in->all_bf16 && allows_bf16(&e->gate) && allows_bf16(&e->down);
  }
}

dso_moe_block dso_moe_hidden_block(const dso_moe_inputs *in, int64_t task) {
  int64_t e = dso_moe_find(in->task_at, in->experts, task);
  task -= in->task_at[e];
  int64_t rows = dso_moe_rows(in, e), blocks = dso_ceil_div(rows, DSO_MB);
  int64_t row = task % blocks * DSO_MB, width = dso_moe_hidden_columns(in, e);
  int64_t n0 = task / blocks * width;
  return (dso_moe_block){e, row, dso_min(DSO_MB, rows - row), n0,
                         dso_min(width, in->expert[e].inner - n0)};
}

void dso_moe_gather(const dso_isa *isa, const dso_moe_inputs *in, dso_dtype fmt, dso_mat src,
                    int64_t width, int64_t task, void *dst) {
  int64_t first = task * DSO_MOE_GATHER, last = dso_min(first + DSO_MOE_GATHER, dso_moe_total(in));
  for (int64_t i = first; i < last; i++) {
    const void *from = dso_at(src.data, src.dtype, in->token[i] * src.rs);
    void *to = dso_at_mut(dst, fmt, i * width);
    if (fmt == src.dtype)
      memcpy(to, from, (size_t)(width * dso_size_of(fmt)));
    else
      isa->to_f32(to, from, src.dtype, width);
  }
}

void dso_moe_sort(const int64_t *index, int64_t tokens, int64_t top_k, int64_t experts,
                  int64_t *begin, int64_t *token, int64_t *slot) {
  memset(begin, 0, (size_t)(experts + 1) * sizeof *begin);
  for (int64_t i = 0; i < tokens * top_k; i++)
    if (index[i] >= 0 && index[i] < experts) begin[index[i] + 1]++;
  for (int64_t e = 0; e < experts; e++) begin[e + 1] += begin[e];
  /* begin[e] 先当写入位置用，最后整体后移一格恢复 */
  for (int64_t i = 0; i < tokens * top_k; i++) {
    if (index[i] < 0 || index[i] >= experts) continue;
    int64_t at = begin[index[i]]++;
    token[at] = i / top_k, slot[at] = i;
  }
  memmove(begin + 1, begin, (size_t)experts * sizeof *begin);
  begin[0] = 0;
}
