/* swiglu_mlp：y = (silu(x gateᵀ) * (x upᵀ)) downᵀ，中间量只有一份 h，按行段处理以限制其大小。
 *
 * 阶段 0：点积路径时把 x 转 fp32（若需要）；此后每个行段两个阶段：算 h、算 y。
 */
#include "gemm.h"

static const dso_act SILU = {DSO_SILU, 0.0f, 0.0f};

enum { SEGMENT = 8 * DSO_MB }; /* 每段行数：h 的大小不随行数增长，权重的打包仍被摊薄 */

static int is_small(const dso_swiglu_mlp_params *p) { return p->m <= DSO_DOT_MAX_M; }
static int64_t segments(const dso_swiglu_mlp_params *p) { return dso_ceil_div(p->m, SEGMENT); }

static dso_dtype format(const dso_isa *isa, const dso_swiglu_mlp_params *p) {
  return dso_compute_format(isa, p->x.dtype == DSO_BF16 && p->gate.dtype == DSO_BF16);
}

/* h [段内行, inner]，计算格式，放在共享暂存开头；其后是转成 fp32 的 x。 */
static size_t h_bytes(const dso_swiglu_mlp_params *p) {
  return (size_t)(dso_min(p->m, SEGMENT) * p->inner) * 4;
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_swiglu_mlp_params *p = params;
  size_t h = h_bytes(p) / 4 * (size_t)dso_size_of(format(isa, p));
  h = (h + 63) / 64 * 64;
  int64_t work = p->m * p->inner * (2 * p->k + p->n);
  if (is_small(p))
    return (dso_plan){3, h_bytes(p) + (size_t)(p->m * p->k) * 4,
                      2 * (size_t)DSO_DOT_MAX_M * DSO_DOT_MAX_N * 4, work};
  return (dso_plan){1 + 2 * segments(p), h, dso_gemm_scratch() + 2 * (size_t)DSO_MB * DSO_NB * 4,
                    work};
}

static int64_t segment_rows(const dso_swiglu_mlp_params *p, int64_t segment) {
  return dso_min(SEGMENT, p->m - segment * SEGMENT);
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_swiglu_mlp_params *p = params;
  if (stage == 0) return is_small(p) && p->x.dtype != DSO_F32 ? p->m : 0;
  int second = (stage - 1) % 2;
  int64_t width = second ? p->n : p->inner;
  if (p->m == 0) return 0;
  if (is_small(p))
    return dso_ceil_div(width, dso_dot_columns(second ? p->inner : p->k, p->gate.dtype));
  return dso_block_count(segment_rows(p, (stage - 1) / 2), width);
}

static void small_hidden(const dso_ctx *ctx, int64_t task) {
  const dso_swiglu_mlp_params *p = ctx->params;
  dso_dtype fmt = format(ctx->isa, p);
  int in_place = p->x.dtype == fmt;
  const void *x = in_place ? p->x.data : (const char *)ctx->shared + h_bytes(p);
  int64_t ldx = in_place ? p->x.rs : p->k;
  int64_t block = dso_dot_columns(p->k, p->gate.dtype), n0 = task * block,
          nc = dso_min(block, p->inner - n0);
  float *g = ctx->worker, *u = g + DSO_DOT_MAX_M * DSO_DOT_MAX_N;
  ctx->isa->dot(fmt, p->m, nc, p->k, x, ldx, dso_at(p->gate.data, p->gate.dtype, n0 * p->gate.rs),
                p->gate.dtype, p->gate.rs, g, nc);
  ctx->isa->dot(fmt, p->m, nc, p->k, x, ldx, dso_at(p->up.data, p->up.dtype, n0 * p->up.rs),
                p->up.dtype, p->up.rs, u, nc);
  ctx->isa->activate(&SILU, g, u, p->m * nc);
  for (int64_t i = 0; i < p->m; i++)
    ctx->isa->from_f32(dso_at_mut(ctx->shared, fmt, i * p->inner + n0), fmt, g + i * nc, nc);
}

static void small_output(const dso_ctx *ctx, int64_t task) {
  const dso_swiglu_mlp_params *p = ctx->params;
  dso_dtype fmt = format(ctx->isa, p);
  int64_t block = dso_dot_columns(p->inner, p->down.dtype), n0 = task * block,
          nc = dso_min(block, p->n - n0);
  float *c = ctx->worker;
  ctx->isa->dot(fmt, p->m, nc, p->inner, ctx->shared, p->inner,
                dso_at(p->down.data, p->down.dtype, n0 * p->down.rs), p->down.dtype, p->down.rs, c,
                nc);
  for (int64_t i = 0; i < p->m; i++)
    ctx->isa->from_f32(dso_at_mut(p->y, p->x.dtype, i * p->n + n0), p->x.dtype, c + i * nc, nc);
}

static void block_hidden(const dso_ctx *ctx, int64_t segment, int64_t task) {
  const dso_swiglu_mlp_params *p = ctx->params;
  dso_dtype fmt = format(ctx->isa, p);
  dso_block b = dso_block_at(segment_rows(p, segment), p->inner, task);
  float *g = ctx->worker, *u = g + DSO_MB * DSO_NB;
  void *scratch = u + DSO_MB * DSO_NB;
  dso_gemm gemm = {
      .isa = ctx->isa, .fmt = fmt, .k = p->k, .a = p->x, .b = p->gate, .b_transposed = 1};
  dso_gemm_block(&gemm, segment * SEGMENT + b.m0, b.mc, b.n0, b.nc, g, DSO_NB, 0, scratch);
  gemm.b = p->up;
  dso_gemm_block(&gemm, segment * SEGMENT + b.m0, b.mc, b.n0, b.nc, u, DSO_NB, 0, scratch);
  for (int64_t i = 0; i < b.mc; i++) {
    ctx->isa->activate(&SILU, g + i * DSO_NB, u + i * DSO_NB, b.nc);
    ctx->isa->from_f32(dso_at_mut(ctx->shared, fmt, (b.m0 + i) * p->inner + b.n0), fmt,
                       g + i * DSO_NB, b.nc);
  }
}

static void block_output(const dso_ctx *ctx, int64_t segment, int64_t task) {
  const dso_swiglu_mlp_params *p = ctx->params;
  dso_dtype fmt = format(ctx->isa, p);
  dso_block b = dso_block_at(segment_rows(p, segment), p->n, task);
  float *c = ctx->worker;
  dso_gemm gemm = {.isa = ctx->isa,
                   .fmt = fmt,
                   .k = p->inner,
                   .a = {ctx->shared, p->inner, fmt},
                   .b = p->down,
                   .b_transposed = 1};
  dso_gemm_block(&gemm, b.m0, b.mc, b.n0, b.nc, c, DSO_NB, 0, c + 2 * DSO_MB * DSO_NB);
  int64_t row0 = segment * SEGMENT + b.m0;
  for (int64_t i = 0; i < b.mc; i++)
    ctx->isa->from_f32(dso_at_mut(p->y, p->x.dtype, (row0 + i) * p->n + b.n0), p->x.dtype,
                       c + i * DSO_NB, b.nc);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_swiglu_mlp_params *p = ctx->params;
  int64_t segment = (ctx->stage - 1) / 2;
  int second = (ctx->stage - 1) % 2;
  if (ctx->stage == 0) {
    if (format(ctx->isa, p) == DSO_F32)
      ctx->isa->to_f32((float *)((char *)ctx->shared + h_bytes(p)) + task * p->k,
                       dso_at(p->x.data, p->x.dtype, task * p->x.rs), p->x.dtype, p->k);
  } else if (is_small(p)) {
    (second ? small_output : small_hidden)(ctx, task);
  } else {
    (second ? block_output : block_hidden)(ctx, segment, task);
  }
}

const dso_op dso_swiglu_mlp = {"swiglu_mlp", plan, tasks, run};
