/* moe_experts：y[t] = Σ_e w[t, e] · down_e(act(gate_e x[t], up_e x[t]))。
 *
 * 行已按专家排好（dso_moe_sort）；共享专家也是其中的专家，它的行就是全部词元。
 * 阶段 0  收集：x 的行按专家排成连续的，转成计算格式；量化而行数少的专家，行用 pack_q 打包；
 * 阶段 1  每任务一个（专家，行块，inner 的一段）：gate、up 一次算完，激活，写 h；
 * 阶段 2  这些专家的 h 也打包（占用 x 的位置；没有这样的专家时没有任务）；
 * 阶段 3  每任务一个（词元段，输出的一段列）：依次乘各专家的 down，加权累加进 fp32 的 y。
 *         每个输出元素按专家的次序累加，与线程数无关；没有 [行, N] 的中间结果。
 */
#include "moe_experts.h"

#include <math.h>
#include <string.h>

typedef struct {
  void *x, *h;  /* [行, K]、[Σ 行 * inner]，计算格式 */
  char *packed; /* [打包的行]，行距 dso_pack_q_bytes(widest)：先是 x，后是 h */
} shared_view;

static shared_view shared_of(const dso_ctx *ctx, const dso_moe_inputs *in, dso_dtype fmt) {
  char *base = ctx->shared;
  char *h = base + dso_moe_bytes(dso_moe_total(in) * in->k, fmt);
  return (shared_view){base, h, h + dso_moe_bytes(in->hidden_at[in->experts], fmt)};
}

static int64_t packed_rows(const dso_moe_inputs *in) { return in->packed_at[in->experts]; }

static int64_t pack_tasks(const dso_moe_inputs *in) {
  return dso_ceil_div(packed_rows(in), DSO_MOE_PACK);
}

/* 全部打包时不必收集。 */
static int64_t gather_tasks(const dso_moe_inputs *in) {
  return packed_rows(in) == dso_moe_total(in) ? 0 : dso_moe_gather_tasks(in);
}

/* 第 index 个打包的行：阶段 0 来自 x，阶段 2 来自 h。 */
static void pack_row(const dso_ctx *ctx, const dso_moe_inputs *in, dso_dtype fmt, int64_t index) {
  shared_view s = shared_of(ctx, in, fmt);
  int64_t at = dso_moe_find(in->packed_at, in->experts, index), row = index - in->packed_at[at];
  const dso_expert *e = &in->expert[at];
  void *dst = s.packed + index * dso_moe_packed_stride(in, at);
  if (ctx->stage == 0 && in->k > 0)
    ctx->isa->pack_q(dst,
                     dso_at(in->x.data, in->x.dtype, in->token[in->begin[at] + row] * in->x.rs),
                     in->x.dtype, in->k, e->gate.dtype, e->gate_quant.group);
  if (ctx->stage == 2 && e->inner > 0)
    ctx->isa->pack_q(dst, dso_at(s.h, fmt, in->hidden_at[at] + row * e->inner), fmt, e->inner,
                     e->down.dtype, e->down_quant.group);
}

static void pack_rows(const dso_ctx *ctx, const dso_moe_inputs *in, dso_dtype fmt, int64_t task) {
  int64_t first = task * DSO_MOE_PACK, last = dso_min(first + DSO_MOE_PACK, packed_rows(in));
  for (int64_t i = first; i < last; i++) pack_row(ctx, in, fmt, i);
}

/* 专家 e 第 row 行起的输入：打包的，或计算格式的 rows（第一行在下标 base）。 */
static const void *input_of(const dso_moe_inputs *in, const shared_view *s, dso_dtype fmt,
                            int64_t e, int64_t row, const void *rows, int64_t base, int64_t width) {
  int64_t stride = dso_moe_packed_stride(in, e);
  return stride ? s->packed + (in->packed_at[e] + row) * stride
                : dso_at(rows, fmt, base + row * width);
}

/* 输出阶段的列数：词元少时窄，任务才够多；要打包时取打包的宽度。 */
static int64_t out_columns(const dso_moe_inputs *in) {
  if (in->transposed || !dso_moe_is_direct(in, in->most_rows)) return DSO_NB;
  return in->tokens > DSO_MOE_AXPY_ROWS ? 4 * DSO_DOT_UNIT : 2 * DSO_DOT_UNIT;
}

/* 工人暂存：a 是一块结果；b 是 up 的一块，或输出阶段的累加器。大小随行数，解码时只有几 KB。 */
typedef struct {
  float *a, *b;
  dso_moe_scratch scratch;
} worker_view;

static int64_t block_floats(const dso_moe_inputs *in) {
  return dso_min(DSO_MB, in->most_rows) * DSO_NB;
}

static int64_t sum_floats(const dso_moe_inputs *in) {
  return dso_max(block_floats(in), dso_min(in->tokens, DSO_MOE_SEGMENT) * DSO_NB);
}

static worker_view worker_of(const dso_ctx *ctx, const dso_moe_inputs *in) {
  float *a = ctx->worker, *b = a + block_floats(in);
  return (worker_view){a, b, dso_moe_scratch_at(in, b + sum_floats(in))};
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_moe_inputs *in = &((const dso_moe_params *)params)->in;
  dso_dtype fmt = dso_moe_format(isa, in);
  size_t shared = dso_moe_bytes(dso_moe_total(in) * in->k, fmt) +
                  dso_moe_bytes(in->hidden_at[in->experts], fmt) +
                  (size_t)packed_rows(in) * dso_pack_q_bytes(in->widest);
  size_t blocks = (size_t)(block_floats(in) + sum_floats(in)) * 4;
  int packs = !dso_moe_is_direct(in, in->most_rows);
  return (dso_plan){4, shared, blocks + dso_moe_scratch_bytes(in, packs),
                    in->hidden_at[in->experts] * (2 * in->k + in->n)};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_moe_inputs *in = &((const dso_moe_params *)params)->in;
  if (stage == 0) return gather_tasks(in) + pack_tasks(in);
  if (stage == 1) return dso_moe_hidden_tasks(in);
  if (stage == 2) return pack_tasks(in);
  return dso_ceil_div(in->tokens, DSO_MOE_SEGMENT) * dso_ceil_div(in->n, out_columns(in));
}

/* 舍入不越过截断的界：反向按留下的值看截断没有。 */
static void keep_sides(const dso_isa *isa, uint16_t *to, dso_dtype dtype, const float *x,
                       int64_t count, float limit) {
  for (int64_t i = 0; i < count; i++) {
    float rounded;
    isa->to_f32(&rounded, to + i, dtype, 1);
    int over = fabsf(x[i]) > limit;
    if ((fabsf(rounded) > limit) != over) to[i] = (uint16_t)(over ? to[i] + 1 : to[i] - 1);
  }
}

/* 一行的 gate、up（一段 nc 个）留给反向。 */
static void save_row(const dso_isa *isa, const dso_moe_params *p, int64_t e, int64_t row,
                     int64_t n0, int64_t nc, const float *g, const float *u) {
  const dso_moe_inputs *in = &p->in;
  dso_dtype dtype = in->x.dtype;
  int64_t up, at = dso_moe_saved_at(in, &p->saved, e, row, &up) + n0;
  const float *from[2] = {g, in->gated ? u : NULL};
  for (int i = 0; i < 2 && from[i]; i++) {
    void *to = dso_at_mut(p->saved.data, dtype, at + i * up);
    isa->from_f32(to, dtype, from[i], nc);
    if (dso_act_clips(in->act.kind) && dtype != DSO_F32)
      keep_sides(isa, to, dtype, from[i], nc, in->act.limit);
  }
}

static void hidden(const dso_ctx *ctx, const dso_moe_inputs *in, int64_t task) {
  const dso_moe_params *p = ctx->params;
  dso_dtype fmt = dso_moe_format(ctx->isa, in);
  shared_view s = shared_of(ctx, in, fmt);
  dso_moe_block b = dso_moe_hidden_block(in, task);
  const dso_expert *e = &in->expert[b.expert];
  worker_view w = worker_of(ctx, in);
  float *g = w.a, *u = w.b;
  const void *x = input_of(in, &s, fmt, b.expert, b.row, s.x, in->begin[b.expert] * in->k, in->k);
  dso_moe_gate_up(ctx->isa, in, fmt, e, b.m, b.n0, b.nc, x, g, u, DSO_NB, &w.scratch);
  int64_t base = in->hidden_at[b.expert] + b.row * e->inner + b.n0;
  for (int64_t i = 0; i < b.m; i++) {
    float *row = g + i * DSO_NB;
    if (p->saved.data) save_row(ctx->isa, p, b.expert, b.row + i, b.n0, b.nc, row, u + i * DSO_NB);
    ctx->isa->activate(&in->act, row, in->gated ? u + i * DSO_NB : NULL, b.nc);
    ctx->isa->from_f32(dso_at_mut(s.h, fmt, base + i * e->inner), fmt, row, b.nc);
  }
}

/* 专家 e 之后下一个有行的专家的 down，从第 n0 行起；行距不同的没有。 */
static const void *next_down(const dso_moe_inputs *in, int64_t e, int64_t n0) {
  int64_t next = e + 1;
  while (next < in->experts && !dso_moe_rows(in, next)) next++;
  if (next == in->experts) return NULL;
  const dso_mat *w = &in->expert[next].down;
  return w->rs == in->expert[e].down.rs ? dso_at(w->data, w->dtype, n0 * w->rs) : NULL;
}

static void output(const dso_ctx *ctx, const dso_moe_inputs *in, int64_t task) {
  dso_dtype fmt = dso_moe_format(ctx->isa, in);
  shared_view s = shared_of(ctx, in, fmt);
  int64_t width = out_columns(in), segments = dso_ceil_div(in->tokens, DSO_MOE_SEGMENT);
  int64_t t0 = task % segments * DSO_MOE_SEGMENT, t1 = dso_min(in->tokens, t0 + DSO_MOE_SEGMENT);
  int64_t n0 = task / segments * width, nc = dso_min(width, in->n - n0);
  worker_view w = worker_of(ctx, in);
  float *c = w.a, *sum = w.b;
  memset(sum, 0, (size_t)((t1 - t0) * nc) * 4);
  for (int64_t i = 0; i < in->experts; i++) {
    const dso_expert *e = &in->expert[i];
    int64_t first, last = dso_moe_rows_in(in, i, t0, t1, &first);
    for (; first < last; first += DSO_MB) {
      int64_t m = dso_min(DSO_MB, last - first);
      const void *h =
          input_of(in, &s, fmt, i, first - in->begin[i], s.h, in->hidden_at[i], e->inner);
      dso_moe_product p = {m,
                           e->inner,
                           n0,
                           nc,
                           h,
                           e->down,
                           e->down_bias,
                           e->bias_dtype,
                           1,
                           &e->down_quant,
                           dso_moe_packed_stride(in, i),
                           next_down(in, i, n0)};
      dso_moe_multiply(ctx->isa, in, fmt, &p, c, DSO_NB, &w.scratch);
      for (int64_t j = 0; j < m; j++)
        ctx->isa->vaxpy(sum + (in->token[first + j] - t0) * nc, in->weight[first + j],
                        c + j * DSO_NB, nc);
    }
  }
  void *y = ((const dso_moe_params *)ctx->params)->y;
  for (int64_t t = t0; t < t1; t++)
    ctx->isa->from_f32(dso_at_mut(y, in->x.dtype, t * in->n + n0), in->x.dtype, sum + (t - t0) * nc,
                       nc);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_moe_inputs *in = &((const dso_moe_params *)ctx->params)->in;
  dso_dtype fmt = dso_moe_format(ctx->isa, in);
  int64_t gathers = ctx->stage == 0 ? gather_tasks(in) : 0;
  if (task < gathers)
    dso_moe_gather(ctx->isa, in, fmt, in->x, in->k, task, shared_of(ctx, in, fmt).x);
  else if (ctx->stage == 0 || ctx->stage == 2)
    pack_rows(ctx, in, fmt, task - gathers);
  else
    (ctx->stage == 1 ? hidden : output)(ctx, in, task);
}

const dso_op dso_moe_experts = {"moe_experts", plan, tasks, run};
