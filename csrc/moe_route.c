/* moe_route：logits = x Wᵀ + b，打分，（分组，）选 top-k，混合权重，各专家的词元数。
 *
 * 阶段 0  词元少且 x 不是计算格式时，把 x 转成 fp32；
 * 阶段 1  logits：词元少时按专家分块做点积，W 只读一遍；词元多时按 [行块, 128 列] 打包相乘。
 *         没有 weight 时跳过；
 * 阶段 2  每任务 DSO_ROUTE_TOKENS 个词元：打分、选择、权重，一个词元的中间量都在一级缓存里；
 * 阶段 3  计数，单任务，只加 tokens * top_k 次，因此与线程数无关。
 *
 * 选择比较的是整数键：保序地由浮点换来，NaN 最大（同 torch.topk），比较永远有结果，不会越界。
 * 候选按下标递增地看，只有严格更大才替换，所以相同得分取下标小的。
 */
#include "moe_route.h"

#include <string.h>

#include "arena.h"
#include "gemm.h"

enum {
  DOT_COLUMNS = 8, /* 点积路径：至少这么多列一任务 */
  SPLIT = 8,       /* 任务数的目标：够少数几核分，又不至于反复打包 W */
  LEAST_ROWS = 96  /* 打包路径每任务至少的行数，摊薄打包 */
};

/* ---- logits ---- */

static dso_dtype format_of(const dso_isa *isa, const dso_moe_route_params *p) {
  return dso_compute_format(isa, p->x.dtype == DSO_BF16 && p->weight.dtype == DSO_BF16);
}

static int is_small(const dso_moe_route_params *p) { return p->tokens <= DSO_DOT_MAX_M; }

static int64_t dot_columns(const dso_moe_route_params *p) {
  int64_t even = dso_round_up(dso_ceil_div(p->experts, SPLIT), DOT_COLUMNS);
  return dso_min(even, dso_dot_columns(p->k, p->weight.dtype));
}

static int64_t column_blocks(const dso_moe_route_params *p) {
  return dso_ceil_div(p->experts, DSO_NB);
}

static int64_t rows_per_task(const dso_moe_route_params *p) {
  int64_t blocks = dso_ceil_div(SPLIT, column_blocks(p));
  int64_t rows = dso_max(LEAST_ROWS, dso_round_up(dso_ceil_div(p->tokens, blocks), 24));
  return dso_min(DSO_MB, rows);
}

static void add_bias(const dso_moe_route_params *p, const dso_isa *isa, float *row, int64_t n0,
                     int64_t nc) {
  if (p->logit_bias) isa->vaxpy(row, 1.0f, p->logit_bias + n0, nc);
}

static void logits_small(const dso_ctx *ctx, const dso_moe_route_params *p, int64_t task) {
  dso_dtype fmt = format_of(ctx->isa, p);
  int64_t block = dot_columns(p), n0 = task * block, nc = dso_min(block, p->experts - n0);
  int in_place = p->x.dtype == fmt;
  const dso_mat *w = &p->weight;
  float *out = p->logits + n0;
  if (p->k > 0)
    ctx->isa->dot(fmt, p->tokens, nc, p->k, in_place ? p->x.data : ctx->shared,
                  in_place ? p->x.rs : p->k, dso_at(w->data, w->dtype, n0 * w->rs), w->dtype, w->rs,
                  out, p->experts);
  for (int64_t t = 0; t < p->tokens; t++) {
    if (p->k == 0) memset(out + t * p->experts, 0, (size_t)nc * 4);
    add_bias(p, ctx->isa, out + t * p->experts, n0, nc);
  }
}

static void logits_block(const dso_ctx *ctx, const dso_moe_route_params *p, int64_t task) {
  int64_t rows = rows_per_task(p), blocks = dso_ceil_div(p->tokens, rows);
  int64_t m0 = task % blocks * rows, mc = dso_min(rows, p->tokens - m0);
  int64_t n0 = task / blocks * DSO_NB, nc = dso_min(DSO_NB, p->experts - n0);
  dso_gemm g = {.isa = ctx->isa,
                .fmt = format_of(ctx->isa, p),
                .k = p->k,
                .a = p->x,
                .b = p->weight,
                .b_transposed = 1};
  float *c = ctx->worker;
  if (p->k == 0) memset(c, 0, (size_t)(mc * DSO_NB) * 4);
  dso_gemm_block(&g, m0, mc, n0, nc, c, DSO_NB, 0, c + DSO_MB * DSO_NB);
  for (int64_t i = 0; i < mc; i++) {
    float *row = p->logits + (m0 + i) * p->experts + n0;
    memcpy(row, c + i * DSO_NB, (size_t)nc * 4);
    add_bias(p, ctx->isa, row, n0, nc);
  }
}

/* ---- 选择 ---- */

/* 保序的整数键：a < b 当且仅当键小；-0 与 +0 相同，NaN 最大。 */
static int32_t key_of(float v) {
  int32_t bits;
  if (v != v) return INT32_MAX;
  v += 0.0f; /* -0 变 +0 */
  memcpy(&bits, &v, sizeof bits);
  return bits < 0 ? bits ^ INT32_MAX : bits;
}

static float value_of(int32_t key) {
  int32_t bits = key < 0 ? key ^ INT32_MAX : key;
  float v;
  memcpy(&v, &bits, sizeof v);
  return v; /* INT32_MAX 对应的也是 NaN */
}

/* 至多 limit 个最大的，从大到小。 */
typedef struct {
  int32_t *key;
  int64_t *index;
  int64_t n, limit;
} best_list;

static void offer(best_list *best, const int32_t *key, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    if (best->n == best->limit && key[i] <= best->key[best->n - 1]) continue;
    int64_t at = best->n < best->limit ? best->n++ : best->n - 1;
    for (; at > 0 && best->key[at - 1] < key[i]; at--)
      best->key[at] = best->key[at - 1], best->index[at] = best->index[at - 1];
    best->key[at] = key[i], best->index[at] = i;
  }
}

typedef struct {
  float *score;            /* [experts] */
  int32_t *key, *best_key; /* [experts]、[max(top_k, topk_group)] */
  int32_t *group_key;      /* [n_group] */
  int64_t *group;          /* [topk_group] */
  char *open;              /* [n_group]：选中的组 */
} row_view;

static size_t row_scratch(const dso_moe_route_params *p, void *base, row_view *view) {
  const dso_route_rule *r = &p->rule;
  dso_arena arena = {base, 0};
  view->score = dso_take(&arena, (size_t)p->experts * 4);
  view->key = dso_take(&arena, (size_t)p->experts * 4);
  view->best_key = dso_take(&arena, (size_t)dso_max(r->top_k, r->topk_group) * 4);
  view->group_key = dso_take(&arena, (size_t)r->n_group * 4);
  view->group = dso_take(&arena, (size_t)r->topk_group * 8);
  view->open = dso_take(&arena, (size_t)r->n_group);
  return arena.used;
}

/* 组得分：组内最高两项之和（只有一项时就是它），或最高项。 */
static int32_t group_key(const dso_route_rule *rule, const int32_t *key, int64_t n) {
  int32_t first = INT32_MIN, second = INT32_MIN; /* 没有一个浮点的键这么小 */
  for (int64_t i = 0; i < n; i++) {
    int32_t lower = key[i] < first ? key[i] : first;
    second = lower > second ? lower : second;
    first = key[i] > first ? key[i] : first;
  }
  return rule->group_max || n < 2 ? first : key_of(value_of(first) + value_of(second));
}

static void choose(const dso_moe_route_params *p, const row_view *v, int64_t *indices) {
  const dso_route_rule *r = &p->rule;
  best_list best = {v->best_key, indices, 0, r->top_k};
  if (r->topk_group == r->n_group) {
    offer(&best, v->key, 0, p->experts);
    return;
  }
  int64_t size = p->experts / r->n_group;
  for (int64_t g = 0; g < r->n_group; g++) v->group_key[g] = group_key(r, v->key + g * size, size);
  best_list groups = {v->best_key, v->group, 0, r->topk_group};
  offer(&groups, v->group_key, 0, r->n_group);
  memset(v->open, 0, (size_t)r->n_group);
  for (int64_t i = 0; i < groups.n; i++) v->open[v->group[i]] = 1;
  for (int64_t g = 0; g < r->n_group; g++)
    if (v->open[g]) offer(&best, v->key, g * size, (g + 1) * size);
}

/* 所选的得分换成混合权重；先除后乘，与 transformers 的次序相同。 */
static void mix(const dso_isa *isa, const dso_route_rule *rule, const float *score,
                const int64_t *indices, float *weights, float *picked) {
  float sum = 0.0f;
  for (int64_t j = 0; j < rule->top_k; j++) weights[j] = score[indices[j]];
  if (rule->softmax_after) {
    memcpy(picked, weights, (size_t)rule->top_k * 4);
    dso_route_scores(isa, DSO_SCORE_SOFTMAX, picked, rule->top_k, weights);
  }
  for (int64_t j = 0; j < rule->top_k; j++) sum += weights[j];
  float divisor = rule->normalize ? sum + rule->eps : 1.0f;
  for (int64_t j = 0; j < rule->top_k; j++) weights[j] = weights[j] / divisor * rule->scaling;
}

static void route_token(const dso_ctx *ctx, const dso_moe_route_params *p, int64_t t,
                        const row_view *v) {
  const dso_route_rule *r = &p->rule;
  float *z = p->logits + t * p->experts, *score = v->score;
  int64_t *indices = p->indices + t * r->top_k;
  if (!p->has_weight) {
    ctx->isa->to_f32(z, dso_at(p->x.data, p->x.dtype, t * p->x.rs), p->x.dtype, p->experts);
    add_bias(p, ctx->isa, z, 0, p->experts);
  }
  if (r->softmax_after)
    score = z;
  else
    dso_route_scores(ctx->isa, r->score, z, p->experts, score);
  for (int64_t e = 0; e < p->experts; e++)
    v->key[e] = key_of(p->choice_bias ? score[e] + p->choice_bias[e] : score[e]);
  choose(p, v, indices);
  /* softmax_after 时 v->score 空着，借作中转 */
  mix(ctx->isa, r, score, indices, p->weights + t * r->top_k, v->score);
}

static void route_tokens(const dso_ctx *ctx, const dso_moe_route_params *p, int64_t task) {
  row_view view;
  row_scratch(p, ctx->worker, &view);
  int64_t first = task * DSO_ROUTE_TOKENS, last = dso_min(p->tokens, first + DSO_ROUTE_TOKENS);
  for (int64_t t = first; t < last; t++) route_token(ctx, p, t, &view);
}

static void count(const dso_moe_route_params *p) {
  memset(p->counts, 0, (size_t)p->experts * sizeof *p->counts);
  for (int64_t i = 0; i < p->tokens * p->rule.top_k; i++) p->counts[p->indices[i]]++;
}

/* ---- 算子 ---- */

static int converts(const dso_moe_route_params *p) {
  return p->has_weight && is_small(p) && p->x.dtype != DSO_F32;
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_moe_route_params *p = params;
  (void)isa;
  row_view view;
  size_t shared = converts(p) ? (size_t)(p->tokens * p->k) * 4 : 0;
  size_t block =
      p->has_weight && !is_small(p) ? (size_t)DSO_MB * DSO_NB * 4 + dso_gemm_scratch() : 0;
  size_t rows = row_scratch(p, NULL, &view);
  return (dso_plan){4, shared, block > rows ? block : rows, p->tokens * p->experts * (p->k + 16)};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_moe_route_params *p = params;
  if (stage == 0) return converts(p) ? p->tokens : 0;
  if (stage == 2) return dso_ceil_div(p->tokens, DSO_ROUTE_TOKENS);
  if (stage == 3) return 1;
  if (!p->has_weight || p->tokens == 0) return 0;
  if (is_small(p)) return dso_ceil_div(p->experts, dot_columns(p));
  return dso_ceil_div(p->tokens, rows_per_task(p)) * column_blocks(p);
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_moe_route_params *p = ctx->params;
  if (ctx->stage == 0) {
    if (format_of(ctx->isa, p) == DSO_F32)
      ctx->isa->to_f32((float *)ctx->shared + task * p->k,
                       dso_at(p->x.data, p->x.dtype, task * p->x.rs), p->x.dtype, p->k);
  } else if (ctx->stage == 1) {
    (is_small(p) ? logits_small : logits_block)(ctx, p, task);
  } else if (ctx->stage == 2) {
    route_tokens(ctx, p, task);
  } else {
    count(p);
  }
}

const dso_op dso_moe_route = {"moe_route", plan, tasks, run};
