/* sample_filter：重复惩罚、温度、top-k、top-p、min-p、softmax，次序与取舍同 transformers 的 LogitsProcessorList，
 * 每任务一个位置，不排序。
 *
 * 分数写在输出的那一行里（probs 是 fp32 的 [V]，正好作中转），每 BLOCK 个记一个最大值：
 *   top-k  各块最大值里第 k 大的不大于全体第 k 大的，所以只有最大值不小于它的块要看，其中的候选才细找；
 *   top-p  概率不大于 (1 - p) / 2V 的加起来到不了 1 - p，必然去掉，先筛掉；其余按键的直方图细找；
 * “细找”是基数选择：键的高 11 位、中 11 位、低 10 位各统计一遍，找到最后一个保留的值。
 *
 * 相同的分数：top-k 全部保留；top-p 只保留下标大的几个（升序稳定排序里靠后的），个数与 transformers 相同。
 */
#include <float.h>
#include <math.h>
#include <string.h>

#include "arena.h"
#include "isa/convert.h"
#include "sample.h"

enum {
  BLOCK = 64,    /* 每块的元素数：块数要比常用的 k 大得多，又不至于让求最大值的调用占去时间 */
  BINS = 1 << 11 /* 直方图的格数 */
};

typedef struct {
  int64_t n;
  int32_t *index; /* 递增 */
  float *score, *prob;
} candidates;

typedef struct {
  unsigned char *seen; /* [⌈V / 8⌉] 位：已惩罚 */
  float *top;          /* [⌈V / BLOCK⌉] 各块的最大值 */
  candidates c;
  int64_t *count; /* [BINS] */
  double *mass;   /* [BINS] */
} view;

static size_t lay_out(int64_t vocab, void *base, view *v) {
  dso_arena arena = {base, 0};
  v->seen = dso_take(&arena, (size_t)dso_ceil_div(vocab, 8));
  v->top = dso_take(&arena, (size_t)dso_ceil_div(vocab, BLOCK) * sizeof(float));
  v->c.index = dso_take(&arena, (size_t)vocab * sizeof(int32_t));
  v->c.score = dso_take(&arena, (size_t)vocab * sizeof(float));
  v->c.prob = dso_take(&arena, (size_t)vocab * sizeof(float));
  v->count = dso_take(&arena, BINS * sizeof(int64_t));
  v->mass = dso_take(&arena, BINS * sizeof(double));
  return arena.used;
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_sample_filter_params *p = params;
  (void)isa;
  view v;
  return (dso_plan){1, 0, lay_out(p->vocab, NULL, &v), 16 * p->rows * p->positions * p->vocab};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_sample_filter_params *p = params;
  (void)stage;
  return p->rows * p->positions;
}

/* ---- 分数 ---- */

static void penalize(const dso_sample_filter_params *p, int64_t task, float *s,
                     unsigned char *seen) {
  if (!p->token || p->penalty == 1.0f) return;
  memset(seen, 0, (size_t)dso_ceil_div(p->vocab, 8));
  const int64_t *token = p->token + task / p->positions * p->token_rs;
  int64_t count = p->token_len ? p->token_len[task] : p->tokens;
  for (int64_t j = 0; j < count; j++) {
    int64_t t = token[j];
    if (t < 0 || t >= p->vocab || (seen[t / 8] >> (t % 8) & 1)) continue;
    seen[t / 8] |= (unsigned char)(1 << (t % 8));
    s[t] = s[t] < 0.0f ? s[t] * p->penalty : s[t] / p->penalty;
  }
}

/* 分数写到 s，各块的最大值写到 v->top；有 NaN、+inf，或全是 -inf 时返回 0。 */
static int scores(const dso_ctx *ctx, int64_t task, float *s, const view *v) {
  const dso_sample_filter_params *p = ctx->params;
  const dso_positions *x = &p->logits;
  int64_t at = task / p->positions * x->rs + task % p->positions * x->ps;
  ctx->isa->to_f32(s, dso_at(x->data, x->dtype, at), x->dtype, p->vocab);
  penalize(p, task, s, v->seen);
  for (int64_t i = 0; p->temperature != 1.0f && i < p->vocab; i++) s[i] /= p->temperature;
  int64_t blocks = dso_ceil_div(p->vocab, BLOCK);
  for (int64_t b = 0; b < blocks; b++)
    v->top[b] = ctx->isa->vmax(s + b * BLOCK, dso_min(BLOCK, p->vocab - b * BLOCK));
  float best = ctx->isa->vmax(v->top, blocks);
  return best >= -FLT_MAX && best <= FLT_MAX;
}

/* ---- 细找 ---- */

/* 从大到小看，已有 count 个、质量 above 时，下一个保留与否。 */
typedef struct {
  double total, threshold;
  int64_t least;
} keep_rule;

static int keeps(const keep_rule *r, double above, int64_t count) {
  return count < r->least || (float)(r->total - above) > r->threshold;
}

/* 保留大于 value 的，与等于它的（去掉其中下标最小的 skip 个）。 */
typedef struct {
  float value;
  int64_t skip;
} edge;

/* 保序的整数键；-0 与 +0 相同。 */
static uint32_t key_of(float v) {
  uint32_t bits = dso_f32_bits(v + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static float value_of(uint32_t key) { return dso_bits_f32(key >> 31 ? key & 0x7fffffffu : ~key); }

typedef struct {
  uint32_t prefix;
  double above;  /* 键更大的质量 */
  int64_t count; /* 键更大的个数 */
} progress;

/* 在键的前缀是 at->prefix 的元素里，按接下来的 bits 位找到边界所在的格。 */
static void narrow(const float *score, const float *prob, int64_t n, const keep_rule *rule,
                   const view *v, int shift, int bits, progress *at) {
  memset(v->count, 0, BINS * sizeof *v->count);
  memset(v->mass, 0, BINS * sizeof *v->mass);
  uint32_t mask = (1u << bits) - 1;
  for (int64_t i = 0; i < n; i++) {
    uint32_t key = key_of(score[i]) >> shift;
    if (shift + bits < 32 && key >> bits != at->prefix) continue;
    v->count[key & mask]++;
    v->mass[key & mask] += prob ? prob[i] : 0.0f;
  }
  uint32_t chosen = 0;
  double above = at->above;
  int64_t count = at->count;
  for (uint32_t b = mask + 1; b-- > 0;) {
    if (v->count[b] == 0) continue;
    chosen = b, at->above = above, at->count = count;
    above += v->mass[b], count += v->count[b];
    if (!keeps(rule, above, count)) break;
  }
  at->prefix = at->prefix << bits | chosen;
}

/* prob 可为 NULL（规则不看质量）；n > 0。 */
static edge find_edge(const float *score, const float *prob, int64_t n, const keep_rule *rule,
                      const view *v) {
  progress at = {0, 0.0, 0};
  narrow(score, prob, n, rule, v, 21, 11, &at);
  narrow(score, prob, n, rule, v, 10, 11, &at);
  narrow(score, prob, n, rule, v, 0, 10, &at);
  int64_t ties = v->count[at.prefix & 1023], kept = 1;
  double each = v->mass[at.prefix & 1023] / (double)ties;
  while (kept < ties && keeps(rule, at.above + (double)kept * each, at.count + kept)) kept++;
  return (edge){value_of(at.prefix), ties - kept};
}

/* ---- 三种筛选 ---- */

static void keep_one(candidates *c, int64_t n, int64_t i) {
  c->index[n] = c->index[i], c->score[n] = c->score[i], c->prob[n] = c->prob[i];
}

static void keep_edge(candidates *c, edge e) {
  int64_t n = 0;
  for (int64_t i = 0; i < c->n; i++)
    if (c->score[i] > e.value || (c->score[i] == e.value && e.skip-- <= 0)) keep_one(c, n++, i);
  c->n = n;
}

static void keep_above(candidates *c, double least, int inclusive) {
  int64_t n = 0;
  for (int64_t i = 0; i < c->n; i++)
    if (c->prob[i] > least || (inclusive && c->prob[i] == least)) keep_one(c, n++, i);
  c->n = n;
}

static void softmax(const dso_isa *isa, const float *score, float *prob, int64_t n) {
  float top = -INFINITY, sum = 0.0f;
  isa->softmax_row(score, n, n, 1.0f, &top, &sum, prob, DSO_F32);
  isa->vscale(prob, (float)(1.0 / dso_sum(prob, n)), n); /* sum 是 fp32 累加的，n 大时不够准 */
}

static void take_top_k(const dso_sample_filter_params *p, const float *s, view *v) {
  int64_t blocks = dso_ceil_div(p->vocab, BLOCK), n = 0;
  int limited = p->top_k > 0 && p->top_k < p->vocab;
  keep_rule rule = {0.0, INFINITY, p->top_k};
  float bound = -INFINITY;
  if (limited && p->top_k < blocks) bound = find_edge(v->top, NULL, blocks, &rule, v).value;
  for (int64_t b = 0; b < blocks; b++) {
    if (v->top[b] < bound) continue;
    for (int64_t i = b * BLOCK; i < dso_min(p->vocab, (b + 1) * BLOCK); i++)
      if (s[i] >= bound) v->c.index[n] = (int32_t)i, v->c.score[n++] = s[i];
  }
  v->c.n = n;
  memset(v->c.prob, 0, (size_t)n * sizeof(float));
  if (limited) keep_edge(&v->c, (edge){find_edge(v->c.score, NULL, n, &rule, v).value, 0});
}

static void take_top_p(const dso_sample_filter_params *p, view *v) {
  candidates *c = &v->c;
  keep_rule rule = {dso_sum(c->prob, c->n), (float)(1.0 - p->top_p), 1};
  keep_above(c, 0.5 * (1.0 - p->top_p) / (double)p->vocab, 0);
  keep_edge(c, find_edge(c->score, c->prob, c->n, &rule, v));
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_sample_filter_params *p = ctx->params;
  const dso_isa *isa = ctx->isa;
  view v;
  lay_out(p->vocab, ctx->worker, &v);
  candidates *c = &v.c;
  float *out = p->probs + task * p->vocab;
  int valid = scores(ctx, task, out, &v), top_p = p->top_p < 1.0, min_p = p->min_p > 0.0f;
  p->fault[task] = !valid;
  if (!valid) return;
  if (!top_p && !min_p && (p->top_k == 0 || p->top_k >= p->vocab)) {
    softmax(isa, out, out, p->vocab);
    return;
  }
  take_top_k(p, out, &v);
  softmax(isa, c->score, c->prob, c->n);
  if (top_p) {
    take_top_p(p, &v);
    softmax(isa, c->score, c->prob, c->n);
  }
  if (min_p) {
    keep_above(c, p->min_p * isa->vmax(c->prob, c->n), 1);
    softmax(isa, c->score, c->prob, c->n);
  }
  memset(out, 0, (size_t)p->vocab * sizeof(float));
  for (int64_t i = 0; i < c->n; i++) out[c->index[i]] = c->prob[i];
}

const dso_op dso_sample_filter = {"sample_filter", plan, tasks, run};
