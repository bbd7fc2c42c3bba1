/* swiglu_mlp 的反向：g、u 重算，不依赖前向保存的任何中间量。
 *
 * 阶段 0：逐块重算 g、u，求 dh = grad·down，得到 dg、du、h（计算格式，共享暂存）；
 * 阶段 1：dx = dg·gate + du·up，dgate = dgᵀ x，dup = duᵀ x，ddown = gradᵀ h。
 */
#include "gemm.h"

static const dso_act SILU = {DSO_SILU, 0.0f, 0.0f};

typedef struct {
  void *dg, *du, *h; /* 各 [M, inner] */
} hidden;

static dso_dtype format(const dso_isa *isa, const dso_swiglu_mlp_backward_params *p) {
  return dso_compute_format(
      isa, p->x.dtype == DSO_BF16 && p->gate.dtype == DSO_BF16 && p->grad.dtype == DSO_BF16);
}

static size_t hidden_bytes(const dso_swiglu_mlp_backward_params *p, dso_dtype fmt) {
  return ((size_t)(p->m * p->inner * dso_size_of(fmt)) + 63) / 64 * 64;
}

static hidden hidden_of(const dso_ctx *ctx, dso_dtype fmt) {
  size_t bytes = hidden_bytes(ctx->params, fmt);
  char *base = ctx->shared;
  return (hidden){base, base + bytes, base + 2 * bytes};
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_swiglu_mlp_backward_params *p = params;
  return (dso_plan){2, 3 * hidden_bytes(p, format(isa, p)),
                    dso_gemm_scratch() + 3 * (size_t)DSO_MB * DSO_NB * 4, 0};
}

typedef struct {
  int64_t dx, gate, up, down;
} parts;

static parts count(const dso_swiglu_mlp_backward_params *p) {
  return (parts){dso_block_count(p->m, p->k), dso_block_count(p->inner, p->k),
                 dso_block_count(p->inner, p->k), dso_block_count(p->n, p->inner)};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_swiglu_mlp_backward_params *p = params;
  if (stage == 0) return dso_block_count(p->m, p->inner);
  parts n = count(p);
  return n.dx + n.gate + n.up + n.down;
}

static void recompute(const dso_ctx *ctx, int64_t task) {
  const dso_swiglu_mlp_backward_params *p = ctx->params;
  dso_dtype fmt = format(ctx->isa, p);
  hidden out = hidden_of(ctx, fmt);
  dso_block b = dso_block_at(p->m, p->inner, task);
  float *g = ctx->worker, *u = g + DSO_MB * DSO_NB, *dh = u + DSO_MB * DSO_NB;
  void *scratch = dh + DSO_MB * DSO_NB;
  dso_gemm gemm = {
      .isa = ctx->isa, .fmt = fmt, .k = p->k, .a = p->x, .b = p->gate, .b_transposed = 1};
  dso_gemm_block(&gemm, b.m0, b.mc, b.n0, b.nc, g, DSO_NB, 0, scratch);
  gemm.b = p->up;
  dso_gemm_block(&gemm, b.m0, b.mc, b.n0, b.nc, u, DSO_NB, 0, scratch);
  dso_gemm back = {.isa = ctx->isa, .fmt = fmt, .k = p->n, .a = p->grad, .b = p->down};
  dso_gemm_block(&back, b.m0, b.mc, b.n0, b.nc, dh, DSO_NB, 0, scratch);
  for (int64_t i = 0; i < b.mc; i++) {
    int64_t at = (b.m0 + i) * p->inner + b.n0, row = i * DSO_NB;
    ctx->isa->activate_backward(&SILU, g + row, u + row, dh + row, b.nc);
    ctx->isa->from_f32(dso_at_mut(out.dg, fmt, at), fmt, g + row, b.nc);
    ctx->isa->from_f32(dso_at_mut(out.du, fmt, at), fmt, u + row, b.nc);
    ctx->isa->from_f32(dso_at_mut(out.h, fmt, at), fmt, dh + row, b.nc);
  }
}

/* out 的一块 [m, n] = first (+ second)；两个乘积形状相同。 */
static void product(const dso_ctx *ctx, const dso_gemm *first, const dso_gemm *second, int64_t m,
                    int64_t n, int64_t task, void *out, dso_dtype dtype) {
  dso_block b = dso_block_at(m, n, task);
  float *c = ctx->worker;
  void *scratch = c + 3 * DSO_MB * DSO_NB;
  dso_gemm_block(first, b.m0, b.mc, b.n0, b.nc, c, DSO_NB, 0, scratch);
  if (second) dso_gemm_block(second, b.m0, b.mc, b.n0, b.nc, c, DSO_NB, 1, scratch);
  for (int64_t i = 0; i < b.mc; i++)
    ctx->isa->from_f32(dso_at_mut(out, dtype, (b.m0 + i) * n + b.n0), dtype, c + i * DSO_NB, b.nc);
}

static void gradients(const dso_ctx *ctx, int64_t task) {
  const dso_swiglu_mlp_backward_params *p = ctx->params;
  dso_dtype fmt = format(ctx->isa, p);
  hidden h = hidden_of(ctx, fmt);
  parts n = count(p);
  dso_gemm base = {.isa = ctx->isa, .fmt = fmt};
  dso_mat dg = {h.dg, p->inner, fmt}, du = {h.du, p->inner, fmt}, hh = {h.h, p->inner, fmt};
  if (task < n.dx) {
    dso_gemm a = base, c = base;
    a.k = c.k = p->inner, a.a = dg, a.b = p->gate, c.a = du, c.b = p->up;
    product(ctx, &a, &c, p->m, p->k, task, p->dx, p->x.dtype);
    return;
  }
  task -= n.dx;
  base.k = p->m, base.a_transposed = 1;
  if (task < n.gate + n.up) {
    int is_up = task >= n.gate;
    base.a = is_up ? du : dg, base.b = p->x;
    product(ctx, &base, NULL, p->inner, p->k, is_up ? task - n.gate : task,
            is_up ? p->dup : p->dgate, p->gate.dtype);
    return;
  }
  base.a = p->grad, base.b = hh;
  product(ctx, &base, NULL, p->n, p->inner, task - n.gate - n.up, p->ddown, p->down.dtype);
}

static void run(const dso_ctx *ctx, int64_t task) {
  (ctx->stage == 0 ? recompute : gradients)(ctx, task);
}

const dso_op dso_swiglu_mlp_backward = {"swiglu_mlp_backward", plan, tasks, run};
