/* moe_experts 的反向：只用前向的输入，与前向留下的 g、u（没有留下时重算）。
 *
 * 记 dY 为输出的梯度，w 为混合权重，A = dY · down（不乘 w）。则 dw = ⟨A, h⟩（down 有偏置时再加
 * ⟨dY, 偏置⟩），dh = w A：不需要前向的 [行, N] 输出。做法见 SonicMoE（arXiv 2512.14080）。
 *
 * 阶段 0  收集 x、dY 的行；
 * 阶段 1  每任务一个（专家，行块，inner 的一段）：取得 g、u，求 A，得 dg、du、w h 与 dw 的部分和；
 * 阶段 2  dx（逐段累加，同前向的输出阶段）、各权重与偏置的梯度、dw 的合计，各自成任务。
 */
#include <string.h>

#include "arena.h"
#include "moe_experts.h"

typedef struct {
  void *x, *dy;   /* [行, K]、[行, N] */
  void *dgu, *wh; /* [Σ 2 行 * inner]、[Σ 行 * inner] */
  float *partial; /* [行, inner_blocks] */
} shared_view;

static shared_view view(const dso_moe_inputs *in, dso_dtype fmt, dso_arena *arena) {
  int64_t rows = dso_moe_total(in), inner = in->hidden_at[in->experts];
  shared_view s;
  s.x = dso_take(arena, dso_moe_bytes(rows * in->k, fmt));
  s.dy = dso_take(arena, dso_moe_bytes(rows * in->n, fmt));
  s.dgu = dso_take(arena, dso_moe_bytes(2 * inner, fmt));
  s.wh = dso_take(arena, dso_moe_bytes(inner, fmt));
  s.partial = dso_take(arena, dso_moe_bytes(rows * in->inner_blocks, DSO_F32));
  return s;
}

static shared_view shared_of(const dso_ctx *ctx, dso_dtype fmt) {
  dso_arena arena = {ctx->shared, 0};
  return view(&((const dso_moe_backward_params *)ctx->params)->in, fmt, &arena);
}

static const dso_moe_inputs *inputs(const dso_ctx *ctx) {
  return &((const dso_moe_backward_params *)ctx->params)->in;
}

static dso_dtype format(const dso_isa *isa, const dso_moe_backward_params *p) {
  return p->dy.dtype == DSO_BF16 ? dso_moe_format(isa, &p->in) : DSO_F32;
}

/* dx 每任务的列数：越宽读权重越连续，但要让每个线程都有两个任务。各元素的累加次序与它无关。 */
static int64_t dx_columns(const dso_moe_backward_params *p) {
  int64_t share = dso_ceil_div(p->in.k, 2 * dso_max(1, p->threads));
  return dso_max(DSO_NB, dso_min(DSO_MOE_WIDE, dso_round_up(share, DSO_PANEL)));
}

static int64_t sum_floats(const dso_moe_backward_params *p) {
  return dso_min(p->in.tokens, DSO_MOE_SEGMENT) * dx_columns(p);
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_moe_backward_params *p = params;
  dso_arena shared = {0};
  view(&p->in, format(isa, p), &shared);
  int64_t sum = sum_floats(p);
  size_t blocks = (size_t)(2 * DSO_MOE_BLOCK + dso_max(DSO_MOE_BLOCK, sum)) * 4;
  return (dso_plan){3, shared.used, blocks + dso_moe_scratch_bytes(&p->in, 1), 0};
}

/* 工人暂存：三块 fp32 结果，其后是打包用的。最后一块够放累加器。 */
typedef struct {
  float *a, *b, *c;
  dso_moe_scratch scratch;
} worker_view;

static worker_view worker_of(const dso_ctx *ctx) {
  const dso_moe_inputs *in = inputs(ctx);
  int64_t sum = sum_floats(ctx->params);
  float *a = ctx->worker, *b = a + DSO_MOE_BLOCK, *c = b + DSO_MOE_BLOCK;
  return (worker_view){a, b, c, dso_moe_scratch_at(in, c + dso_max(DSO_MOE_BLOCK, sum))};
}

/* ---- 阶段 1 ---- */

/* 专家 e 的 dg、du：成对时交错在一个 [行, 2 inner] 里，否则一前一后各 [行, inner]。 */
typedef struct {
  void *g, *u;
  int64_t rs;
} hidden_grad;

static hidden_grad hidden_grad_of(const dso_moe_inputs *in, dso_dtype fmt, void *dgu, int64_t e) {
  int64_t at = 2 * in->hidden_at[e], inner = in->expert[e].inner;
  if (in->paired) return (hidden_grad){dso_at_mut(dgu, fmt, at), NULL, 2 * inner};
  return (hidden_grad){dso_at_mut(dgu, fmt, at),
                       dso_at_mut(dgu, fmt, at + dso_moe_rows(in, e) * inner), inner};
}

static void store_hidden_grad(const dso_ctx *ctx, dso_dtype fmt, const hidden_grad *to, int64_t row,
                              int64_t n0, int64_t nc, const float *dg, const float *du) {
  if (to->u) {
    ctx->isa->from_f32(dso_at_mut(to->g, fmt, row * to->rs + n0), fmt, dg, nc);
    if (du) ctx->isa->from_f32(dso_at_mut(to->u, fmt, row * to->rs + n0), fmt, du, nc);
    return;
  }
  float both[DSO_NB];
  for (int64_t j = 0; j < nc; j++) both[2 * j] = dg[j], both[2 * j + 1] = du[j];
  ctx->isa->from_f32(dso_at_mut(to->g, fmt, row * to->rs + 2 * n0), fmt, both, 2 * nc);
}

/* 前向留下的 g、u 的一块，[m, nc]，行距 ld。 */
static void load_saved(const dso_isa *isa, const dso_moe_backward_params *p, const dso_moe_block *b,
                       float *g, float *u, int64_t ld) {
  const dso_moe_inputs *in = &p->in;
  dso_dtype dtype = in->x.dtype;
  for (int64_t i = 0; i < b->m; i++) {
    int64_t up, at = dso_moe_saved_at(in, &p->saved, b->expert, b->row + i, &up) + b->n0;
    isa->to_f32(g + i * ld, dso_at(p->saved.data, dtype, at), dtype, b->nc);
    if (in->gated) isa->to_f32(u + i * ld, dso_at(p->saved.data, dtype, at + up), dtype, b->nc);
  }
}

static void hidden_grads(const dso_ctx *ctx, int64_t task) {
  const dso_moe_backward_params *p = ctx->params;
  const dso_moe_inputs *in = &p->in;
  const dso_isa *isa = ctx->isa;
  dso_dtype fmt = format(isa, p);
  shared_view s = shared_of(ctx, fmt);
  dso_moe_block b = dso_moe_hidden_block(in, task);
  const dso_expert *e = &in->expert[b.expert];
  worker_view w = worker_of(ctx);
  int64_t first = in->begin[b.expert] + b.row;
  int64_t width = dso_moe_hidden_columns(in, b.expert), ld = dso_max(DSO_NB, width);
  if (p->saved.data)
    load_saved(isa, p, &b, w.a, w.b, ld);
  else
    dso_moe_gate_up(isa, in, fmt, e, b.m, b.n0, b.nc, dso_at(s.x, fmt, first * in->k), w.a, w.b, ld,
                    &w.scratch);
  dso_gemm back = {.isa = isa,
                   .fmt = fmt,
                   .k = in->n,
                   .a = {dso_at(s.dy, fmt, first * in->n), in->n, fmt},
                   .b = e->down,
                   .b_transposed = in->transposed};
  dso_gemm_block(&back, 0, b.m, b.n0, b.nc, w.c, ld, 0, w.scratch.scratch);
  hidden_grad to = hidden_grad_of(in, fmt, s.dgu, b.expert);
  int64_t base = in->hidden_at[b.expert] + b.row * e->inner + b.n0;
  int64_t block = b.n0 / width;
  for (int64_t i = 0; i < b.m; i++) {
    float *g = w.a + i * ld, *u = w.b + i * ld, *dh = w.c + i * ld, raw[DSO_MOE_WIDE];
    float weight = in->weight[first + i];
    memcpy(raw, dh, (size_t)b.nc * 4);
    isa->vscale(dh, weight, b.nc);
    isa->activate_backward(&in->act, g, in->gated ? u : NULL, dh, b.nc);
    s.partial[(first + i) * in->inner_blocks + block] = isa->vdot(raw, dh, b.nc);
    store_hidden_grad(ctx, fmt, &to, b.row + i, b.n0, b.nc, g, in->gated ? u : NULL);
    isa->vscale(dh, weight, b.nc);
    isa->from_f32(dso_at_mut(s.wh, fmt, base + i * e->inner), fmt, dh, b.nc);
  }
}

/* ---- 阶段 2 ---- */

static int64_t dx_tasks(const dso_moe_backward_params *p) {
  if (!p->dx) return 0;
  return dso_ceil_div(p->in.tokens, DSO_MOE_SEGMENT) * dso_ceil_div(p->in.k, dx_columns(p));
}

static void input_grad(const dso_ctx *ctx, int64_t task) {
  const dso_moe_backward_params *p = ctx->params;
  const dso_moe_inputs *in = &p->in;
  dso_dtype fmt = format(ctx->isa, p);
  shared_view s = shared_of(ctx, fmt);
  worker_view w = worker_of(ctx);
  float *c = w.a, *sum = w.c;
  int64_t segments = dso_ceil_div(in->tokens, DSO_MOE_SEGMENT);
  int64_t t0 = task % segments * DSO_MOE_SEGMENT, t1 = dso_min(in->tokens, t0 + DSO_MOE_SEGMENT);
  int64_t width = dx_columns(p), most = DSO_MOE_BLOCK / width;
  int64_t n0 = task / segments * width, nc = dso_min(width, in->k - n0);
  memset(sum, 0, (size_t)((t1 - t0) * nc) * 4);
  for (int64_t i = 0; i < in->experts; i++) {
    const dso_expert *e = &in->expert[i];
    hidden_grad h = hidden_grad_of(in, fmt, s.dgu, i);
    int64_t first, last = dso_moe_rows_in(in, i, t0, t1, &first);
    for (; first < last; first += most) {
      int64_t m = dso_min(most, last - first), row = first - in->begin[i];
      dso_gemm g = {.isa = ctx->isa,
                    .fmt = fmt,
                    .k = in->paired ? 2 * e->inner : e->inner,
                    .a = {dso_at(h.g, fmt, row * h.rs), h.rs, fmt},
                    .b = e->gate,
                    .b_transposed = in->transposed};
      dso_gemm_block(&g, 0, m, n0, nc, c, width, 0, w.scratch.scratch);
      if (in->gated && !in->paired) {
        g.a.data = dso_at(h.u, fmt, row * h.rs), g.b = e->up;
        dso_gemm_block(&g, 0, m, n0, nc, c, width, 1, w.scratch.scratch);
      }
      for (int64_t j = 0; j < m; j++)
        ctx->isa->vaxpy(sum + (in->token[first + j] - t0) * nc, 1.0f, c + j * width, nc);
    }
  }
  for (int64_t t = t0; t < t1; t++)
    ctx->isa->from_f32(dso_at_mut(p->dx, in->x.dtype, t * in->k + n0), in->x.dtype,
                       sum + (t - t0) * nc, nc);
}

/* 一个权重的梯度 = leftᵀ · right，[m, n]，k 为行数。 */
typedef struct {
  dso_mat left, right;
  int64_t m, n, k;
  void *out;
  int64_t out_rs;
  dso_dtype dtype;
  int add;
} weight_grad;

static weight_grad swap(weight_grad g) {
  dso_mat left = g.left;
  int64_t m = g.m;
  g.left = g.right, g.right = left, g.m = g.n, g.n = m;
  return g;
}

enum { GATE, UP, DOWN, WEIGHTS };

/* 梯度按 [GRAD_ROWS, DSO_MOE_WIDE] 的块写出：每行连续一段，新分配的页少跳。 */
enum { GRAD_ROWS = DSO_MOE_BLOCK / DSO_MOE_WIDE };

static int64_t grad_blocks(int64_t m, int64_t n) {
  return dso_ceil_div(m, GRAD_ROWS) * dso_ceil_div(n, DSO_MOE_WIDE);
}

static weight_grad weight_grad_of(const dso_ctx *ctx, int64_t i, int which) {
  const dso_moe_backward_params *p = ctx->params;
  const dso_moe_inputs *in = &p->in;
  const dso_expert *e = &in->expert[i];
  const dso_expert_grad *to = &p->grad[i];
  dso_dtype fmt = format(ctx->isa, p);
  shared_view s = shared_of(ctx, fmt);
  hidden_grad h = hidden_grad_of(in, fmt, s.dgu, i);
  int64_t first = in->begin[i];
  weight_grad g = {.k = dso_moe_rows(in, i), .dtype = e->gate.dtype, .add = to->add};
  if (which == DOWN) {
    g.left = (dso_mat){dso_at(s.dy, fmt, first * in->n), in->n, fmt}, g.m = in->n;
    g.right = (dso_mat){dso_at(s.wh, fmt, in->hidden_at[i]), e->inner, fmt};
    g.n = e->inner, g.out = to->down, g.out_rs = to->down_rs, g.dtype = e->down.dtype;
  } else {
    g.left = (dso_mat){which == UP ? h.u : h.g, h.rs, fmt};
    g.m = in->paired ? 2 * e->inner : e->inner;
    g.right = (dso_mat){dso_at(s.x, fmt, first * in->k), in->k, fmt}, g.n = in->k;
    g.out = which == UP ? to->up : to->gate, g.out_rs = which == UP ? to->up_rs : to->gate_rs;
  }
  return in->transposed ? swap(g) : g;
}

static int64_t weight_tasks(const dso_moe_backward_params *p, int64_t i, int which) {
  const dso_moe_inputs *in = &p->in;
  const dso_expert *e = &in->expert[i];
  const dso_expert_grad *to = &p->grad[i];
  if (!(which == DOWN ? to->down : which == UP ? to->up : to->gate)) return 0;
  if (to->add && dso_moe_rows(in, i) == 0) return 0; /* 没有词元的专家：原有的值不变 */
  int64_t inner = in->paired && which != DOWN ? 2 * e->inner : e->inner;
  int64_t other = which == DOWN ? in->n : in->k, rows_first = which != DOWN;
  return rows_first != in->transposed ? grad_blocks(inner, other) : grad_blocks(other, inner);
}

static void one_weight_grad(const dso_ctx *ctx, const weight_grad *g, int64_t task) {
  worker_view w = worker_of(ctx);
  int64_t across = dso_ceil_div(g->n, DSO_MOE_WIDE);
  int64_t m0 = task / across * GRAD_ROWS, mc = dso_min(GRAD_ROWS, g->m - m0);
  int64_t n0 = task % across * DSO_MOE_WIDE, nc = dso_min(DSO_MOE_WIDE, g->n - n0);
  dso_gemm gemm = {.isa = ctx->isa,
                   .fmt = g->left.dtype,
                   .k = g->k,
                   .a = g->left,
                   .b = g->right,
                   .a_transposed = 1};
  dso_gemm_out out = {g->out, g->out_rs, g->dtype, g->add, !g->add};
  dso_gemm_store(&gemm, m0, mc, n0, nc, &out, w.a, DSO_MOE_WIDE, w.scratch.scratch);
}

/* 按列求和：out[j * step] = Σ_i scale_i · rows[i, j]。 */
static void column_sums(const dso_ctx *ctx, dso_mat rows, int64_t m, int64_t n, const float *scale,
                        void *out, dso_dtype dtype, int64_t step) {
  worker_view w = worker_of(ctx);
  for (int64_t n0 = 0; n0 < n; n0 += DSO_NB) {
    int64_t nc = dso_min(DSO_NB, n - n0);
    float *sum = w.a, *row = w.b;
    memset(sum, 0, (size_t)nc * 4);
    for (int64_t i = 0; i < m; i++) {
      ctx->isa->to_f32(row, dso_at(rows.data, rows.dtype, i * rows.rs + n0), rows.dtype, nc);
      ctx->isa->vaxpy(sum, scale ? scale[i] : 1.0f, row, nc);
    }
    for (int64_t j = 0; j < nc; j++)
      ctx->isa->from_f32(dso_at_mut(out, dtype, (n0 + j) * step), dtype, sum + j, 1);
  }
}

static void bias_grads(const dso_ctx *ctx, int64_t i) {
  const dso_moe_backward_params *p = ctx->params;
  const dso_moe_inputs *in = &p->in;
  const dso_expert *e = &in->expert[i];
  const dso_expert_grad *to = &p->grad[i];
  dso_dtype fmt = format(ctx->isa, p);
  shared_view s = shared_of(ctx, fmt);
  hidden_grad h = hidden_grad_of(in, fmt, s.dgu, i);
  int64_t m = dso_moe_rows(in, i), first = in->begin[i];
  int64_t width = in->paired ? 2 * e->inner : e->inner;
  if (to->gate_bias)
    column_sums(ctx, (dso_mat){h.g, h.rs, fmt}, m, width, NULL, to->gate_bias, e->bias_dtype,
                e->bias_step);
  if (to->up_bias)
    column_sums(ctx, (dso_mat){h.u, h.rs, fmt}, m, width, NULL, to->up_bias, e->bias_dtype,
                e->bias_step);
  if (to->down_bias)
    column_sums(ctx, (dso_mat){dso_at(s.dy, fmt, first * in->n), in->n, fmt}, m, in->n,
                in->weight + first, to->down_bias, e->bias_dtype, 1);
}

/* dw：各段之和；down 有偏置时再加 ⟨dY, 偏置⟩。一个专家一个任务。 */
static void weight_sums(const dso_ctx *ctx, int64_t i) {
  const dso_moe_backward_params *p = ctx->params;
  const dso_moe_inputs *in = &p->in;
  const dso_expert *e = &in->expert[i];
  dso_dtype fmt = format(ctx->isa, p);
  shared_view s = shared_of(ctx, fmt);
  int64_t stride = in->inner_blocks, blocks = dso_ceil_div(e->inner, dso_moe_hidden_columns(in, i));
  for (int64_t r = in->begin[i]; r < in->begin[i + 1]; r++) {
    float sum = 0.0f, bias[DSO_NB], dy[DSO_NB];
    for (int64_t j = 0; j < blocks; j++) sum += s.partial[r * stride + j];
    for (int64_t n0 = 0; e->down_bias && n0 < in->n; n0 += DSO_NB) {
      int64_t nc = dso_min(DSO_NB, in->n - n0);
      ctx->isa->to_f32(bias, dso_at(e->down_bias, e->bias_dtype, n0), e->bias_dtype, nc);
      ctx->isa->to_f32(dy, dso_at(s.dy, fmt, r * in->n + n0), fmt, nc);
      sum += ctx->isa->vdot(bias, dy, nc);
    }
    p->dweight[r] = sum;
  }
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_moe_backward_params *p = params;
  const dso_moe_inputs *in = &p->in;
  if (stage == 0) return 2 * dso_moe_gather_tasks(in);
  if (stage == 1) return dso_moe_hidden_tasks(in);
  return dx_tasks(p) + p->task_at[WEIGHTS * in->experts] + 2 * in->experts;
}

void dso_moe_backward_prepare(dso_moe_backward_params *p, int64_t *task_at) {
  p->task_at = task_at;
  task_at[0] = 0;
  for (int64_t i = 0; i < WEIGHTS * p->in.experts; i++)
    task_at[i + 1] = task_at[i] + weight_tasks(p, i / WEIGHTS, (int)(i % WEIGHTS));
}

static void gradients(const dso_ctx *ctx, int64_t task) {
  const dso_moe_backward_params *p = ctx->params;
  int64_t experts = p->in.experts, dx = dx_tasks(p), all = p->task_at[WEIGHTS * experts];
  if (task < dx) {
    input_grad(ctx, task);
    return;
  }
  task -= dx;
  if (task < all) {
    int64_t i = dso_moe_find(p->task_at, WEIGHTS * experts, task);
    weight_grad g = weight_grad_of(ctx, i / WEIGHTS, (int)(i % WEIGHTS));
    one_weight_grad(ctx, &g, task - p->task_at[i]);
    return;
  }
  task -= all;
  if (task < experts) {
    bias_grads(ctx, task);
  } else if (p->dweight) {
    weight_sums(ctx, task - experts);
  }
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_moe_backward_params *p = ctx->params;
  if (ctx->stage == 0) {
    dso_dtype fmt = format(ctx->isa, p);
    shared_view s = shared_of(ctx, fmt);
    int64_t half = dso_moe_gather_tasks(&p->in);
    if (task < half)
      dso_moe_gather(ctx->isa, &p->in, fmt, p->in.x, p->in.k, task, s.x);
    else
      dso_moe_gather(ctx->isa, &p->in, fmt, p->dy, p->in.n, task - half, s.dy);
  } else {
    (ctx->stage == 1 ? hidden_grads : gradients)(ctx, task);
  }
}

const dso_op dso_moe_experts_backward = {"moe_experts_backward", plan, tasks, run};
