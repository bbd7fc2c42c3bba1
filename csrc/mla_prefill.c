/* 展开式 MLA 注意力（预填充与训练的前向）：K、V 只按块展开在暂存里，从不整体成形，
 * 也没有 S x S 的得分。
 *
 * 阶段 0  每个头的上投影权重打包一次；
 * 阶段 1  每任务一个（span，查询段，头）：外层逐块展开键，内层逐查询块做在线 softmax。
 *
 * 每个查询的计算顺序只取决于键块，与任务划分、线程数无关，因此结果逐位确定。
 */
#include "mla_prefill.h"

enum {
  SEGMENT =
      4096, /* 每任务的查询数上限：输出状态 4096 x dv fp32；更大则展开被摊得更薄，但暂存更大 */
  TILE = 48 /* 一个查询块：6 与 8 的公倍数，得分块 48 x 256 fp32 */
};

static int64_t segments_of(const dso_mla_place *at) { return dso_ceil_div(at->q_len, SEGMENT); }

typedef struct {
  void *keys_t, *values; /* 打包的键 [kv/16][qk][16]、值 [dv/16][kv][16] */
  void *keys;            /* 转换后的潜变量块 */
  float *rows;           /* 展开的小块 [DSO_EXPAND_ROWS, kv16] */
  void *q;               /* [TILE, qk] */
  float *scores;         /* [TILE, DSO_KV_CHUNK] */
  void *p;               /* 同形，计算格式 */
  float *o, *m, *l;      /* [段内查询, v16]、[段内查询] */
} worker_view;

static int64_t longest(const dso_mla_inputs *in) {
  int64_t best = 0;
  for (int64_t i = 0; i < in->n_spans; i++)
    best = dso_max(best, in->spans[i].q_end - in->spans[i].q_begin);
  return dso_min(best, SEGMENT);
}

static worker_view worker_of(const dso_mla_inputs *in, const dso_mla_dims *d, dso_arena *arena) {
  int64_t state = longest(in), size = dso_size_of(d->fmt);
  worker_view w;
  w.keys_t = dso_take(arena, (size_t)(DSO_KV_CHUNK * d->qk * size));
  w.values = dso_take(arena, (size_t)(d->v16 * DSO_KV_CHUNK * size));
  w.keys = dso_take(arena, dso_mla_keys_bytes(in, DSO_EXPAND_ROWS));
  w.rows = dso_take(arena, (size_t)(DSO_EXPAND_ROWS * dso_max(d->kv16, d->qk)) * 4);
  w.q = dso_take(arena, (size_t)(TILE * d->qk * size));
  w.scores = dso_take(arena, (size_t)(TILE * DSO_KV_CHUNK) * 4);
  w.p = dso_take(arena, (size_t)(TILE * DSO_KV_CHUNK * size));
  w.o = dso_take(arena, (size_t)(state * d->v16) * 4);
  w.m = dso_take(arena, (size_t)state * 4);
  w.l = dso_take(arena, (size_t)state * 4);
  return w;
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_mla_inputs *in = &((const dso_mla_params *)params)->in;
  dso_mla_dims d = dso_mla_dims_of(isa, in);
  dso_arena worker = {0};
  worker_of(in, &d, &worker);
  return (dso_plan){2, (size_t)(in->heads * d.weight * dso_size_of(d.fmt)), worker.used, 0};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_mla_inputs *in = &((const dso_mla_params *)params)->in;
  if (stage == 0) return in->heads;
  int64_t total = 0;
  for (int64_t i = 0; i < in->n_spans; i++) {
    dso_mla_place at = dso_mla_locate(in, &in->spans[i]);
    total += segments_of(&at) * in->heads;
  }
  return total;
}

/* 展开键 [chunk, chunk + n)（span 内），写成打包的键与值。 */
static void expand_chunk(const dso_ctx *ctx, const dso_mla_dims *d, const dso_mla_place *at,
                         const void *weight, int64_t chunk, int64_t n, worker_view *w) {
  const dso_mla_inputs *in = &((const dso_mla_params *)ctx->params)->in;
  const dso_isa *isa = ctx->isa;
  int64_t key_stride = d->qk * DSO_PANEL, value_stride = (int64_t)DSO_KV_CHUNK * DSO_PANEL;
  for (int64_t i = 0; i < n; i += DSO_EXPAND_ROWS) {
    int64_t rows = dso_min(DSO_EXPAND_ROWS, n - i);
    dso_mla_keys keys =
        dso_mla_load_keys(isa, in, d->fmt, at->row, at->slot + chunk + i, rows, w->keys);
    dso_mla_expand(isa, in, d, &keys, weight, rows, w->rows);
    void *panel = dso_at_mut(w->keys_t, d->fmt, i / DSO_PANEL * key_stride);
    isa->pack_t(panel, d->fmt, key_stride, w->rows, DSO_F32, d->kv16, rows, in->nope_dim);
    if (in->rope_dim > 0)
      isa->pack_t(dso_at_mut(panel, d->fmt, d->nope * DSO_PANEL), d->fmt, key_stride, keys.rope,
                  d->fmt, keys.rope_rs, rows, in->rope_dim);
    isa->pack_n(dso_at_mut(w->values, d->fmt, i * DSO_PANEL), d->fmt, value_stride,
                w->rows + in->nope_dim, DSO_F32, d->kv16, in->v_dim, rows);
  }
}

/* 查询块 [first, first + n)（span 内）看键块 [chunk, chunk + count)。 */
static void attend_tile(const dso_ctx *ctx, const dso_mla_dims *d, const dso_span *span,
                        const dso_mla_place *at, int64_t head, int64_t base, int64_t first,
                        int64_t n, int64_t chunk, int64_t count, worker_view *w) {
  const dso_mla_inputs *in = &((const dso_mla_params *)ctx->params)->in;
  const dso_isa *isa = ctx->isa;
  int64_t seen = dso_min(count, dso_mla_visible(in, at, first + n - 1) - chunk);
  if (seen <= 0) return;
  int64_t depth = dso_mla_pad(d->fmt, seen), state = first - base;
  dso_mla_copy_queries(isa, in, d, span->q_begin + first, n, head, w->q, w->rows);
  isa->gemm(d->fmt, n, dso_ceil_div(seen, DSO_PANEL), d->qk, w->q, d->qk, w->keys_t,
            d->qk * DSO_PANEL, w->scores, DSO_KV_CHUNK, 0);
  for (int64_t i = 0; i < n; i++) {
    float *row = w->scores + i * DSO_KV_CHUNK;
    int64_t own = dso_max(0, dso_min(seen, dso_mla_visible(in, at, first + i) - chunk));
    dso_mla_hide(in, at->row, at->slot + chunk, row, own);
    float keep =
        isa->softmax_row(row, own, depth, in->softmax_scale, &w->m[state + i], &w->l[state + i],
                         dso_at_mut(w->p, d->fmt, i * DSO_KV_CHUNK), d->fmt);
    if (keep != 1.0f) isa->vscale(w->o + (state + i) * d->v16, keep, d->v16);
  }
  isa->gemm(d->fmt, n, d->v16 / DSO_PANEL, depth, w->p, DSO_KV_CHUNK, w->values,
            (int64_t)DSO_KV_CHUNK * DSO_PANEL, w->o + state * d->v16, d->v16, 1);
}

static void store(const dso_ctx *ctx, const dso_mla_dims *d, const dso_span *span, int64_t head,
                  int64_t base, int64_t n, worker_view *w) {
  const dso_mla_params *p = ctx->params;
  const dso_mla_inputs *in = &p->in;
  for (int64_t i = 0; i < n; i++) {
    int64_t at = (span->q_begin + base + i) * in->heads + head;
    float *o = w->o + i * d->v16, sum = w->l[i];
    if (sum != 0.0f) ctx->isa->vscale(o, 1.0f / sum, in->v_dim);
    ctx->isa->from_f32(dso_at_mut(p->out, in->q_dtype, at * in->v_dim), in->q_dtype, o, in->v_dim);
    p->lse[at] = sum != 0.0f ? w->m[i] + logf(sum) : -INFINITY;
  }
}

static void attend(const dso_ctx *ctx, const dso_mla_dims *d, const dso_span *span,
                   const dso_mla_place *at, int64_t base, int64_t head) {
  const dso_mla_inputs *in = &((const dso_mla_params *)ctx->params)->in;
  dso_arena arena = {ctx->worker, 0};
  worker_view w = worker_of(in, d, &arena);
  int64_t end = dso_min(at->q_len, base + SEGMENT), kv_end = dso_mla_visible(in, at, end - 1);
  const void *weight = dso_at(ctx->shared, d->fmt, head * d->weight);
  memset(w.o, 0, (size_t)((end - base) * d->v16) * 4);
  for (int64_t i = 0; i < end - base; i++) w.m[i] = -INFINITY, w.l[i] = 0.0f;
  for (int64_t chunk = 0; chunk < kv_end; chunk += DSO_KV_CHUNK) {
    int64_t count = dso_min(DSO_KV_CHUNK, kv_end - chunk);
    expand_chunk(ctx, d, at, weight, chunk, count, &w);
    for (int64_t first = base; first < end; first += TILE)
      attend_tile(ctx, d, span, at, head, base, first, dso_min(TILE, end - first), chunk, count,
                  &w);
  }
  store(ctx, d, span, head, base, end - base, &w);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_mla_inputs *in = &((const dso_mla_params *)ctx->params)->in;
  dso_mla_dims d = dso_mla_dims_of(ctx->isa, in);
  if (ctx->stage == 0) {
    dso_mla_pack_weight(ctx->isa, in, &d, task, dso_at_mut(ctx->shared, d.fmt, task * d.weight));
    return;
  }
  for (int64_t i = 0;; i++) {
    dso_mla_place at = dso_mla_locate(in, &in->spans[i]);
    int64_t own = segments_of(&at) * in->heads;
    if (task >= own) {
      task -= own;
      continue;
    }
    int64_t segment = segments_of(&at) - 1 - task / in->heads; /* 靠后的段看得多、耗时长，先做 */
    attend(ctx, &d, &in->spans[i], &at, segment * SEGMENT, task % in->heads);
    return;
  }
}

const dso_op dso_mla_prefill = {"mla_prefill", plan, tasks, run};
