/* mtp_input：h' = W [norm(embedding); norm(hidden)]，DeepSeek-V3 的 MTP 模块的入口。
 *
 * 阶段 0     每任务 ROWS 行：两个归一化写进相接的一行（暂存，dtype 与输入相同，舍入与分开计算时一样）；
 * 阶段 1、2  就是 linear 的阶段 0、1。
 */
#include "arena.h"
#include "rms_norm.h"

enum { ROWS = 16 }; /* 每任务行数：摊薄取权重 */

/* 以暂存里相接的行为输入的 linear。 */
static dso_linear_params product(const dso_mtp_input_params *p, const void *rows) {
  dso_dtype dtype = p->embedding.dtype;
  return (dso_linear_params){p->m,      p->n, 2 * p->k, {rows, 2 * p->k, dtype},
                             p->weight, NULL, p->y,     dtype};
}

static size_t row_bytes(const dso_mtp_input_params *p) {
  dso_arena arena = {NULL, 0};
  dso_take(&arena, (size_t)(p->m * 2 * p->k * dso_size_of(p->embedding.dtype)));
  return arena.used;
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_mtp_input_params *p = params;
  dso_linear_params inner = product(p, NULL);
  dso_plan plan = dso_linear.plan(&inner, isa);
  size_t norm = (size_t)p->k * 4 * 2;
  plan.stages++;
  plan.shared_bytes += row_bytes(p);
  plan.worker_bytes = plan.worker_bytes > norm ? plan.worker_bytes : norm;
  plan.work += 8 * p->m * p->k;
  return plan;
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_mtp_input_params *p = params;
  dso_linear_params inner = product(p, NULL);
  return stage == 0 ? 2 * dso_ceil_div(p->m, ROWS) : dso_linear.tasks(&inner, stage - 1);
}

/* 一半的 ROWS 行。 */
static void norm_rows(const dso_ctx *ctx, int64_t task) {
  const dso_mtp_input_params *p = ctx->params;
  int64_t half = task % 2, first = task / 2 * ROWS, last = dso_min(p->m, first + ROWS);
  const dso_mat *x = half ? &p->hidden : &p->embedding;
  float *weight = ctx->worker, *v = weight + p->k;
  if (half)
    ctx->isa->to_f32(weight, p->hidden_norm, p->hidden_norm_dtype, p->k);
  else
    ctx->isa->to_f32(weight, p->embedding_norm, p->embedding_norm_dtype, p->k);
  for (int64_t i = first; i < last; i++) {
    ctx->isa->to_f32(v, dso_at(x->data, x->dtype, i * x->rs), x->dtype, p->k);
    dso_rms_norm_row(ctx->isa, v, weight, p->eps, p->k,
                     dso_at_mut(ctx->shared, x->dtype, (2 * i + half) * p->k), x->dtype);
  }
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_mtp_input_params *p = ctx->params;
  if (ctx->stage == 0) {
    norm_rows(ctx, task);
    return;
  }
  dso_linear_params inner = product(p, ctx->shared);
  dso_ctx next = {&inner, ctx->isa, ctx->stage - 1, (char *)ctx->shared + row_bytes(p),
                  ctx->worker};
  dso_linear.run(&next, task);
}

const dso_op dso_mtp_input = {"mtp_input", plan, tasks, run};
