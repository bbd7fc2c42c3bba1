/* 把新词元的潜变量与旋转键写进缓存：行 b 的第 t 个词元写到槽位 offsets[b] + t。
 * int8、fp8 的潜变量逐词元对称量化：scale = amax / 最大的码；旋转部分保持 16 或 32 位。 */
#include <string.h>

#include "isa/isa.h"

enum { TOKENS = 16 }; /* 每任务的词元数：摊薄调度 */

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_mla_cache_write_params *p = params;
  (void)isa;
  return (dso_plan){1, 0, (size_t)dso_max(p->rank, p->rope_dim) * 4,
                    4 * p->b * p->t * (p->rank + p->rope_dim)};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_mla_cache_write_params *p = params;
  return stage == 0 ? dso_ceil_div(p->b * p->t, TOKENS) : 0;
}

static void copy_row(const dso_isa *isa, void *dst, dso_dtype to, const void *src, dso_dtype from,
                     int64_t n, float *row) {
  if (to == from) {
    memcpy(dst, src, (size_t)(n * dso_size_of(to)));
    return;
  }
  isa->to_f32(row, src, from, n);
  isa->from_f32(dst, to, row, n);
}

static void quantize_row(const dso_isa *isa, void *dst, dso_dtype to, float *scale, const void *src,
                         dso_dtype from, int64_t n, float *row) {
  isa->to_f32(row, src, from, n);
  *scale = isa->vamax(row, n) / (to == DSO_I8 ? DSO_I8_MOST : DSO_F8_MOST);
  for (int64_t i = 0; i < n && *scale > 0.0f; i++) row[i] /= *scale;
  isa->from_f32(dst, to, row, n);
}

static void write_token(const dso_ctx *ctx, int64_t token) {
  const dso_mla_cache_write_params *p = ctx->params;
  int64_t b = token / p->t, t = token % p->t, slot = p->offsets[b] + t;
  const void *latent = dso_at(p->latent, p->latent_dtype, b * p->latent_bs + t * p->latent_ts);
  const void *rope = dso_at(p->rope, p->rope_dtype, b * p->rope_bs + t * p->rope_ts);
  void *to = dso_at_mut(p->latent_cache, p->latent_cache_dtype,
                        b * p->latent_cache_bs + slot * p->latent_cache_ts);
  void *rope_to = dso_at_mut(p->rope_cache, p->rope_cache_dtype,
                             b * p->rope_cache_bs + slot * p->rope_cache_ts);
  if (dso_quantized_latent(p->latent_cache_dtype))
    quantize_row(ctx->isa, to, p->latent_cache_dtype, p->scale_cache + b * p->scale_cache_bs + slot,
                 latent, p->latent_dtype, p->rank, ctx->worker);
  else
    copy_row(ctx->isa, to, p->latent_cache_dtype, latent, p->latent_dtype, p->rank, ctx->worker);
  copy_row(ctx->isa, rope_to, p->rope_cache_dtype, rope, p->rope_dtype, p->rope_dim, ctx->worker);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_mla_cache_write_params *p = ctx->params;
  int64_t end = dso_min(p->b * p->t, (task + 1) * TOKENS);
  for (int64_t token = task * TOKENS; token < end; token++) write_token(ctx, token);
}

const dso_op dso_mla_cache_write = {"mla_cache_write", plan, tasks, run};
