/* linear 的反向：dx [M, K] = grad W；dw [N, K] = gradᵀ x；db [N] = 按列求和。
 * 三者互不依赖，任务编号依次排列：先 dx 的块，再 dw 的块，再 db 的列块。 */
#include <string.h>

#include "gemm.h"

typedef struct {
  int64_t dx, dw, db; /* 各部分任务数 */
} parts;

static parts count(const dso_linear_backward_params *p) {
  return (parts){p->dx ? dso_block_count(p->m, p->k) : 0, p->dw ? dso_block_count(p->n, p->k) : 0,
                 p->db ? dso_ceil_div(p->n, DSO_NB) : 0};
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  (void)params, (void)isa;
  return (dso_plan){1, 0, dso_gemm_scratch() + (size_t)DSO_MB * DSO_NB * 4, 0};
}

static int64_t tasks(const void *params, int64_t stage) {
  parts n = count(params);
  return stage == 0 ? n.dx + n.dw + n.db : 0;
}

/* 一块输出 [rows 块, 128 列]，写成 out 的 dtype；out 的行距为 k。 */
static void product(const dso_ctx *ctx, const dso_gemm *g, int64_t m, int64_t k, int64_t task,
                    void *out, dso_dtype dtype) {
  dso_block b = dso_block_at(m, k, task);
  float *c = ctx->worker;
  if (g->k == 0) memset(c, 0, (size_t)DSO_MB * DSO_NB * 4);
  dso_gemm_block(g, b.m0, b.mc, b.n0, b.nc, c, DSO_NB, 0,
                 (char *)ctx->worker + (size_t)DSO_MB * DSO_NB * 4);
  for (int64_t i = 0; i < b.mc; i++)
    ctx->isa->from_f32(dso_at_mut(out, dtype, (b.m0 + i) * k + b.n0), dtype, c + i * DSO_NB, b.nc);
}

static void column_sum(const dso_ctx *ctx, const dso_linear_backward_params *p, int64_t task) {
  float sum[DSO_NB] = {0}, row[DSO_NB];
  int64_t n0 = task * DSO_NB, nc = dso_min(DSO_NB, p->n - n0);
  for (int64_t i = 0; i < p->m; i++) {
    ctx->isa->to_f32(row, dso_at(p->grad.data, p->grad.dtype, i * p->grad.rs + n0), p->grad.dtype,
                     nc);
    ctx->isa->vaxpy(sum, 1.0f, row, nc);
  }
  ctx->isa->from_f32(dso_at_mut(p->db, p->weight.dtype, n0), p->weight.dtype, sum, nc);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_linear_backward_params *p = ctx->params;
  parts n = count(p);
  int bf16 = p->grad.dtype == DSO_BF16;
  dso_dtype fmt_dx = dso_compute_format(ctx->isa, bf16 && p->weight.dtype == DSO_BF16);
  dso_dtype fmt_dw = dso_compute_format(ctx->isa, bf16 && p->x.dtype == DSO_BF16);
  if (task < n.dx) {
    dso_gemm g = {.isa = ctx->isa, .fmt = fmt_dx, .k = p->n, .a = p->grad, .b = p->weight};
    product(ctx, &g, p->m, p->k, task, p->dx, p->x.dtype);
  } else if (task < n.dx + n.dw) {
    dso_gemm g = {
        .isa = ctx->isa, .fmt = fmt_dw, .k = p->m, .a = p->grad, .a_transposed = 1, .b = p->x};
    product(ctx, &g, p->n, p->k, task - n.dx, p->dw, p->weight.dtype);
  } else {
    column_sum(ctx, p, task - n.dx - n.dw);
  }
}

const dso_op dso_linear_backward = {"linear_backward", plan, tasks, run};
