/* mla_qkv_a：解码时一次完成 q_a、kv_a 两个投影、两个 RMS 归一化与键的旋转。
 *
 * 阶段 0  x 不是计算格式时转 fp32；
 * 阶段 1  两个权重各按列块做点积，结果 fp32，[M, qr + r + dr]；
 * 阶段 2  逐行：加偏置、归一化、旋转、写出。中间结果不舍入到半精度，因此不比分开计算差。
 */
#include <math.h>

#include "rope.h"
#include "gemm.h"

enum { COLUMNS = 48 }; /* 每任务的权重行数：6 与 8 的公倍数；K = 2048 时约 192 KiB */

static int64_t width_of(const dso_mla_qkv_a_params *p) { return p->q_rank + p->rank + p->rope_dim; }

static dso_dtype format(const dso_isa *isa, const dso_mla_qkv_a_params *p) {
  return dso_compute_format(
      isa, p->x.dtype == DSO_BF16 && p->q_a.dtype == DSO_BF16 && p->kv_a.dtype == DSO_BF16);
}

static float *projected(const dso_ctx *ctx) { return ctx->shared; }

static float *converted(const dso_ctx *ctx) {
  const dso_mla_qkv_a_params *p = ctx->params;
  return projected(ctx) + p->m * width_of(p);
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_mla_qkv_a_params *p = params;
  (void)isa;
  size_t row = (size_t)(dso_max(p->q_rank, p->rank) + 2 * p->rope_dim) * 4;
  return (dso_plan){3, (size_t)(p->m * (width_of(p) + p->k)) * 4, row, p->m * p->k * width_of(p)};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_mla_qkv_a_params *p = params;
  if (stage == 0) return p->x.dtype == DSO_F32 ? 0 : p->m;
  if (stage == 1)
    return dso_ceil_div(p->q_rank, COLUMNS) + dso_ceil_div(p->rank + p->rope_dim, COLUMNS);
  return p->m;
}

static void project(const dso_ctx *ctx, int64_t task) {
  const dso_mla_qkv_a_params *p = ctx->params;
  dso_dtype fmt = format(ctx->isa, p);
  int64_t q_blocks = dso_ceil_div(p->q_rank, COLUMNS), is_kv = task >= q_blocks;
  int64_t n0 = (is_kv ? task - q_blocks : task) * COLUMNS,
          n = is_kv ? p->rank + p->rope_dim : p->q_rank;
  const dso_mat *w = is_kv ? &p->kv_a : &p->q_a;
  int in_place = p->x.dtype == fmt;
  ctx->isa->dot(fmt, p->m, dso_min(COLUMNS, n - n0), p->k, in_place ? p->x.data : converted(ctx),
                in_place ? p->x.rs : p->k, dso_at(w->data, w->dtype, n0 * w->rs), w->dtype, w->rs,
                projected(ctx) + (is_kv ? p->q_rank : 0) + n0, width_of(p));
}

static void add_bias(const dso_isa *isa, float *v, const void *bias, dso_dtype dtype, int64_t n) {
  for (int64_t i = 0; bias && i < n; i++) {
    float b;
    isa->to_f32(&b, dso_at(bias, dtype, i), dtype, 1);
    v[i] += b;
  }
}

/* v [n] 归一化后乘 weight，写成 dtype。 */
static void norm_row(const dso_ctx *ctx, float *v, int64_t n, const void *weight, float eps,
                     void *out, float *w) {
  const dso_mla_qkv_a_params *p = ctx->params;
  ctx->isa->to_f32(w, weight, p->norm_dtype, n);
  ctx->isa->vscale(v, 1.0f / sqrtf(ctx->isa->vdot(v, v, n) / (float)n + eps), n);
  for (int64_t i = 0; i < n; i++) v[i] *= w[i];
  ctx->isa->from_f32(out, p->x.dtype, v, n);
}

static void finish_row(const dso_ctx *ctx, int64_t row) {
  const dso_mla_qkv_a_params *p = ctx->params;
  float *q = projected(ctx) + row * width_of(p), *latent = q + p->q_rank, *rope = latent + p->rank;
  float *buffer = ctx->worker;
  dso_dtype dtype = p->x.dtype;
  add_bias(ctx->isa, q, p->q_bias, p->q_a.dtype, p->q_rank);
  add_bias(ctx->isa, latent, p->kv_bias, p->kv_a.dtype, p->rank + p->rope_dim);
  if (p->q_rank > 0)
    norm_row(ctx, q, p->q_rank, p->q_norm, p->q_eps,
             dso_at_mut(p->q_latent, dtype, row * p->q_rank), buffer);
  norm_row(ctx, latent, p->rank, p->kv_norm, p->kv_eps, dso_at_mut(p->latent, dtype, row * p->rank),
           buffer);
  const float *cos = p->cos + row * p->cs_rs, *sin = p->sin + row * p->cs_rs;
  dso_rotate(rope, buffer, cos, sin, p->rope_dim / 2, p->interleaved, p->keep_pairs, 1.0f);
  ctx->isa->from_f32(dso_at_mut(p->rope, dtype, row * p->rope_dim), dtype, buffer, p->rope_dim);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_mla_qkv_a_params *p = ctx->params;
  if (ctx->stage == 1) {
    project(ctx, task);
  } else if (ctx->stage == 2) {
    finish_row(ctx, task);
  } else if (format(ctx->isa, p) == DSO_F32) {
    ctx->isa->to_f32(converted(ctx) + task * p->k, dso_at(p->x.data, p->x.dtype, task * p->x.rs),
                     p->x.dtype, p->k);
  }
}

const dso_op dso_mla_qkv_a = {"mla_qkv_a", plan, tasks, run};
