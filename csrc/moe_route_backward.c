/* moe_route 的反向：由混合权重（与 logits）的梯度求对 logits 的梯度，逐词元，一个阶段。
 *
 * 得分由 logits 重算。记所选得分 s_j，D = Σ s_j + eps，g_j = scaling · d_weights_j：
 *   normalize 时 ds_j = (g_j - Σ_i g_i s_i / D) / D，否则 ds_j = g_j；
 *   sigmoid       dz = ds · s (1 - s)；
 *   sqrtsoftplus  dz = ds · sigmoid(z) / (2 s)，其中 sigmoid(z) = 1 - exp(-s²)；
 *   softmax       dz_e = s_e (ds_e - Σ_j ds_j s_j)，没有选中的 ds_e 为 0；
 *   softmax_after 同上，只在所选的里面。
 */
#include <math.h>
#include <string.h>

#include "arena.h"
#include "moe_route.h"

typedef struct {
  float *all;              /* [experts]：整行 softmax */
  float *z, *score, *grad; /* [top_k]：所选的 logits、得分、得分的梯度 */
} row_view;

static size_t row_scratch(const dso_moe_route_backward_params *p, void *base, row_view *view) {
  dso_arena arena = {base, 0};
  size_t picked = (size_t)p->rule.top_k * 4;
  view->all = dso_take(&arena, (size_t)p->experts * 4);
  view->z = dso_take(&arena, picked);
  view->score = dso_take(&arena, picked);
  view->grad = dso_take(&arena, picked);
  return arena.used;
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  row_view view;
  (void)isa;
  return (dso_plan){1, 0, row_scratch(params, NULL, &view), 0};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_moe_route_backward_params *p = params;
  return stage == 0 ? dso_ceil_div(p->tokens, DSO_ROUTE_TOKENS) : 0;
}

static int over_all(const dso_route_rule *r) {
  return r->score == DSO_SCORE_SOFTMAX && !r->softmax_after;
}

/* 所选的得分，与前向相同地重算。 */
static void scores(const dso_isa *isa, const dso_moe_route_backward_params *p, const float *z,
                   const int64_t *index, const row_view *v) {
  const dso_route_rule *r = &p->rule;
  if (over_all(r)) dso_route_scores(isa, r->score, z, p->experts, v->all);
  for (int64_t j = 0; j < r->top_k; j++)
    v->z[j] = z[index[j]], v->score[j] = over_all(r) ? v->all[index[j]] : 0.0f;
  if (!over_all(r)) dso_route_scores(isa, r->score, v->z, r->top_k, v->score);
}

/* 混合权重的梯度换成得分的梯度。 */
static void score_grads(const dso_isa *isa, const dso_route_rule *r, const float *d_weights,
                        const row_view *v) {
  float sum = r->eps;
  for (int64_t j = 0; j < r->top_k; j++) v->grad[j] = r->scaling * d_weights[j];
  if (!r->normalize) return;
  for (int64_t j = 0; j < r->top_k; j++) sum += v->score[j];
  float common = isa->vdot(v->grad, v->score, r->top_k) / sum;
  for (int64_t j = 0; j < r->top_k; j++) v->grad[j] = (v->grad[j] - common) / sum;
}

static float slope(dso_score score, float s) {
  if (score == DSO_SCORE_SIGMOID) return s * (1.0f - s);
  return s == 0.0f ? 0.0f : -expm1f(-s * s) / (2.0f * s); /* 极小的 logits 下溢为 0 */
}

static void token_grad(const dso_ctx *ctx, const dso_moe_route_backward_params *p, int64_t t,
                       const row_view *v) {
  const dso_route_rule *r = &p->rule;
  const int64_t *index = p->indices + t * r->top_k;
  float *out = p->out + t * p->experts;
  if (p->d_logits)
    memcpy(out, p->d_logits + t * p->experts, (size_t)p->experts * 4);
  else
    memset(out, 0, (size_t)p->experts * 4);
  if (!p->d_weights) return;
  scores(ctx->isa, p, p->logits + t * p->experts, index, v);
  score_grads(ctx->isa, r, p->d_weights + t * r->top_k, v);
  if (r->score != DSO_SCORE_SOFTMAX) {
    for (int64_t j = 0; j < r->top_k; j++)
      out[index[j]] += v->grad[j] * slope(r->score, v->score[j]);
    return;
  }
  float common = ctx->isa->vdot(v->grad, v->score, r->top_k);
  if (over_all(r)) ctx->isa->vaxpy(out, -common, v->all, p->experts);
  for (int64_t j = 0; j < r->top_k; j++)
    out[index[j]] += v->score[j] * (over_all(r) ? v->grad[j] : v->grad[j] - common);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_moe_route_backward_params *p = ctx->params;
  row_view view;
  row_scratch(p, ctx->worker, &view);
  int64_t first = task * DSO_ROUTE_TOKENS, last = dso_min(p->tokens, first + DSO_ROUTE_TOKENS);
  for (int64_t t = first; t < last; t++) token_grad(ctx, p, t, &view);
}

const dso_op dso_moe_route_backward = {"moe_route_backward", plan, tasks, run};
