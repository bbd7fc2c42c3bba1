/* linear：y [M, N] = x [M, K] Wᵀ + b。
 *
 * 行数少（解码）：受内存带宽限制，W 原地读一遍，逐行点积。
 * 行数多：每任务算一块 [行块, 128 列]，W 的这一块打包一次、供整块行使用。
 */
#include <string.h>

#include "gemm.h"

static int all_bf16(const dso_linear_params *p) {
  return p->x.dtype == DSO_BF16 && p->weight.dtype == DSO_BF16;
}

static int is_small(const dso_linear_params *p) { return p->m <= DSO_DOT_MAX_M; }

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_linear_params *p = params;
  (void)isa;
  int64_t work = p->m * p->n * p->k;
  if (is_small(p))
    return (dso_plan){2, (size_t)(p->m * p->k) * 4, (size_t)DSO_DOT_MAX_M * DSO_DOT_MAX_N * 4,
                      work};
  return (dso_plan){2, 0, dso_gemm_scratch() + (size_t)DSO_MB * DSO_NB * 4, work};
}

/* 阶段 0：点积路径且 x 不是计算格式时，把 x 转成 fp32；阶段 1：计算。 */
static int64_t tasks(const void *params, int64_t stage) {
  const dso_linear_params *p = params;
  if (stage == 0) return is_small(p) && p->x.dtype != DSO_F32 ? p->m : 0;
  if (is_small(p)) return p->m ? dso_ceil_div(p->n, dso_dot_columns(p->k, p->weight.dtype)) : 0;
  return dso_block_count(p->m, p->n);
}

static void store_row(const dso_linear_params *p, const dso_isa *isa, int64_t row, int64_t n0,
                      int64_t nc, float *acc, float *bias) {
  if (p->bias) {
    isa->to_f32(bias, dso_at(p->bias, p->weight.dtype, n0), p->weight.dtype, nc);
    isa->vaxpy(acc, 1.0f, bias, nc);
  }
  isa->from_f32(dso_at_mut(p->y, p->y_dtype, row * p->n + n0), p->y_dtype, acc, nc);
}

static void run_small(const dso_ctx *ctx, int64_t task) {
  const dso_linear_params *p = ctx->params;
  dso_dtype fmt = dso_compute_format(ctx->isa, all_bf16(p));
  int64_t block = dso_dot_columns(p->k, p->weight.dtype), n0 = task * block,
          nc = dso_min(block, p->n - n0);
  int in_place = p->x.dtype == fmt;
  const void *x = in_place ? p->x.data : ctx->shared;
  float *c = ctx->worker, bias[DSO_DOT_MAX_N];
  if (p->k == 0) memset(c, 0, (size_t)(p->m * nc) * 4);
  ctx->isa->dot(fmt, p->m, nc, p->k, x, in_place ? p->x.rs : p->k,
                dso_at(p->weight.data, p->weight.dtype, n0 * p->weight.rs), p->weight.dtype,
                p->weight.rs, c, nc);
  for (int64_t i = 0; i < p->m; i++) store_row(p, ctx->isa, i, n0, nc, c + i * nc, bias);
}

static void run_block(const dso_ctx *ctx, int64_t task) {
  const dso_linear_params *p = ctx->params;
  dso_block b = dso_block_at(p->m, p->n, task);
  dso_gemm g = {.isa = ctx->isa,
                .fmt = dso_compute_format(ctx->isa, all_bf16(p)),
                .k = p->k,
                .a = p->x,
                .b = p->weight,
                .b_transposed = 1};
  float *c = ctx->worker, bias[DSO_NB];
  if (p->k == 0) memset(c, 0, (size_t)(b.mc * DSO_NB) * 4);
  dso_gemm_block(&g, b.m0, b.mc, b.n0, b.nc, c, DSO_NB, 0,
                 (char *)ctx->worker + (size_t)DSO_MB * DSO_NB * 4);
  for (int64_t i = 0; i < b.mc; i++)
    store_row(p, ctx->isa, b.m0 + i, b.n0, b.nc, c + i * DSO_NB, bias);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_linear_params *p = ctx->params;
  if (ctx->stage == 0) {
    if (dso_compute_format(ctx->isa, all_bf16(p)) == DSO_F32)
      ctx->isa->to_f32((float *)ctx->shared + task * p->k,
                       dso_at(p->x.data, p->x.dtype, task * p->x.rs), p->x.dtype, p->k);
  } else if (is_small(p)) {
    run_small(ctx, task);
  } else {
    run_block(ctx, task);
  }
}

const dso_op dso_linear = {"linear", plan, tasks, run};
