/* RMS 归一化的反向。记 s = rsqrt(mean(x²) + eps)，x̂ = x s，g = grad * weight：
 *   dx = s (g - x̂ mean(g x̂))，dweight = Σ_行 grad * x̂。
 * dweight 按固定大小的行块求部分和，再按块序相加：结果与线程数无关。 */
#include <math.h>
#include <string.h>

#include "isa/isa.h"

enum {
  ROWS = 64, /* 每任务行数 */
  PART = 16  /* 每个部分和的行数：一路累加到底，误差随行数增长 */
};

static int64_t blocks(const dso_rms_norm_backward_params *p) { return dso_ceil_div(p->rows, ROWS); }

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_rms_norm_backward_params *p = params;
  (void)isa;
  return (dso_plan){2, (size_t)(dso_max(1, blocks(p)) * p->dim) * 4, (size_t)p->dim * 4 * 4, 0};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_rms_norm_backward_params *p = params;
  return stage == 0 ? blocks(p) : p->dw != NULL;
}

static void backward_row(const dso_ctx *ctx, int64_t row, const float *weight, float *x, float *g,
                         float *sum) {
  const dso_rms_norm_backward_params *p = ctx->params;
  const dso_isa *isa = ctx->isa;
  isa->to_f32(x, dso_at(p->x.data, p->x.dtype, row * p->x.rs), p->x.dtype, p->dim);
  isa->to_f32(g, dso_at(p->grad.data, p->grad.dtype, row * p->grad.rs), p->grad.dtype, p->dim);
  float s = 1.0f / sqrtf(isa->vdot(x, x, p->dim) / (float)p->dim + p->eps);
  isa->vscale(x, s, p->dim); /* x̂ */
  for (int64_t i = 0; i < p->dim; i++) {
    sum[i] += g[i] * x[i];
    g[i] *= weight[i];
  }
  if (!p->dx) return;
  float mean = isa->vdot(g, x, p->dim) / (float)p->dim;
  isa->vaxpy(g, -mean, x, p->dim);
  isa->vscale(g, s, p->dim);
  isa->from_f32(dso_at_mut(p->dx, p->x.dtype, row * p->dim), p->x.dtype, g, p->dim);
}

static void reduce(const dso_ctx *ctx) {
  const dso_rms_norm_backward_params *p = ctx->params;
  float *total = ctx->worker;
  memset(total, 0, (size_t)p->dim * 4);
  for (int64_t b = 0; b < blocks(p); b++)
    ctx->isa->vaxpy(total, 1.0f, (const float *)ctx->shared + b * p->dim, p->dim);
  ctx->isa->from_f32(p->dw, p->weight_dtype, total, p->dim);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_rms_norm_backward_params *p = ctx->params;
  if (ctx->stage == 1) {
    reduce(ctx);
    return;
  }
  float *weight = ctx->worker, *x = weight + p->dim, *g = x + p->dim, *part = g + p->dim;
  float *sum = (float *)ctx->shared + task * p->dim;
  ctx->isa->to_f32(weight, p->weight, p->weight_dtype, p->dim);
  memset(sum, 0, (size_t)p->dim * 4);
  int64_t end = dso_min(p->rows, (task + 1) * ROWS);
  for (int64_t row = task * ROWS; row < end; row++) {
    if (row % PART == 0) memset(part, 0, (size_t)p->dim * 4);
    backward_row(ctx, row, weight, x, g, part);
    if (row % PART == PART - 1 || row == end - 1) ctx->isa->vaxpy(sum, 1.0f, part, p->dim);
  }
}

const dso_op dso_rms_norm_backward = {"rms_norm_backward", plan, tasks, run};
