/* mla_prefill 的反向。只用前向的输入、输出与 lse；K、V 与概率全部按块重算。
 *
 * 头分成若干组，每组两个阶段（组的大小只取决于形状）：
 *   A  每任务一个（batch 行，头）：逐键块、逐查询块求 dq，并把 dK、dV 累加到组缓冲；
 *   B  dlatent += [dK|dV] · W，drope += Σ_头 dK_rope，dW = [dK|dV]ᵀ · latent。
 * 同一 batch 行的 span 由同一任务依次处理，所以键范围可以重叠；跨头求和的次序固定，结果逐位确定。
 *
 * 一块之内按转置的得分 Sᵀ [键, 查询] 计算：softmax 的反向只需逐元素，无行归约。
 */
#include "mla_prefill.h"

enum {
  TILE = 64,              /* 查询块：4 个面板 */
  GROUP_BYTES = 64 << 20, /* 组缓冲上限 */
};

typedef struct {
  void *keys, *values; /* 一块键、值，行主序 [n, qk]、[n, v_pad] */
  void *keys_n;        /* 键按 pack_n 打包（求 dq） */
  void *latents;       /* 转换后的潜变量块 */
  float *rows;         /* 展开的小块 */
  void *q, *q_t, *q_n; /* 查询块：行主序、两种打包 */
  void *g, *g_t, *g_n; /* 输出梯度块：同上 */
  float *lse, *delta;  /* [TILE] */
  float *s, *ds;       /* [DSO_KV_CHUNK, TILE] */
  void *left;          /* 转成计算格式的左操作数 */
  float *flip;         /* dsᵀ [TILE, DSO_KV_CHUNK] */
  float *dk, *dv;      /* [DSO_KV_CHUNK, qk16]、[DSO_KV_CHUNK, v16] */
  float *dq;           /* 一个 span 的全部查询 [q_len, qk16] */
} worker_view;

typedef struct {
  dso_mla_dims d;
  int64_t qk16, v_pad, kv_dim; /* kv_dim = dn + dv */
  int64_t group;               /* 每组头数 */
  size_t weights;              /* 打包权重的字节数，其后是组缓冲 */
} layout;

static layout layout_of(const dso_isa *isa, const dso_mla_inputs *in) {
  layout l;
  l.d = dso_mla_dims_of(isa, in);
  l.qk16 = dso_round_up(l.d.qk, DSO_PANEL);
  l.v_pad = dso_mla_pad(l.d.fmt, in->v_dim);
  l.kv_dim = in->nope_dim + in->v_dim;
  int64_t per_head = dso_max(1, in->b * in->s * (l.kv_dim + in->rope_dim) * 4);
  l.group = dso_max(1, dso_min(in->heads, GROUP_BYTES / per_head));
  l.weights = ((size_t)(in->heads * l.d.weight * dso_size_of(l.d.fmt)) + 63) / 64 * 64;
  return l;
}

static int64_t longest(const dso_mla_inputs *in) {
  int64_t best = 1;
  for (int64_t i = 0; i < in->n_spans; i++)
    best = dso_max(best, in->spans[i].q_end - in->spans[i].q_begin);
  return best;
}

static worker_view worker_of(const dso_mla_inputs *in, const layout *l, dso_arena *arena) {
  int64_t size = dso_size_of(l->d.fmt), chunk = DSO_KV_CHUNK;
  worker_view w;
  w.keys = dso_take(arena, (size_t)(chunk * l->d.qk * size));
  w.values = dso_take(arena, (size_t)(chunk * l->v_pad * size));
  w.keys_n = dso_take(arena, (size_t)(chunk * l->qk16 * size));
  w.latents = dso_take(arena, dso_mla_keys_bytes(in, DSO_EXPAND_ROWS));
  w.rows = dso_take(arena, (size_t)(DSO_EXPAND_ROWS * dso_max(l->d.kv16, l->qk16)) * 4);
  w.q = dso_take(arena, (size_t)(TILE * l->d.qk * size));
  w.q_t = dso_take(arena, (size_t)(TILE * l->d.qk * size));
  w.q_n = dso_take(arena, (size_t)(TILE * l->qk16 * size));
  w.g = dso_take(arena, (size_t)(TILE * l->v_pad * size));
  w.g_t = dso_take(arena, (size_t)(TILE * l->v_pad * size));
  w.g_n = dso_take(arena, (size_t)(TILE * l->d.v16 * size));
  w.lse = dso_take(arena, TILE * 4);
  w.delta = dso_take(arena, TILE * 4);
  w.s = dso_take(arena, (size_t)(chunk * TILE) * 4);
  w.ds = dso_take(arena, (size_t)(chunk * TILE) * 4);
  w.left = dso_take(arena, (size_t)(chunk * TILE) * 4);
  w.flip = dso_take(arena, (size_t)(chunk * TILE) * 4);
  w.dk = dso_take(arena, (size_t)(chunk * l->qk16) * 4);
  w.dv = dso_take(arena, (size_t)(chunk * l->d.v16) * 4);
  w.dq = dso_take(arena, (size_t)(longest(in) * l->qk16) * 4);
  return w;
}

/* 组缓冲：每头 [B*S, dn + dv] 与 [B*S, dr]，fp32。 */
static float *group_kv(const dso_ctx *ctx, const dso_mla_inputs *in, const layout *l,
                       int64_t index) {
  return (float *)((char *)ctx->shared + l->weights) + index * in->b * in->s * l->kv_dim;
}

static float *group_rope(const dso_ctx *ctx, const dso_mla_inputs *in, const layout *l,
                         int64_t index) {
  return group_kv(ctx, in, l, l->group) + index * in->b * in->s * in->rope_dim;
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_mla_inputs *in = &((const dso_mla_backward_params *)params)->in;
  layout l = layout_of(isa, in);
  dso_arena worker = {0};
  worker_of(in, &l, &worker);
  size_t shared = l.weights + (size_t)(l.group * in->b * in->s * (l.kv_dim + in->rope_dim)) * 4;
  size_t edge = dso_gemm_scratch() + (size_t)DSO_MB * DSO_NB * 4;
  int64_t groups = dso_ceil_div(in->heads, l.group);
  return (dso_plan){1 + 2 * groups, shared, worker.used > edge ? worker.used : edge, 0};
}

/* 组的大小只由形状定，不依赖指令集，因此 tasks 不需要 isa。 */
static int64_t group_size(const dso_mla_inputs *in) {
  int64_t per_head = dso_max(1, in->b * in->s * (in->nope_dim + in->v_dim + in->rope_dim) * 4);
  return dso_max(1, dso_min(in->heads, GROUP_BYTES / per_head));
}

/* 阶段 B 的任务：dlatent 的块、drope 的 batch 行、dW 的块。 */
typedef struct {
  int64_t latent, rope, weight;
} parts;

static parts count(const dso_mla_inputs *in, int64_t heads) {
  return (parts){in->b * dso_block_count(in->s, in->rank), in->rope_dim ? in->b : 0,
                 heads * dso_block_count(in->nope_dim + in->v_dim, in->rank)};
}

static int64_t heads_in(const dso_mla_inputs *in, int64_t stage) {
  int64_t first = (stage - 1) / 2 * group_size(in);
  return dso_min(group_size(in), in->heads - first);
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_mla_inputs *in = &((const dso_mla_backward_params *)params)->in;
  if (stage == 0) return in->heads;
  int64_t heads = heads_in(in, stage);
  if (stage % 2 == 1) return in->b * heads;
  parts n = count(in, heads);
  return n.latent + n.rope + n.weight;
}

/* ---- 阶段 A ---- */
typedef struct {
  const dso_ctx *ctx;
  const dso_mla_inputs *in;
  const layout *l;
  const dso_span *span;
  dso_mla_place at;
  int64_t head;
  worker_view w;
} job;

/* 展开一块键：行主序的 K、V，以及 K 的 pack_n。 */
static void expand_chunk(const job *j, const void *weight, int64_t chunk, int64_t n) {
  const dso_isa *isa = j->ctx->isa;
  const dso_mla_inputs *in = j->in;
  const dso_mla_dims *d = &j->l->d;
  const worker_view *w = &j->w;
  for (int64_t i = 0; i < n; i += DSO_EXPAND_ROWS) {
    int64_t rows = dso_min(DSO_EXPAND_ROWS, n - i);
    dso_mla_keys keys =
        dso_mla_load_keys(isa, in, d->fmt, j->at.row, j->at.slot + chunk + i, rows, w->latents);
    dso_mla_expand(isa, in, d, &keys, weight, rows, w->rows);
    for (int64_t x = 0; x < rows; x++) {
      void *key = dso_at_mut(w->keys, d->fmt, (i + x) * d->qk);
      const float *row = w->rows + x * d->kv16;
      dso_mla_copy(isa, key, d->fmt, d->nope, row, DSO_F32, 0, 1, in->nope_dim, NULL);
      dso_mla_copy(isa, dso_at_mut(key, d->fmt, d->nope), d->fmt, d->rope,
                   dso_at(keys.rope, d->fmt, x * keys.rope_rs), d->fmt, 0, 1, in->rope_dim, NULL);
      dso_mla_copy(isa, dso_at_mut(w->values, d->fmt, (i + x) * j->l->v_pad), d->fmt, j->l->v_pad,
                   row + in->nope_dim, DSO_F32, 0, 1, in->v_dim, NULL);
    }
  }
  isa->pack_n(w->keys_n, d->fmt, dso_panel_elems(d->fmt, n), w->keys, d->fmt, d->qk, d->qk, n);
}

/* 取查询块与输出梯度块，打包，并求 delta = Σ dO·O。 */
static void load_tile(const job *j, int64_t first, int64_t n) {
  const dso_mla_backward_params *p = j->ctx->params;
  const dso_isa *isa = j->ctx->isa;
  const dso_mla_inputs *in = j->in;
  const dso_mla_dims *d = &j->l->d;
  const worker_view *w = &j->w;
  float *o = w->rows, *g = o + in->v_dim;
  dso_mla_copy_queries(isa, in, d, j->span->q_begin + first, n, j->head, w->q, w->rows);
  for (int64_t i = 0; i < n; i++) {
    int64_t at = (j->span->q_begin + first + i) * in->heads + j->head;
    isa->to_f32(o, dso_at(p->out, in->q_dtype, at * in->v_dim), in->q_dtype, in->v_dim);
    isa->to_f32(g, dso_at(p->grad, in->q_dtype, at * in->v_dim), in->q_dtype, in->v_dim);
    w->delta[i] = isa->vdot(o, g, in->v_dim);
    w->lse[i] = p->lse[at] == -INFINITY ? INFINITY : p->lse[at];
    dso_mla_copy(isa, dso_at_mut(w->g, d->fmt, i * j->l->v_pad), d->fmt, j->l->v_pad, g, DSO_F32, 0,
                 1, in->v_dim, NULL);
  }
  isa->pack_t(w->q_t, d->fmt, d->qk * DSO_PANEL, w->q, d->fmt, d->qk, n, d->qk);
  isa->pack_n(w->q_n, d->fmt, dso_panel_elems(d->fmt, n), w->q, d->fmt, d->qk, d->qk, n);
  isa->pack_t(w->g_t, d->fmt, j->l->v_pad * DSO_PANEL, w->g, d->fmt, j->l->v_pad, n, j->l->v_pad);
  isa->pack_n(w->g_n, d->fmt, dso_panel_elems(d->fmt, n), w->g, d->fmt, j->l->v_pad, in->v_dim, n);
}

/* s、ds 的 rows 行（键）x n 列（查询）→ 概率与得分梯度；看不见的置 0。 */
static void softmax_gradient(const job *j, int64_t first, int64_t n, int64_t chunk, int64_t rows) {
  const dso_mla_inputs *in = j->in;
  const worker_view *w = &j->w;
  int64_t shift =
      dso_mla_visible(in, &j->at, first) - 1 - chunk; /* 块内键 x 对查询 i 可见：x <= shift + i */
  for (int64_t x = 0; x < rows; x++) {
    float *s = w->s + x * TILE, *ds = w->ds + x * TILE;
    int64_t hidden = in->causal ? dso_max(0, dso_min(n, x - shift)) : 0;
    if (in->kv_mask && !in->kv_mask[j->at.row * in->kv_mask_bs + j->at.slot + chunk + x])
      hidden = n;
    memset(s, 0, (size_t)hidden * 4);
    memset(ds, 0, (size_t)hidden * 4);
    j->ctx->isa->softmax_backward(s + hidden, ds + hidden, n - hidden, in->softmax_scale,
                                  w->lse + hidden, w->delta + hidden);
    for (int64_t i = n; i < dso_mla_pad(j->l->d.fmt, n); i++) s[i] = ds[i] = 0.0f;
  }
}

static void to_format(const job *j, const float *src, int64_t ld, int64_t rows, int64_t width) {
  dso_dtype fmt = j->l->d.fmt;
  for (int64_t x = 0; x < rows; x++)
    j->ctx->isa->from_f32(dso_at_mut(j->w.left, fmt, x * ld), fmt, src + x * ld, width);
}

static void backward_tile(const job *j, int64_t first, int64_t n, int64_t chunk, int64_t count) {
  const dso_isa *isa = j->ctx->isa;
  const layout *l = j->l;
  const dso_mla_dims *d = &l->d;
  const worker_view *w = &j->w;
  int64_t rows = dso_min(count, dso_mla_visible(j->in, &j->at, first + n - 1) - chunk);
  if (rows <= 0) return;
  int64_t panels = dso_ceil_div(n, DSO_PANEL), n_pad = dso_mla_pad(d->fmt, n),
          rows_pad = dso_mla_pad(d->fmt, rows);
  load_tile(j, first, n);
  isa->gemm(d->fmt, rows, panels, d->qk, w->keys, d->qk, w->q_t, d->qk * DSO_PANEL, w->s, TILE, 0);
  isa->gemm(d->fmt, rows, panels, l->v_pad, w->values, l->v_pad, w->g_t, l->v_pad * DSO_PANEL,
            w->ds, TILE, 0);
  softmax_gradient(j, first, n, chunk, rows);
  to_format(j, w->s, TILE, rows, n_pad);
  isa->gemm(d->fmt, rows, d->v16 / DSO_PANEL, n_pad, w->left, TILE, w->g_n,
            dso_panel_elems(d->fmt, n), w->dv, d->v16, 1);
  to_format(j, w->ds, TILE, rows, n_pad);
  isa->gemm(d->fmt, rows, l->qk16 / DSO_PANEL, n_pad, w->left, TILE, w->q_n,
            dso_panel_elems(d->fmt, n), w->dk, l->qk16, 1);
  isa->transpose(w->flip, DSO_KV_CHUNK, w->ds, TILE, rows, n);
  for (int64_t i = 0; rows_pad > rows && i < n; i++) w->flip[i * DSO_KV_CHUNK + rows] = 0.0f;
  to_format(j, w->flip, DSO_KV_CHUNK, n, rows_pad);
  isa->gemm(d->fmt, n, l->qk16 / DSO_PANEL, rows_pad, w->left, DSO_KV_CHUNK, w->keys_n,
            dso_panel_elems(d->fmt, count), w->dq + first * l->qk16, l->qk16, 1);
}

/* 一块 dK、dV 累加到组缓冲。 */
static void add_chunk(const job *j, int64_t index, int64_t chunk, int64_t n) {
  const dso_isa *isa = j->ctx->isa;
  const dso_mla_inputs *in = j->in;
  const layout *l = j->l;
  int64_t token = j->at.row * in->s + j->at.slot + chunk;
  float *kv = group_kv(j->ctx, in, l, index) + token * l->kv_dim;
  float *rope = group_rope(j->ctx, in, l, index) + token * in->rope_dim;
  for (int64_t x = 0; x < n; x++) {
    const float *dk = j->w.dk + x * l->qk16;
    isa->vaxpy(kv + x * l->kv_dim, 1.0f, dk, in->nope_dim);
    isa->vaxpy(kv + x * l->kv_dim + in->nope_dim, 1.0f, j->w.dv + x * l->d.v16, in->v_dim);
    isa->vaxpy(rope + x * in->rope_dim, 1.0f, dk + l->d.nope, in->rope_dim);
  }
}

static void backward_span(const job *j, int64_t index) {
  const dso_mla_backward_params *p = j->ctx->params;
  const dso_mla_inputs *in = j->in;
  const layout *l = j->l;
  const worker_view *w = &j->w;
  const void *weight = dso_at(j->ctx->shared, l->d.fmt, j->head * l->d.weight);
  memset(w->dq, 0, (size_t)(j->at.q_len * l->qk16) * 4);
  for (int64_t chunk = 0; chunk < j->at.kv_len; chunk += DSO_KV_CHUNK) {
    int64_t count = dso_min(DSO_KV_CHUNK, j->at.kv_len - chunk);
    expand_chunk(j, weight, chunk, count);
    memset(w->dk, 0, (size_t)(count * l->qk16) * 4);
    memset(w->dv, 0, (size_t)(count * l->d.v16) * 4);
    for (int64_t first = 0; first < j->at.q_len; first += TILE)
      backward_tile(j, first, dso_min(TILE, j->at.q_len - first), chunk, count);
    add_chunk(j, index, chunk, count);
  }
  int64_t qk = in->nope_dim + in->rope_dim;
  for (int64_t i = 0; i < j->at.q_len; i++) {
    void *dq = dso_at_mut(p->dq, in->q_dtype, ((j->span->q_begin + i) * in->heads + j->head) * qk);
    j->ctx->isa->from_f32(dq, in->q_dtype, w->dq + i * l->qk16, in->nope_dim);
    j->ctx->isa->from_f32(dso_at_mut(dq, in->q_dtype, in->nope_dim), in->q_dtype,
                          w->dq + i * l->qk16 + l->d.nope, in->rope_dim);
  }
}

static void backward_head(const dso_ctx *ctx, const layout *l, int64_t row, int64_t head,
                          int64_t index) {
  const dso_mla_inputs *in = &((const dso_mla_backward_params *)ctx->params)->in;
  dso_arena arena = {ctx->worker, 0};
  job j = {.ctx = ctx, .in = in, .l = l, .head = head, .w = worker_of(in, l, &arena)};
  memset(group_kv(ctx, in, l, index) + row * in->s * l->kv_dim, 0, (size_t)(in->s * l->kv_dim) * 4);
  memset(group_rope(ctx, in, l, index) + row * in->s * in->rope_dim, 0,
         (size_t)(in->s * in->rope_dim) * 4);
  for (int64_t i = 0; i < in->n_spans; i++) {
    j.span = &in->spans[i];
    j.at = dso_mla_locate(in, j.span);
    if (j.at.row == row && j.at.q_len > 0 && j.at.kv_len > 0) backward_span(&j, index);
  }
}

/* ---- 阶段 B ---- */
static void reduce_latent(const dso_ctx *ctx, const layout *l, int64_t first_head, int64_t heads,
                          int64_t task) {
  const dso_mla_backward_params *p = ctx->params;
  const dso_mla_inputs *in = &p->in;
  int64_t per_row = dso_block_count(in->s, in->rank), row = task / per_row;
  dso_block b = dso_block_at(in->s, in->rank, task % per_row);
  float *c = ctx->worker;
  for (int64_t i = 0; i < heads; i++) {
    dso_gemm g = {.isa = ctx->isa, .fmt = l->d.fmt, .k = l->kv_dim};
    g.a = (dso_mat){group_kv(ctx, in, l, i) + row * in->s * l->kv_dim, l->kv_dim, DSO_F32};
    g.b =
        (dso_mat){dso_at(in->kv_b.data, in->kv_b.dtype, (first_head + i) * l->kv_dim * in->kv_b.rs),
                  in->kv_b.rs, in->kv_b.dtype};
    dso_gemm_block(&g, b.m0, b.mc, b.n0, b.nc, c, DSO_NB, i > 0,
                   (char *)ctx->worker + (size_t)DSO_MB * DSO_NB * 4);
  }
  for (int64_t i = 0; i < b.mc; i++)
    ctx->isa->vaxpy(p->dlatent + (row * in->s + b.m0 + i) * in->rank + b.n0, 1.0f, c + i * DSO_NB,
                    b.nc);
}

static void reduce_rope(const dso_ctx *ctx, const layout *l, int64_t heads, int64_t row) {
  const dso_mla_backward_params *p = ctx->params;
  int64_t n = p->in.s * p->in.rope_dim;
  for (int64_t i = 0; i < heads; i++)
    ctx->isa->vaxpy(p->drope + row * n, 1.0f, group_rope(ctx, &p->in, l, i) + row * n, n);
}

/* 槽位 slot 所在的 span 里最远的末尾；不在任何 span 里返回 slot。 */
static int64_t covered_until(const dso_mla_inputs *in, int64_t row, int64_t slot) {
  int64_t reach = slot;
  for (int64_t i = 0; i < in->n_spans; i++) {
    dso_mla_place at = dso_mla_locate(in, &in->spans[i]);
    if (at.row == row && at.slot <= slot) reach = dso_max(reach, at.slot + at.kv_len);
  }
  return reach;
}

/* 行 row 从 *begin 起第一段参与过计算的槽位 [*begin, *end)；没有则返回 0。其余槽位的 dK、dV 是 0，
 * 但那里的潜变量可能从未写过：0 乘 NaN 仍是 NaN，所以不能进乘法。 */
static int next_used(const dso_mla_inputs *in, int64_t row, int64_t *begin, int64_t *end) {
  const uint8_t *mask = in->kv_mask ? in->kv_mask + row * in->kv_mask_bs : NULL;
  int64_t slot = *begin;
  while (slot < in->s && ((mask && !mask[slot]) || covered_until(in, row, slot) == slot)) slot++;
  *begin = slot;
  for (int64_t reach = slot; slot == reach && slot < in->s;) {
    reach = covered_until(in, row, slot);
    if (reach == slot) break;
    while (slot < reach && (!mask || mask[slot])) slot++;
  }
  *end = slot;
  return *begin < *end;
}

static void reduce_weight(const dso_ctx *ctx, const layout *l, int64_t first_head, int64_t task) {
  const dso_mla_backward_params *p = ctx->params;
  const dso_mla_inputs *in = &p->in;
  int64_t per_head = dso_block_count(l->kv_dim, in->rank), index = task / per_head;
  dso_block b = dso_block_at(l->kv_dim, in->rank, task % per_head);
  float *c = ctx->worker;
  memset(c, 0, (size_t)(b.mc * DSO_NB) * 4);
  for (int64_t row = 0; row < in->b; row++)
    for (int64_t begin = 0, end; next_used(in, row, &begin, &end); begin = end) {
      dso_gemm g = {.isa = ctx->isa, .fmt = l->d.fmt, .k = end - begin, .a_transposed = 1};
      g.a = (dso_mat){group_kv(ctx, in, l, index) + (row * in->s + begin) * l->kv_dim, l->kv_dim,
                      DSO_F32};
      g.b = (dso_mat){
          dso_at(in->latent, in->latent_dtype, row * in->latent_bs + begin * in->latent_ts),
          in->latent_ts, in->latent_dtype};
      dso_gemm_block(&g, b.m0, b.mc, b.n0, b.nc, c, DSO_NB, 1,
                     (char *)ctx->worker + (size_t)DSO_MB * DSO_NB * 4);
    }
  for (int64_t i = 0; i < b.mc; i++)
    memcpy(p->dkv_b + ((first_head + index) * l->kv_dim + b.m0 + i) * in->rank + b.n0,
           c + i * DSO_NB, (size_t)b.nc * 4);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_mla_inputs *in = &((const dso_mla_backward_params *)ctx->params)->in;
  layout l = layout_of(ctx->isa, in);
  if (ctx->stage == 0) {
    dso_mla_pack_weight(ctx->isa, in, &l.d, task,
                        dso_at_mut(ctx->shared, l.d.fmt, task * l.d.weight));
    return;
  }
  int64_t first = (ctx->stage - 1) / 2 * l.group, heads = heads_in(in, ctx->stage);
  if (ctx->stage % 2 == 1) {
    backward_head(ctx, &l, task / heads, first + task % heads, task % heads);
    return;
  }
  parts n = count(in, heads);
  if (task < n.latent)
    reduce_latent(ctx, &l, first, heads, task);
  else if (task < n.latent + n.rope)
    reduce_rope(ctx, &l, heads, task - n.latent);
  else
    reduce_weight(ctx, &l, first, task - n.latent - n.rope);
}

const dso_op dso_mla_prefill_backward = {"mla_prefill_backward", plan, tasks, run};
