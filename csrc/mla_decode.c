/* 吸收式解码：缓存只有潜变量，从不展开成 K、V。
 *
 * 阶段 0  吸收：q_abs [词元, H, r] = q_nope · W_UK；
 * 阶段 1  注意力：每任务一个（span，查询组，缓存分段）。一块潜变量读一次，既当键又当值：
 *         Sᵀ = C · q_absᵀ + R · q_ropeᵀ（缓存行直接作左操作数，不打包），
 *         O += P · C；得到未归一化的 O 与 (m, l)；
 * 阶段 2  合并各分段，out = W_UV · O。
 * 分段只取决于形状，与线程数无关，因此结果逐位确定。
 */
#include "mla_common.h"

enum {
  GROUP = 64,        /* 一组查询（词元 x 头）：4 个面板，O 为 64 x r fp32，放得进二级缓存 */
  BLOCK = 64,        /* 一次处理的缓存槽位 */
  SPLIT = 512,       /* 分段的槽位数：单行长缓存也有足够多的任务 */
  MAX_SPLITS = 32,   /* 部分结果的内存上限 */
  ENOUGH_TASKS = 64, /* 任务已够多时不再分段 */
  TOKENS = 16        /* 阶段 0、2 每任务的词元数 */
};

typedef struct {
  float *q_abs;     /* [B*T, H, r] */
  float *o, *m, *l; /* 每个分段：[部分数, GROUP, r]、[部分数, GROUP] */
} shared_view;

static int64_t groups_of(const dso_mla_inputs *in, const dso_mla_place *at) {
  return dso_ceil_div(at->q_len * in->heads, GROUP);
}

static int64_t total_groups(const dso_mla_inputs *in) {
  int64_t total = 0;
  for (int64_t i = 0; i < in->n_spans; i++) {
    dso_mla_place at = dso_mla_locate(in, &in->spans[i]);
    total += groups_of(in, &at);
  }
  return total;
}

static int64_t split_length(const dso_mla_place *at, int64_t groups) {
  if (groups >= ENOUGH_TASKS) return dso_max(1, at->kv_len);
  return dso_max(SPLIT, dso_round_up(dso_ceil_div(at->kv_len, MAX_SPLITS), BLOCK));
}

static int64_t splits_of(const dso_mla_place *at, int64_t groups) {
  return at->kv_len > 0 ? dso_ceil_div(at->kv_len, split_length(at, groups)) : 0;
}

static int64_t count_parts(const dso_mla_inputs *in) {
  int64_t total = 0, groups = total_groups(in);
  for (int64_t i = 0; i < in->n_spans; i++) {
    dso_mla_place at = dso_mla_locate(in, &in->spans[i]);
    total += groups_of(in, &at) * splits_of(&at, groups);
  }
  return total;
}

static shared_view view(const dso_mla_inputs *in, dso_arena *arena, int64_t parts) {
  shared_view v;
  v.q_abs = dso_take(arena, (size_t)(in->b * in->t * in->heads * in->rank) * 4);
  v.o = dso_take(arena, (size_t)(parts * GROUP * in->rank) * 4);
  v.m = dso_take(arena, (size_t)(parts * GROUP) * 4);
  v.l = dso_take(arena, (size_t)(parts * GROUP) * 4);
  return v;
}

typedef struct {
  void *q_latent, *q_rope; /* 打包的查询 */
  float *rows;             /* 一组查询 fp32，或一块得分的转置 */
  float *scores;           /* [BLOCK, GROUP] */
  void *p;                 /* [GROUP, BLOCK] */
  void *values;            /* 打包的潜变量块 */
  void *keys;              /* 转换后的潜变量块 */
  float *o;                /* [GROUP, r 向上取整到面板] */
} worker_view;

static worker_view worker_of(const dso_mla_inputs *in, dso_arena *arena) {
  int64_t rank16 = dso_round_up(in->rank, DSO_PANEL);
  worker_view v;
  v.q_latent = dso_take(arena, (size_t)(GROUP * (in->rank + 1)) * 4);
  v.q_rope = dso_take(arena, (size_t)(GROUP * (in->rope_dim + 1)) * 4);
  v.rows = dso_take(arena, (size_t)(GROUP * dso_max(BLOCK, dso_max(in->rank, in->rope_dim))) * 4);
  v.scores = dso_take(arena, (size_t)(BLOCK * GROUP) * 4);
  v.p = dso_take(arena, (size_t)(GROUP * BLOCK) * 4);
  v.values = dso_take(arena, (size_t)(rank16 * BLOCK) * 4);
  v.keys = dso_take(arena, dso_mla_keys_bytes(in, BLOCK));
  v.o = dso_take(arena, (size_t)(GROUP * rank16) * 4);
  return v;
}

static size_t edge_bytes(const dso_mla_inputs *in) { /* 阶段 0、2 */
  return (size_t)(TOKENS * (dso_max(in->nope_dim, in->v_dim) + 2 * in->rank)) * 4;
}

static int64_t work_of(const dso_mla_inputs *in) {
  int64_t edges = in->b * in->t * in->rank * (in->nope_dim + in->v_dim), pairs = 0;
  for (int64_t i = 0; i < in->n_spans; i++)
    pairs +=
        (in->spans[i].q_end - in->spans[i].q_begin) * (in->spans[i].kv_end - in->spans[i].kv_begin);
  return in->heads * (edges + pairs * (2 * in->rank + in->rope_dim));
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_mla_inputs *in = &((const dso_mla_params *)params)->in;
  dso_arena shared = {0}, worker = {0};
  (void)isa;
  view(in, &shared, count_parts(in));
  worker_of(in, &worker);
  return (dso_plan){3, shared.used, worker.used > edge_bytes(in) ? worker.used : edge_bytes(in),
                    work_of(in)};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_mla_inputs *in = &((const dso_mla_params *)params)->in;
  if (stage == 1) return count_parts(in);
  return in->heads * dso_ceil_div(in->b * in->t, TOKENS);
}

/* ---- 阶段 0 ---- */
static void absorb(const dso_ctx *ctx, int64_t task) {
  const dso_mla_inputs *in = &((const dso_mla_params *)ctx->params)->in;
  dso_arena arena = {ctx->shared, 0};
  shared_view shared = view(in, &arena, 0);
  int64_t head = task % in->heads, first = task / in->heads * TOKENS;
  int64_t n = dso_min(TOKENS, in->b * in->t - first), out_rs = in->heads * in->rank;
  float *q = ctx->worker;
  for (int64_t i = 0; i < n; i++)
    ctx->isa->to_f32(q + i * in->nope_dim, dso_mla_query(in, first + i, head), in->q_dtype,
                     in->nope_dim);
  int64_t row = head * (in->nope_dim + in->v_dim);
  ctx->isa->axpy_n(n, in->rank, in->nope_dim, q, in->nope_dim,
                   dso_at(in->kv_b.data, in->kv_b.dtype, row * in->kv_b.rs), in->kv_b.dtype,
                   in->kv_b.rs, shared.q_abs + first * out_rs + head * in->rank, out_rs);
}

/* ---- 阶段 1 ---- */
typedef struct {
  const dso_span *span;
  dso_mla_place at;
  int64_t group, begin, end; /* 查询组；缓存分段 [begin, end)（span 内） */
} piece;

static piece find_piece(const dso_mla_inputs *in, int64_t task) {
  int64_t groups = total_groups(in);
  for (int64_t i = 0;; i++) {
    dso_mla_place at = dso_mla_locate(in, &in->spans[i]);
    int64_t splits = splits_of(&at, groups), own = groups_of(in, &at) * splits;
    if (task >= own) {
      task -= own;
      continue;
    }
    int64_t length = split_length(&at, groups), begin = task % splits * length;
    return (piece){&in->spans[i], at, task / splits, begin, dso_min(at.kv_len, begin + length)};
  }
}

/* 组内查询 j 的词元（span 内）与头。 */
static int64_t token_of(const dso_mla_inputs *in, const piece *p, int64_t j) {
  return (p->group * GROUP + j) / in->heads;
}
static int64_t head_of(const dso_mla_inputs *in, const piece *p, int64_t j) {
  return (p->group * GROUP + j) % in->heads;
}

static void pack_queries(const dso_ctx *ctx, const piece *p, int64_t n, dso_dtype fmt,
                         const float *q_abs, worker_view *w) {
  const dso_mla_inputs *in = &((const dso_mla_params *)ctx->params)->in;
  const dso_isa *isa = ctx->isa;
  int64_t first = p->span->q_begin * in->heads + p->group * GROUP;
  isa->pack_t(w->q_latent, fmt, dso_panel_elems(fmt, in->rank), q_abs + first * in->rank, DSO_F32,
              in->rank, n, in->rank);
  if (in->rope_dim == 0) return;
  for (int64_t j = 0; j < n; j++) {
    const void *q = dso_mla_query(in, p->span->q_begin + token_of(in, p, j), head_of(in, p, j));
    isa->to_f32(w->rows + j * in->rope_dim, dso_at(q, in->q_dtype, in->nope_dim), in->q_dtype,
                in->rope_dim);
  }
  isa->pack_t(w->q_rope, fmt, dso_panel_elems(fmt, in->rope_dim), w->rows, DSO_F32, in->rope_dim, n,
              in->rope_dim);
}

static void attend_block(const dso_ctx *ctx, const piece *p, int64_t n, dso_dtype fmt,
                         int64_t begin, int64_t count, float *m, float *l, worker_view *w) {
  const dso_mla_inputs *in = &((const dso_mla_params *)ctx->params)->in;
  const dso_isa *isa = ctx->isa;
  int64_t panels = dso_ceil_div(n, DSO_PANEL), width = panels * DSO_PANEL,
          rank16 = dso_round_up(in->rank, DSO_PANEL);
  int64_t slot = p->at.slot + begin, depth = dso_mla_pad(fmt, count);
  dso_mla_keys keys = dso_mla_load_keys(isa, in, fmt, p->at.row, slot, count, w->keys);
  isa->gemm(fmt, count, panels, dso_mla_pad(fmt, in->rank), keys.latent, keys.latent_rs,
            w->q_latent, dso_panel_elems(fmt, in->rank), w->scores, width, 0);
  if (in->rope_dim > 0)
    isa->gemm(fmt, count, panels, dso_mla_pad(fmt, in->rope_dim), keys.rope, keys.rope_rs,
              w->q_rope, dso_panel_elems(fmt, in->rope_dim), w->scores, width, 1);
  isa->transpose(w->rows, BLOCK, w->scores, width, count, n);
  for (int64_t j = 0; j < n; j++) {
    int64_t seen = dso_mla_visible(in, &p->at, token_of(in, p, j)) - begin;
    dso_mla_hide(in, p->at.row, slot, w->rows + j * BLOCK, count);
    float keep =
        isa->softmax_row(w->rows + j * BLOCK, dso_max(0, dso_min(count, seen)), depth,
                         in->softmax_scale, &m[j], &l[j], dso_at_mut(w->p, fmt, j * BLOCK), fmt);
    if (keep != 1.0f) isa->vscale(w->o + j * rank16, keep, rank16);
  }
  isa->pack_n(w->values, fmt, dso_panel_elems(fmt, BLOCK), keys.latent, fmt, keys.latent_rs,
              in->rank, count);
  isa->gemm(fmt, n, rank16 / DSO_PANEL, depth, w->p, BLOCK, w->values, dso_panel_elems(fmt, BLOCK),
            w->o, rank16, 1);
}

static void attend(const dso_ctx *ctx, int64_t task) {
  const dso_mla_inputs *in = &((const dso_mla_params *)ctx->params)->in;
  dso_dtype fmt = dso_mla_format(ctx->isa, in);
  dso_arena arena = {ctx->shared, 0}, local = {ctx->worker, 0};
  shared_view shared = view(in, &arena, count_parts(in));
  worker_view w = worker_of(in, &local);
  piece p = find_piece(in, task);
  int64_t n = dso_min(GROUP, p.at.q_len * in->heads - p.group * GROUP),
          rank16 = dso_round_up(in->rank, DSO_PANEL);
  float *m = shared.m + task * GROUP, *l = shared.l + task * GROUP;
  for (int64_t j = 0; j < n; j++) m[j] = -INFINITY, l[j] = 0.0f;
  memset(w.o, 0, (size_t)(n * rank16) * 4);
  pack_queries(ctx, &p, n, fmt, shared.q_abs, &w);
  for (int64_t begin = p.begin; begin < p.end; begin += BLOCK)
    attend_block(ctx, &p, n, fmt, begin, dso_min(BLOCK, p.end - begin), m, l, &w);
  for (int64_t j = 0; j < n; j++)
    memcpy(shared.o + (task * GROUP + j) * in->rank, w.o + j * rank16, (size_t)in->rank * 4);
}

/* ---- 阶段 2 ---- */
/* 词元所在的 span 与它的第一个部分；不在任何 span 里返回 NULL。 */
static const dso_span *find_span(const dso_mla_inputs *in, int64_t token, int64_t *first_part,
                                 int64_t *splits) {
  int64_t part = 0, groups = total_groups(in);
  for (int64_t i = 0; i < in->n_spans; i++) {
    dso_mla_place at = dso_mla_locate(in, &in->spans[i]);
    *splits = splits_of(&at, groups);
    if (token >= in->spans[i].q_begin && token < in->spans[i].q_end) {
      *first_part = part;
      return &in->spans[i];
    }
    part += groups_of(in, &at) * *splits;
  }
  return NULL;
}

static void combine(const dso_ctx *ctx, const shared_view *shared, int64_t token, int64_t head,
                    float *o) {
  const dso_mla_inputs *in = &((const dso_mla_params *)ctx->params)->in;
  int64_t part = 0, splits = 0;
  const dso_span *span = find_span(in, token, &part, &splits);
  memset(o, 0, (size_t)in->rank * 4);
  if (!span) return;
  int64_t index = (token - span->q_begin) * in->heads + head;
  part += index / GROUP * splits, index %= GROUP;
  float top = -INFINITY, sum = 0.0f;
  for (int64_t i = 0; i < splits; i++) {
    float m = shared->m[(part + i) * GROUP + index];
    top = m > top ? m : top;
  }
  for (int64_t i = 0; i < splits; i++) {
    int64_t at = (part + i) * GROUP + index;
    if (shared->l[at] == 0.0f) continue;      /* 这一段什么都看不见 */
    float weight = expf(shared->m[at] - top); /* 得分全是 NaN 时 m 仍是 -inf，weight 为 NaN */
    sum += weight * shared->l[at];
    ctx->isa->vaxpy(o, weight, shared->o + at * in->rank, in->rank);
  }
  if (sum != 0.0f) ctx->isa->vscale(o, 1.0f / sum, in->rank);
}

static void project(const dso_ctx *ctx, int64_t task) {
  const dso_mla_params *p = ctx->params;
  const dso_mla_inputs *in = &p->in;
  dso_arena arena = {ctx->shared, 0};
  shared_view shared = view(in, &arena, count_parts(in));
  int64_t head = task % in->heads, first = task / in->heads * TOKENS,
          n = dso_min(TOKENS, in->b * in->t - first);
  dso_dtype fmt = dso_mla_format(ctx->isa, in);
  float *o = ctx->worker, *out = o + TOKENS * in->rank;
  void *narrow = out + TOKENS * in->v_dim; /* o 的半精度副本 */
  for (int64_t i = 0; i < n; i++) combine(ctx, &shared, first + i, head, o + i * in->rank);
  int64_t row = head * (in->nope_dim + in->v_dim) + in->nope_dim;
  const void *left = o;
  if (fmt != DSO_F32) ctx->isa->from_f32(narrow, fmt, o, n * in->rank), left = narrow;
  ctx->isa->dot(fmt, n, in->v_dim, in->rank, left, in->rank,
                dso_at(in->kv_b.data, in->kv_b.dtype, row * in->kv_b.rs), in->kv_b.dtype,
                in->kv_b.rs, out, in->v_dim);
  for (int64_t i = 0; i < n; i++)
    ctx->isa->from_f32(
        dso_at_mut(p->out, in->q_dtype, ((first + i) * in->heads + head) * in->v_dim), in->q_dtype,
        out + i * in->v_dim, in->v_dim);
}

static void run(const dso_ctx *ctx, int64_t task) {
  (ctx->stage == 0 ? absorb : ctx->stage == 1 ? attend : project)(ctx, task);
}

const dso_op dso_mla_decode = {"mla_decode", plan, tasks, run};
