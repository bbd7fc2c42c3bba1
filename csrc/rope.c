/* 旋转位置编码。interleaved：输入成对 (2i, 2i+1)、输出前后两半；否则输入输出都是前后两半。
 * inverse 是它的转置（旋转阵正交，故也是逆），用于反向。 */
#include "isa/isa.h"

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_rope_params *p = params;
  (void)isa;
  return (dso_plan){1, 0, (size_t)p->d * 4 * 2};
}

/* 一个任务一个词元的全部头。 */
static int64_t tasks(const void *params, int64_t stage) {
  const dso_rope_params *p = params;
  return stage == 0 ? p->b * p->t : 0;
}

static void rotate(const float *in, float *out, const float *cos, const float *sin, int64_t half, int interleaved) {
  for (int64_t i = 0; i < half; i++) {
    float a = interleaved ? in[2 * i] : in[i], b = interleaved ? in[2 * i + 1] : in[i + half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + half] = b * cos[i] + a * sin[i];
  }
}

static void rotate_back(const float *in, float *out, const float *cos, const float *sin, int64_t half,
                        int interleaved) {
  for (int64_t i = 0; i < half; i++) {
    float a = in[i] * cos[i] + in[i + half] * sin[i], b = in[i + half] * cos[i] - in[i] * sin[i];
    out[interleaved ? 2 * i : i] = a;
    out[interleaved ? 2 * i + 1 : i + half] = b;
  }
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_rope_params *p = ctx->params;
  int64_t b = task / p->t, t = task % p->t;
  const float *cos = p->cos + b * p->cs_bs + t * p->cs_ts, *sin = p->sin + b * p->cs_bs + t * p->cs_ts;
  float *in = ctx->worker, *out = in + p->d;
  for (int64_t h = 0; h < p->h; h++) {
    ctx->isa->to_f32(in, dso_at(p->x, p->dtype, b * p->x_bs + t * p->x_ts + h * p->x_hs), p->dtype, p->d);
    (p->inverse ? rotate_back : rotate)(in, out, cos, sin, p->d / 2, p->interleaved);
    ctx->isa->from_f32(dso_at_mut(p->y, p->dtype, (task * p->h + h) * p->d), p->dtype, out, p->d);
  }
}

const dso_op dso_rope = {"rope", plan, tasks, run};
