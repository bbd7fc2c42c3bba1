/* RMS 归一化（可先加残差）：y = cast(x * rsqrt(mean(x²) + eps)) * weight，fp32 内计算。
 * 先舍入到 x 的 dtype 再乘 weight，与 transformers 的 RMSNorm 逐步一致。 */
#include "rms_norm.h"

enum { ROWS = 16 }; /* 每任务行数：摊薄调度 */

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_rms_norm_params *p = params;
  (void)isa;
  return (dso_plan){1, 0, (size_t)p->dim * 4 * 3, 4 * p->rows * p->dim};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_rms_norm_params *p = params;
  return stage == 0 ? dso_ceil_div(p->rows, ROWS) : 0;
}

static void norm_row(const dso_ctx *ctx, int64_t row, const float *weight, float *v, float *other) {
  const dso_rms_norm_params *p = ctx->params;
  dso_dtype dtype = p->x.dtype;
  void *y = dso_at_mut(p->y, dtype, row * p->dim);
  ctx->isa->to_f32(v, dso_at(p->x.data, dtype, row * p->x.rs), dtype, p->dim);
  if (p->residual.data) {
    ctx->isa->to_f32(other, dso_at(p->residual.data, dtype, row * p->residual.rs), dtype, p->dim);
    ctx->isa->vaxpy(v, 1.0f, other, p->dim);
    void *total = dso_at_mut(p->total, dtype, row * p->dim);
    ctx->isa->from_f32(total, dtype, v, p->dim);
    ctx->isa->to_f32(v, total, dtype, p->dim);
  }
  dso_rms_norm_row(ctx->isa, v, weight, p->eps, p->dim, y, dtype);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_rms_norm_params *p = ctx->params;
  float *weight = ctx->worker, *v = weight + p->dim, *other = v + p->dim;
  ctx->isa->to_f32(weight, p->weight, p->weight_dtype, p->dim);
  int64_t end = dso_min(p->rows, (task + 1) * ROWS);
  for (int64_t row = task * ROWS; row < end; row++) norm_row(ctx, row, weight, v, other);
}

const dso_op dso_rms_norm = {"rms_norm", plan, tasks, run};
