/* moe_route 与反向：logits 与 double 的乘积比较；选择、权重、梯度由算子自己的 logits 出发，
 * 在 double 里核对（选择是离散的，不能要求近乎平局的两个专家次序相同）。 */
#include <stdio.h>
#include <string.h>

#include "harness.h"

enum { SPARE = 3 };
static const double SLACK = 1e-5; /* 这么近的两个得分，先后都对 */

typedef struct {
  int64_t tokens, k, experts;
  dso_route_rule rule;
  int bias, choice, weight;
} route;

/* int64 的缓冲：借两个 fp32 的位置，逐位比较不受影响。 */
static buf new_longs(int64_t n) { return new_buf(DSO_F32, 2 * n); }
static int64_t *longs(const buf *b) { return b->data; }

static void double_scores(const dso_route_rule *r, const double *z, int64_t n, double *s) {
  double top = -INFINITY, sum = 0.0;
  for (int64_t i = 0; i < n; i++) top = fmax(top, z[i]);
  for (int64_t i = 0; i < n; i++) sum += exp(z[i] - top);
  for (int64_t i = 0; i < n; i++) {
    if (r->score == DSO_SCORE_SOFTMAX) s[i] = exp(z[i] - top) / sum;
    if (r->score == DSO_SCORE_SIGMOID) s[i] = 1.0 / (1.0 + exp(-z[i]));
    if (r->score == DSO_SCORE_SQRTSOFTPLUS) s[i] = sqrt(log1p(exp(z[i])));
  }
}

static double group_score(const dso_route_rule *r, const double *choice, int64_t size) {
  double first = -INFINITY, second = -INFINITY;
  for (int64_t i = 0; i < size; i++) {
    second = fmax(second, fmin(first, choice[i]));
    first = fmax(first, choice[i]);
  }
  return r->group_max || size < 2 ? first : first + second;
}

/* 第 i 个之外，得分明显高于它的有几个。 */
static int64_t better(const double *v, int64_t n, int64_t i) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; j++) count += v[j] > v[i] + SLACK;
  return count;
}

/* 选中的：下标合法、不重复、从高到低；组是最高的几组之一，组内没有更高的落选。 */
static int selection_is_right(const route *c, const double *choice, const int64_t *index,
                              double *groups, double *allowed) {
  const dso_route_rule *r = &c->rule;
  int64_t size = c->experts / r->n_group;
  for (int64_t g = 0; g < r->n_group; g++) groups[g] = group_score(r, choice + g * size, size);
  for (int64_t e = 0; e < c->experts; e++) allowed[e] = -INFINITY;
  for (int64_t j = 0; j < r->top_k; j++) {
    if (index[j] < 0 || index[j] >= c->experts) return 0;
    if (j > 0 && choice[index[j]] > choice[index[j - 1]] + SLACK) return 0;
    for (int64_t i = 0; i < j; i++)
      if (index[i] == index[j]) return 0;
    int64_t g = index[j] / size;
    if (better(groups, r->n_group, g) >= r->topk_group) return 0;
    memcpy(allowed + g * size, choice + g * size, (size_t)size * sizeof *allowed);
  }
  for (int64_t j = 0; j < r->top_k; j++)
    if (better(allowed, c->experts, index[j]) >= r->top_k) return 0;
  return 1;
}

/* 一个词元的权重，以及 Σ g_j w_j 对 logits 的梯度（累加进 grad），由定义逐项求。 */
static void token_double(const route *c, const double *z, const double *s, const int64_t *index,
                         const double *g, double *w, double *grad) {
  const dso_route_rule *r = &c->rule;
  double sum = 0.0, common = 0.0, inner = 0.0;
  for (int64_t j = 0; j < r->top_k; j++) sum += w[j];
  double divisor = r->normalize ? sum + (double)r->eps : 1.0;
  for (int64_t j = 0; j < r->top_k; j++) common += g[j] * w[j] / divisor;
  for (int64_t j = 0; j < r->top_k; j++) {
    double ds = (double)r->scaling * (g[j] - (r->normalize ? common : 0.0)) / divisor;
    double v = z[index[j]], p = w[j];
    inner += ds * p;
    if (r->score == DSO_SCORE_SOFTMAX) grad[index[j]] += ds * p;
    if (r->score == DSO_SCORE_SIGMOID) grad[index[j]] += ds * p * (1.0 - p);
    if (r->score == DSO_SCORE_SQRTSOFTPLUS) grad[index[j]] += ds / (2.0 * p) / (1.0 + exp(-v));
  }
  if (r->score == DSO_SCORE_SOFTMAX && !r->softmax_after)
    for (int64_t e = 0; e < c->experts; e++) grad[e] -= inner * s[e];
  if (r->softmax_after)
    for (int64_t j = 0; j < r->top_k; j++) grad[index[j]] -= inner * w[j];
  for (int64_t j = 0; j < r->top_k; j++) w[j] *= (double)r->scaling / divisor;
}

static void check_tokens(const char *label, const route *c, const buf *logits, const buf *index,
                         const buf *choice, const buf *g, double *w, double *grad) {
  const dso_route_rule *r = &c->rule;
  int64_t n = c->experts, top_k = r->top_k, wrong = 0;
  double *z = doubles(n), *s = doubles(n), *by = doubles(n), *groups = doubles(r->n_group),
         *allowed = doubles(n), *gd = doubles(top_k);
  for (int64_t t = 0; t < c->tokens; t++) {
    const int64_t *at = longs(index) + t * top_k;
    for (int64_t e = 0; e < n; e++) z[e] = get(logits, t * n + e);
    double_scores(r, z, n, s);
    for (int64_t e = 0; e < n; e++)
      by[e] = (r->softmax_after ? z[e] : s[e]) + (c->choice ? get(choice, e) : 0.0);
    if (!selection_is_right(c, by, at, groups, allowed)) {
      wrong++;
      continue;
    }
    double *mine = w + t * top_k;
    for (int64_t j = 0; j < top_k; j++) {
      mine[j] = r->softmax_after ? z[at[j]] : s[at[j]];
      gd[j] = get(g, t * top_k + j);
    }
    if (r->softmax_after) {
      memcpy(allowed, mine, (size_t)top_k * sizeof *mine);
      double_scores(r, allowed, top_k, mine);
    }
    token_double(c, z, s, at, gd, mine, grad + t * n);
  }
  check(wrong == 0, "%s：%lld 个词元的选择不对", label, (long long)wrong);
}

static void check_counts(const char *label, const route *c, const buf *index, const buf *counts) {
  int64_t wrong = 0;
  for (int64_t e = 0; e < c->experts; e++) {
    int64_t n = 0;
    for (int64_t i = 0; i < c->tokens * c->rule.top_k; i++) n += longs(index)[i] == e;
    wrong += longs(counts)[e] != n;
  }
  check(wrong == 0, "%s：%lld 个专家的计数不对", label, (long long)wrong);
}

static void route_case(const dso_isa *isa, dso_dtype type, dso_dtype w_type, const route *c) {
  char label[128];
  const dso_route_rule *r = &c->rule;
  snprintf(label, sizeof label,
           "%s moe_route %s/%s [%lld, %lld, %lld] 打分 %d 前 %lld 组 %lld/%lld", isa->name,
           dtype_name(type), dtype_name(w_type), (long long)c->tokens, (long long)c->k,
           (long long)c->experts, (int)r->score, (long long)r->top_k, (long long)r->topk_group,
           (long long)r->n_group);
  int64_t k = c->weight ? c->k : c->experts, n = c->experts, rs = k + random_below(SPARE);
  buf x = new_random(type, dso_max(0, (c->tokens - 1) * rs + k), 1.0);
  buf w = new_random(w_type, n * k, 1.0 / sqrt((double)k + 1.0));
  buf bias = new_random(DSO_F32, n, 1.0), choice = new_random(DSO_F32, n, 0.1);
  buf logits = new_buf(DSO_F32, c->tokens * n), weights = new_buf(DSO_F32, c->tokens * r->top_k);
  buf index = new_longs(c->tokens * r->top_k), counts = new_longs(n),
      *outs[] = {&logits, &weights, &index, &counts};
  dso_moe_route_params p = {.tokens = c->tokens, .k = k, .experts = n, .has_weight = c->weight};
  p.x = (dso_mat){x.data, rs, type}, p.weight = (dso_mat){w.data, k, w_type}, p.rule = *r;
  p.logit_bias = c->bias ? bias.data : NULL, p.choice_bias = c->choice ? choice.data : NULL;
  p.logits = logits.data, p.weights = weights.data, p.indices = index.data, p.counts = counts.data;
  execute(label, &dso_moe_route, &p, isa, outs, 4);
  double *want = doubles(c->tokens * n);
  for (int64_t i = 0; i < c->tokens * n; i++) {
    want[i] = c->bias ? get(&bias, i % n) : 0.0;
    if (!c->weight) want[i] += get(&x, i / n * rs + i % n);
    for (int64_t j = 0; c->weight && j < k; j++)
      want[i] += get(&x, i / n * rs + j) * get(&w, i % n * k + j);
  }
  check_close(label, &logits, want, tolerance(DSO_F32), 1.0);
  check_counts(label, c, &index, &counts);

  buf g = new_random(DSO_F32, c->tokens * r->top_k, 1.0),
      gl = new_random(DSO_F32, c->tokens * n, 1.0);
  buf out = new_buf(DSO_F32, c->tokens * n), *grads[] = {&out};
  dso_moe_route_backward_params q = {
      c->tokens, n, *r, logits.data, index.data, c->bias ? gl.data : NULL, g.data, out.data};
  execute(label, &dso_moe_route_backward, &q, isa, grads, 1);
  double *mixed = doubles(c->tokens * r->top_k), *grad = doubles(c->tokens * n);
  for (int64_t i = 0; c->bias && i < c->tokens * n; i++) grad[i] = get(&gl, i);
  check_tokens(label, c, &logits, &index, &choice, &g, mixed, grad);
  check_close(label, &weights, mixed, tolerance(DSO_F32), 1.0);
  check_close(label, &out, grad, tolerance(DSO_F32), 1.0 + (double)r->scaling);
  free_all();
}

/* 平局取下标小的；NaN、无穷、-0：下标合法且不重复。 */
static void odd_case(const dso_isa *isa, dso_score score, int64_t n_group) {
  enum { T = 6, E = 24, K = 5 };
  static const float fill[T] = {0.0f, -0.0f, NAN, INFINITY, -INFINITY, 1.0f};
  float z[T * E], weights[T * K], logits[T * E];
  int64_t index[T * K], counts[E], wrong = 0, total = 0;
  for (int64_t i = 0; i < T * E; i++) z[i] = i % 2 ? fill[i / E] : fill[i / E] + 0.0f;
  z[5 * E + 3] = NAN, z[5 * E + 9] = INFINITY, z[5 * E + 1] = -INFINITY;
  dso_route_rule rule = {score, 1, 0, 0, K, n_group, (n_group + 1) / 2, 1.0f, 1e-20f};
  dso_moe_route_params p = {.tokens = T, .k = E, .experts = E, .rule = rule};
  p.x = (dso_mat){z, E, DSO_F32}, p.logits = logits, p.weights = weights, p.indices = index,
  p.counts = counts;
  execute("特殊的得分", &dso_moe_route, &p, isa, NULL, 0);
  for (int64_t t = 0; t < T; t++)
    for (int64_t j = 0; j < K; j++) {
      int64_t at = index[t * K + j];
      wrong += at < 0 || at >= E || (t < 5 && at != j);
      for (int64_t i = 0; i < j; i++) wrong += index[t * K + i] == at;
    }
  for (int64_t e = 0; e < E; e++) total += counts[e];
  check(wrong == 0 && total == T * K, "%s moe_route 特殊的得分：%lld 处不对", isa->name,
        (long long)wrong);
}

static route random_route(int64_t tokens, int64_t k) {
  int64_t groups = 1 + random_below(5), size = 1 + random_below(12);
  route c = {tokens, k, groups * size, {0}, 0, 0, random_below(4) > 0};
  c.bias = (int)random_below(2), c.choice = (int)random_below(2);
  dso_route_rule *r = &c.rule;
  r->score = (dso_score)random_below(3), r->normalize = (int)random_below(2);
  r->softmax_after = r->score == DSO_SCORE_SOFTMAX && random_below(2);
  r->group_max = (int)random_below(2), r->n_group = groups;
  r->topk_group = 1 + random_below(groups), r->top_k = 1 + random_below(r->topk_group * size);
  r->scaling = 1.0f + (float)random_below(3) * 0.75f, r->eps = 1e-20f;
  return c;
}

void test_moe_route(void) {
  static const dso_dtype pairs[][2] = {{DSO_F32, DSO_F32},
                                       {DSO_BF16, DSO_BF16},
                                       {DSO_F16, DSO_F16},
                                       {DSO_F32, DSO_BF16},
                                       {DSO_BF16, DSO_F32}};
  static const dso_route_rule v3 = {DSO_SCORE_SIGMOID, 1, 0, 0, 8, 8, 4, 2.5f, 1e-20f};
  const dso_isa *isas[8];
  int n = list_isas(isas, 8);
  for (int i = 0; i < n; i++) {
    for (int t = 0; t < 5; t++) {
      for (int64_t tokens = 0; tokens < 130; tokens += 1 + random_below(30)) {
        route c = random_route(tokens, random_below(70));
        route_case(isas[i], pairs[t][0], pairs[t][1], &c);
      }
      route big = {t % 2 ? 3 : 101, 33, 256, v3, 1, 1, 1};
      route_case(isas[i], pairs[t][0], pairs[t][1], &big);
    }
    for (int score = 0; score < 3; score++)
      for (int64_t groups = 1; groups < 4; groups++) odd_case(isas[i], (dso_score)score, groups);
  }
}
