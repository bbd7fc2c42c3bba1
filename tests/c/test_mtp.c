/* mtp_draft_head、mtp_verify_greedy、mtp_verify_sample、mtp_input、sample_filter、sample_tokens：与直白写法比较。 */
#include <stdio.h>
#include <string.h>

#include "harness.h"

static const dso_dtype FLOATS[] = {DSO_F32, DSO_BF16, DSO_F16};
enum { MOST = 256 }; /* 整数缓冲的元素数上限 */

/* 整数的输出也交给 execute 逐位比较：每个 int64 当作八个字节。 */
static buf bytes_of(int64_t *data, int64_t n) { return (buf){n * 8, DSO_I8, data}; }

/* ---- 核对 ---- */

typedef struct {
  int64_t r, d, v, rs, ps; /* rs、ps：logits 的步长 */
  int64_t draft[MOST], len[MOST], accepted[MOST], next[MOST];
} chain;

static void new_chain(chain *c, int64_t vocab) {
  c->r = random_below(5), c->d = random_below(5), c->v = vocab;
  c->ps = vocab + random_below(3), c->rs = c->ps * (c->d + 1) + random_below(3);
  for (int64_t i = 0; i < c->r * c->d; i++) c->draft[i] = random_below(vocab);
  for (int64_t i = 0; i < c->r; i++) c->len[i] = random_below(c->d + 1);
}

static dso_mtp_rows rows_of(chain *c) {
  return (dso_mtp_rows){c->r, c->d, c->v, c->draft, c->len, c->accepted, c->next};
}

static int64_t best_of(const buf *x, int64_t from, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 0; i < n; i++) {
    if (isnan(get(x, from + i))) return -1;
    if (get(x, from + i) > get(x, from + best)) best = i;
  }
  return best;
}

static void greedy_case(const dso_isa *isa, dso_dtype type, int64_t vocab, int nan) {
  chain c;
  new_chain(&c, vocab);
  buf x = new_random(type, c.r * c.rs + c.d * c.ps + vocab, 1.0);
  for (int64_t i = 0; i < x.n; i++) put(&x, i, floor(get(&x, i) * 2.0)); /* 常有相同的最大值 */
  for (int64_t i = 0; nan && i < 1 + x.n / 40; i++) put(&x, random_below(x.n), NAN);
  for (int64_t r = 0; r < c.r; r++)
    for (int64_t i = 0; i < c.d; i++) { /* 多半接受 */
      int64_t best = best_of(&x, r * c.rs + i * c.ps, vocab);
      if (random_below(4) && best >= 0) c.draft[r * c.d + i] = best;
    }
  dso_mtp_verify_greedy_params p = {rows_of(&c), {x.data, c.rs, c.ps, type}};
  buf a = bytes_of(c.accepted, c.r), b = bytes_of(c.next, c.r), *outs[] = {&a, &b};
  memset(c.accepted, 0, sizeof c.accepted), memset(c.next, 0, sizeof c.next);
  execute("贪心", &dso_mtp_verify_greedy, &p, isa, outs, 2);
  for (int64_t r = 0; r < c.r; r++) {
    int64_t n = 0, best;
    while ((best = best_of(&x, r * c.rs + n * c.ps, vocab)) >= 0 && n < c.len[r] &&
           c.draft[r * c.d + n] == best)
      n++;
    int ok = best < 0 ? c.next[r] == -1 - n && c.accepted[r] == DSO_MTP_BAD_TARGET
                      : c.next[r] == best && c.accepted[r] == n;
    check(ok, "%s mtp_verify_greedy %s V=%lld：第 %lld 行", isa->name, dtype_name(type),
          (long long)vocab, (long long)r);
  }
  free_all();
}

/* 随机的概率：一部分是 0，约归一。 */
static void fill_probs(buf *x) {
  for (int64_t i = 0; i < x->n; i++)
    put(x, i, random_below(3) ? fabs(random_normal()) / (double)x->n : 0.0);
}

static double weight_at(const buf *p, int64_t p0, const buf *q, int64_t q0, int64_t i) {
  float w = (float)(get(p, p0 + i) - (q ? get(q, q0 + i) : 0.0)); /* 与核一样舍入到 fp32 */
  return w > 0.0f ? w : 0.0;
}

static double sum_until(const buf *p, int64_t p0, const buf *q, int64_t q0, int64_t n,
                        int64_t skip) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; i++) sum += i == skip ? 0.0 : weight_at(p, p0, q, q0, i);
  return sum;
}

static void sample_case(const dso_isa *isa, dso_dtype type, int64_t vocab, int one_hot) {
  chain c;
  new_chain(&c, vocab);
  buf p = new_buf(type, c.r * c.rs + c.d * c.ps + vocab), q = new_buf(type, p.n);
  fill_probs(&p), fill_probs(&q);
  double u[MOST];
  for (int64_t r = 0; r < c.r; r++) {
    for (int64_t i = 0; i <= c.d; i++) {
      int64_t at = r * c.rs + i * c.ps, x = random_below(vocab);
      put(&p, at + x, 0.5), put(&q, at + x, 0.25 + 0.5 * (double)random_below(2));
      if (i < c.d) c.draft[r * c.d + i] = x;
      u[r * (c.d + 1) + i] = (double)random_below(1 << 20) / (1 << 20);
    }
  }
  dso_mtp_verify_sample_params s = {
      rows_of(&c), one_hot, {p.data, c.rs, c.ps, type}, {q.data, c.rs, c.ps, type}, u};
  buf a = bytes_of(c.accepted, c.r), b = bytes_of(c.next, c.r), *outs[] = {&a, &b};
  memset(c.accepted, 0, sizeof c.accepted), memset(c.next, 0, sizeof c.next);
  execute("采样", &dso_mtp_verify_sample, &s, isa, outs, 2);
  for (int64_t r = 0; r < c.r; r++) {
    int64_t n = 0, base = r * c.rs, at;
    for (; n < c.len[r]; n++) {
      at = base + n * c.ps + c.draft[r * c.d + n];
      if (!(u[r * (c.d + 1) + n] * (one_hot ? 1.0 : get(&q, at)) < get(&p, at))) break;
    }
    int rejected = n < c.len[r];
    const buf *minus = rejected && !one_hot ? &q : NULL;
    int64_t skip = rejected && one_hot ? c.draft[r * c.d + n] : -1;
    at = base + n * c.ps;
    double total = sum_until(&p, at, minus, at, vocab, skip);
    if (total == 0.0) minus = NULL, skip = -1, total = sum_until(&p, at, NULL, at, vocab, -1);
    double below = sum_until(&p, at, minus, at, c.next[r], skip) / total,
           own = c.next[r] == skip ? 0.0 : weight_at(&p, at, minus, at, c.next[r]) / total,
           target = u[r * (c.d + 1) + c.d];
    check(c.accepted[r] == n && own > 0.0 && below <= target + 1e-9 && target <= below + own + 1e-9,
          "%s mtp_verify_sample %s V=%lld：第 %lld 行得 %lld、%lld，应接受 %lld", isa->name,
          dtype_name(type), (long long)vocab, (long long)r, (long long)c.accepted[r],
          (long long)c.next[r], (long long)n);
  }
  free_all();
}

/* 一行一个草稿的出错与边界：probs、draft_probs、期望的 (accepted, next)。 */
static void sample_faults(const dso_isa *isa) {
  static const struct {
    float p[4], q[2];
    double u[2];
    int64_t accepted, next;
  } cases[] = {
      {{NAN, 1, 0, 1}, {1, 0}, {0, 0}, DSO_MTP_BAD_TARGET, -1},
      {{-1, 1, 0, 1}, {1, 0}, {0, 0}, DSO_MTP_BAD_TARGET, -1},
      {{1, 0, 0, 1}, {0, 1}, {0, 0}, DSO_MTP_BAD_DRAFT, -1},
      {{1, 0, 0, 1}, {INFINITY, 0}, {0, 0}, DSO_MTP_BAD_DRAFT, -1},
      {{1, 0, NAN, 1}, {1, 0}, {0, 0}, DSO_MTP_BAD_TARGET, -2},
      {{1, 0, 0, 0}, {1, 0}, {0, 0}, DSO_MTP_BAD_TARGET, -2},
      {{0, 1, 0, 1}, {1, NAN}, {0, 0}, DSO_MTP_BAD_TARGET, -1},
      {{0, 1, NAN, 1}, {1, 0}, {0, 0}, 0, 1},      /* p 为 0：u 为 0 也不接受；后面的不看 */
      {{0.5, 0, 0, 1}, {1, 0}, {0.75, 0.5}, 0, 0}, /* 剩余处处为 0：从 p 抽 */
      {{1, 0, 1, 0}, {1, 0}, {0.99, 0.999}, 1, 0},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    int64_t draft = 0, len = 1, accepted = 7, next = 7;
    dso_mtp_verify_sample_params s = {{1, 1, 2, &draft, &len, &accepted, &next},
                                      0,
                                      {cases[i].p, 4, 2, DSO_F32},
                                      {cases[i].q, 2, 2, DSO_F32},
                                      cases[i].u};
    execute("出错", &dso_mtp_verify_sample, &s, isa, NULL, 0);
    check(accepted == cases[i].accepted && next == cases[i].next, "%s 第 %zu 例得 %lld、%lld",
          isa->name, i, (long long)accepted, (long long)next);
  }
  free_all();
}

static void token_case(const dso_isa *isa, dso_dtype type, int64_t vocab) {
  int64_t rows = 1 + random_below(5), token[MOST] = {0};
  buf p = new_buf(type, rows * vocab), out = bytes_of(token, rows), *outs[] = {&out};
  fill_probs(&p);
  double u[MOST];
  for (int64_t r = 0; r < rows; r++) {
    put(&p, r * vocab + random_below(vocab), 0.5);
    u[r] = r == 0 ? 1.0 - 0x1p-53 : (double)random_below(1 << 20) / (1 << 20);
  }
  dso_sample_tokens_params s = {rows, vocab, {p.data, vocab, type}, u, token};
  execute("抽样", &dso_sample_tokens, &s, isa, outs, 1);
  for (int64_t r = 0; r < rows; r++) {
    double total = sum_until(&p, r * vocab, NULL, 0, vocab, -1),
           below = sum_until(&p, r * vocab, NULL, 0, token[r], -1) / total,
           own = weight_at(&p, r * vocab, NULL, 0, token[r]) / total;
    check(own > 0.0 && below <= u[r] + 1e-9 && u[r] <= below + own + 1e-9,
          "%s sample_tokens %s V=%lld：第 %lld 行得 %lld", isa->name, dtype_name(type),
          (long long)vocab, (long long)r, (long long)token[r]);
  }
  free_all();
}

/* ---- 采样前的处理 ---- */

typedef struct {
  double score, prob;
  int64_t index;
  int kept;
} entry;

/* 分数升序、下标升序（插入排序：测试的词表小）。 */
static void sort_entries(entry *e, int64_t n) {
  for (int64_t i = 1; i < n; i++) {
    entry now = e[i];
    int64_t j = i;
    for (; j > 0 && (e[j - 1].score > now.score ||
                     (e[j - 1].score == now.score && e[j - 1].index > now.index));
         j--)
      e[j] = e[j - 1];
    e[j] = now;
  }
}

static double soften(entry *e, int64_t n) {
  double top = e[n - 1].score, sum = 0.0, most = 0.0;
  for (int64_t i = 0; i < n; i++) sum += e[i].prob = e[i].kept ? exp(e[i].score - top) : 0.0;
  for (int64_t i = 0; i < n; i++) most = fmax(most, e[i].prob /= sum);
  return most;
}

static void filter_row(const dso_sample_filter_params *p, entry *e) {
  int64_t n = p->vocab, k = p->top_k > 0 && p->top_k < n ? p->top_k : n;
  sort_entries(e, n);
  for (int64_t i = 0; i < n; i++) e[i].kept = e[i].score >= e[n - k].score;
  soften(e, n);
  double below = 0.0;
  for (int64_t i = 0; p->top_p < 1.0 && i < n; i++) {
    below += e[i].prob;
    if (i < n - 1 && below <= 1.0 - p->top_p + 1e-7) e[i].kept = 0; /* 核以 fp32 比较 */
  }
  double most = soften(e, n);
  for (int64_t i = 0; i < n; i++) e[i].kept = e[i].kept && e[i].prob >= p->min_p * most - 1e-7;
  soften(e, n);
}

static void filter_case(const dso_isa *isa, dso_dtype type, int64_t vocab) {
  static entry e[4096];
  int64_t rows = 1 + random_below(3), places = 1 + random_below(2), wide = 5;
  int64_t token[MOST], len[MOST], fault[MOST] = {0}, n = rows * places;
  buf x = new_random(type, n * vocab, 2.0), y = new_buf(DSO_F32, n * vocab),
      bad = bytes_of(fault, n), *outs[] = {&y, &bad};
  for (int64_t i = 0; i < x.n; i++)
    put(&x, i, random_below(20) ? floor(get(&x, i) * 8.0) / 8.0 : -INFINITY);
  for (int64_t i = 0; i < n; i++) put(&x, i * vocab + random_below(vocab), 9.0);
  for (int64_t i = 0; i < rows * wide; i++) token[i] = random_below(vocab + 2) - 1;
  for (int64_t i = 0; i < n; i++) len[i] = random_below(wide + 1);
  dso_sample_filter_params p = {rows,
                                places,
                                vocab,
                                {x.data, places * vocab, vocab, type},
                                random_below(2) ? token : NULL,
                                wide,
                                wide,
                                random_below(4) ? len : NULL,
                                random_below(2) ? 2.0f : 1.0f,
                                random_below(2) ? 0.5f : 1.0f,
                                random_below(2) ? 0.015625f : 0.0f,
                                random_below(2) ? 1 + random_below(vocab + 3) : 0,
                                random_below(3) ? 0.3 + 0.1 * (double)random_below(7) : 1.0,
                                y.data,
                                fault};
  execute("处理", &dso_sample_filter, &p, isa, outs, 2);
  double *want = doubles(n * vocab);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < vocab; j++) e[j] = (entry){get(&x, i * vocab + j), 0.0, j, 1};
    int64_t count = p.token_len ? len[i] : wide;
    for (int64_t j = 0; p.token && j < count; j++) {
      int64_t t = token[i / places * wide + j];
      if (t < 0 || t >= vocab || !e[t].kept) continue;
      e[t].score = e[t].score < 0 ? e[t].score * p.penalty : e[t].score / p.penalty;
      e[t].kept = 0; /* 只惩罚一次 */
    }
    for (int64_t j = 0; j < vocab; j++) e[j].score /= p.temperature, e[j].kept = 1;
    filter_row(&p, e);
    for (int64_t j = 0; j < vocab; j++) want[i * vocab + e[j].index] = e[j].prob;
    check(fault[i] == 0, "%s sample_filter：不该出错", isa->name);
  }
  char label[96];
  snprintf(label, sizeof label, "%s sample_filter %s V=%lld k=%lld p=%g min_p=%g", isa->name,
           dtype_name(type), (long long)vocab, (long long)p.top_k, p.top_p, (double)p.min_p);
  check_close(label, &y, want, tolerance(DSO_F32), 1.0);
  free_all();
}

static void filter_faults(const dso_isa *isa) {
  static const float bad[][3] = {
      {NAN, 1, 2}, {INFINITY, 1, 2}, {-INFINITY, -INFINITY, -INFINITY}, {-INFINITY, 0, 3}};
  for (int i = 0; i < 4; i++) {
    int64_t fault = 7;
    float probs[3];
    dso_sample_filter_params p = {
        1,   1,     3,     {bad[i], 3, 3, DSO_F32}, NULL, 0, 0, NULL, 1.0f, 1.0f, 0.0f, 2,
        1.0, probs, &fault};
    execute("出错", &dso_sample_filter, &p, isa, NULL, 0);
    check(fault == (i < 3), "%s sample_filter 出错第 %d 例", isa->name, i);
  }
  free_all();
}

/* ---- 草稿的输出头 ---- */

static void head_case(const dso_isa *isa, dso_dtype type, dso_dtype w_type, int64_t m,
                      int64_t vocab, int64_t k, int64_t count, int nan) {
  int64_t ids[MOST], token[MOST], rs = k + random_below(3);
  buf x = new_random(type, m * k, 1.0), w = new_random(w_type, vocab * rs + 1, 1.0),
      b = new_random(w_type, vocab, 1.0), out = bytes_of(token, m), *outs[] = {&out};
  if (nan) put(&x, random_below(m * k), NAN);
  for (int64_t i = 0; i < count; i++) /* 一半是相邻的 */
    ids[i] = i && random_below(2) && ids[i - 1] + 1 < vocab ? ids[i - 1] + 1 : random_below(vocab);
  int64_t n = count ? count : vocab;
  const void *bias = random_below(2) ? b.data : NULL;
  dso_mtp_draft_head_params p = {
      m, k, vocab, n, {x.data, k, type}, {w.data, rs, w_type}, bias, count ? ids : NULL, token};
  memset(token, 0, sizeof token);
  execute("草稿头", &dso_mtp_draft_head, &p, isa, outs, 1);
  double *scores = doubles(vocab);
  for (int64_t r = 0; r < m; r++) {
    double best = -INFINITY, own = NAN;
    int bad = 0;
    for (int64_t i = 0; i < n; i++) {
      int64_t v = count ? ids[i] : i;
      scores[v] = bias ? get(&b, v) : 0.0;
      for (int64_t j = 0; j < k; j++) scores[v] += get(&x, r * k + j) * get(&w, v * rs + j);
      bad |= isnan(scores[v]);
      best = fmax(best, scores[v]);
      if (v == token[r]) own = scores[v];
    }
    double slack = fmax(tolerance(DSO_F32), type == DSO_BF16 && w_type == DSO_BF16 ? 1e-4 : 0.0);
    int ok = bad ? token[r] == -1 : own >= best - slack * (1.0 + fabs(best));
    check(ok, "%s mtp_draft_head %s/%s [%lld, %lld, %lld] %lld：第 %lld 行得 %lld", isa->name,
          dtype_name(type), dtype_name(w_type), (long long)m, (long long)vocab, (long long)k,
          (long long)count, (long long)r, (long long)token[r]);
  }
  free_all();
}

/* ---- MTP 的入口 ---- */

static void norm_into(const buf *x, const buf *w, int64_t row, int64_t k, double *out) {
  double square = 0.0;
  for (int64_t j = 0; j < k; j++) square += get(x, row * k + j) * get(x, row * k + j);
  double s = 1.0 / sqrt(square / (double)k + 1e-5);
  for (int64_t j = 0; j < k; j++) out[j] = get(x, row * k + j) * s * get(w, j);
}

static void input_case(const dso_isa *isa, dso_dtype type, dso_dtype w_type, int64_t m, int64_t n,
                       int64_t k) {
  buf e = new_random(type, m * k, 2.0), h = new_random(type, m * k, 0.5),
      ew = new_random(w_type, k, 1.0), hw = new_random(type, k, 1.0),
      w = new_random(w_type, n * 2 * k, 1.0 / sqrt(2.0 * (double)k)), y = new_buf(type, m * n),
      *outs[] = {&y};
  dso_mtp_input_params p = {m,
                            n,
                            k,
                            {e.data, k, type},
                            {h.data, k, type},
                            {w.data, 2 * k, w_type},
                            ew.data,
                            hw.data,
                            w_type,
                            type,
                            1e-5f,
                            y.data};
  execute("入口", &dso_mtp_input, &p, isa, outs, 1);
  double *rows = doubles(2 * k), *want = doubles(m * n);
  for (int64_t i = 0; i < m; i++) {
    norm_into(&e, &ew, i, k, rows), norm_into(&h, &hw, i, k, rows + k);
    for (int64_t j = 0; j < n; j++)
      for (int64_t c = 0; c < 2 * k; c++) want[i * n + j] += rows[c] * get(&w, j * 2 * k + c);
  }
  char label[96];
  snprintf(label, sizeof label, "%s mtp_input %s/%s [%lld, %lld, %lld]", isa->name,
           dtype_name(type), dtype_name(w_type), (long long)m, (long long)n, (long long)k);
  check_close(label, &y, want, fmax(tolerance(type), tolerance(w_type)), 2.0);
  free_all();
}

void test_mtp(void) {
  static const int64_t vocabs[] = {1, 2, 7, 63, 64, 65, 131, 1023, 1024, 2053};
  const dso_isa *isas[8];
  int n = list_isas(isas, 8);
  for (int i = 0; i < n; i++) {
    for (int t = 0; t < 3; t++) {
      for (int v = 0; v < 10; v++) {
        greedy_case(isas[i], FLOATS[t], vocabs[v], 0);
        greedy_case(isas[i], FLOATS[t], vocabs[v], 1);
        sample_case(isas[i], FLOATS[t], vocabs[v], 0);
        sample_case(isas[i], FLOATS[t], vocabs[v], 1);
        token_case(isas[i], FLOATS[t], vocabs[v]);
        for (int c = 0; c < 6; c++) filter_case(isas[i], FLOATS[t], vocabs[v]);
      }
      for (int w = 0; w < 3; w++) {
        input_case(isas[i], FLOATS[t], FLOATS[w], 1 + random_below(40), 37, 1 + random_below(50));
        input_case(isas[i], FLOATS[t], FLOATS[w], 100, 20, 33);
        for (int c = 0; c < 4; c++) {
          int64_t m = 1 + random_below(9), vocab = 1 + random_below(300);
          head_case(isas[i], FLOATS[t], FLOATS[w], m, vocab, random_below(40), 0, 0);
          head_case(isas[i], FLOATS[t], FLOATS[w], m, vocab, 1 + random_below(40),
                    1 + random_below(200), c == 3);
        }
        head_case(isas[i], FLOATS[t], FLOATS[w], 100, 700, 129, 0, 0);
      }
    }
    sample_faults(isas[i]);
    filter_faults(isas[i]);
  }
}
