/* 旋转位置编码。interleaved：输入成对 (2i, 2i+1)、输出前后两半（keep_pairs：输出也成对）；否则输入输出都是前后两半。
 * inverse 是它的转置（旋转阵正交，故也是逆），用于反向。 */
#include "rope.h"

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_rope_params *p = params;
  (void)isa;
  return (dso_plan){1, 0, (size_t)p->d * 4 * 2, 4 * p->b * p->t * p->h * p->d};
}

enum { TOKENS = 8 }; /* 每任务的词元数（全部头）：摊薄调度 */

static int64_t tasks(const void *params, int64_t stage) {
  const dso_rope_params *p = params;
  return stage == 0 ? dso_ceil_div(p->b * p->t, TOKENS) : 0;
}

static void rotate_token(const dso_ctx *ctx, int64_t token) {
  const dso_rope_params *p = ctx->params;
  int64_t b = token / p->t, t = token % p->t;
  const float *cos = p->cos + b * p->cs_bs + t * p->cs_ts,
              *sin = p->sin + b * p->cs_bs + t * p->cs_ts;
  float *in = ctx->worker, *out = in + p->d, sign = p->inverse ? -1.0f : 1.0f;
  int pairs_in = p->inverse ? p->keep_pairs : p->interleaved,
      pairs_out = p->inverse ? p->interleaved : p->keep_pairs;
  for (int64_t h = 0; h < p->h; h++) {
    ctx->isa->to_f32(in, dso_at(p->x, p->dtype, b * p->x_bs + t * p->x_ts + h * p->x_hs), p->dtype,
                     p->d);
    dso_rotate(in, out, cos, sin, p->d / 2, pairs_in, pairs_out, sign);
    ctx->isa->from_f32(dso_at_mut(p->y, p->dtype, b * p->y_bs + t * p->y_ts + h * p->y_hs),
                       p->dtype, out, p->d);
  }
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_rope_params *p = ctx->params;
  int64_t end = dso_min(p->b * p->t, (task + 1) * TOKENS);
  for (int64_t token = task * TOKENS; token < end; token++) rotate_token(ctx, token);
}

const dso_op dso_rope = {"rope", plan, tasks, run};
