/* mla_decode、mla_prefill 与反向：与 double 的逐词元循环比较。没有 span 看到的槽位与 kv_mask
 * 遮住的槽位填 NaN：读了就会露出来。 */
#include <stdio.h>
#include <string.h>

#include "harness.h"

enum { MOST_SPANS = 16 };

typedef struct {
  int64_t b, t, s, h, r, dn, dr, dv;
  int causal, masked;
  dso_dtype q, cache, w;
} shape;

typedef struct {
  buf q, latent, rope, scale, w, mask;
  dso_span spans[MOST_SPANS];
  dso_mla_inputs in;
} problem;

/* 每行一至三个 span，查询不重叠，键范围可以重叠，也可以为空（非因果）。 */
static int64_t random_spans(const shape *d, dso_span *spans) {
  int64_t n = 0;
  for (int64_t b = 0; b < d->b; b++) {
    int64_t parts = 1 + random_below(d->t > 2 ? 3 : 1), q = random_below(d->t > 1 ? 2 : 1);
    for (int64_t i = 0; i < parts && q < d->t && n < MOST_SPANS; i++) {
      int64_t end = i + 1 == parts ? d->t : q + 1 + random_below(d->t - q), len = end - q;
      int64_t least = d->causal ? len : 0,
              kv = d->s >= least ? least + random_below(d->s - least + 1) : 0;
      if (d->causal && d->s < len) break;
      int64_t begin = random_below(d->s - kv + 1);
      spans[n++] =
          (dso_span){b * d->t + q, b * d->t + end, b * d->s + begin, b * d->s + begin + kv};
      q = end;
    }
  }
  return n;
}

static void hide_unused(const shape *d, problem *p) {
  int quantized = dso_quantized_latent(d->cache);
  for (int64_t i = 0; i < d->b * d->s; i++) {
    int used = 0;
    for (int64_t k = 0; k < p->in.n_spans; k++)
      used |= i >= p->spans[k].kv_begin && i < p->spans[k].kv_end;
    if (d->masked && !((uint8_t *)p->mask.data)[i]) used = 0;
    for (int64_t j = 0; !used && !quantized && j < d->r; j++) put(&p->latent, i * d->r + j, NAN);
    for (int64_t j = 0; !used && j < d->dr; j++) put(&p->rope, i * d->dr + j, NAN);
    if (!used && quantized) put(&p->scale, i, NAN);
  }
}

static void make_problem(const shape *d, problem *p) {
  int quantized = dso_quantized_latent(d->cache);
  dso_dtype rope = quantized ? d->q : d->cache;
  p->q = new_random(d->q, d->b * d->t * d->h * (d->dn + d->dr), 1.0);
  p->latent = new_random(d->cache, d->b * d->s * d->r, 1.0);
  p->rope = new_random(rope, d->b * d->s * d->dr, 1.0);
  p->scale = new_random(DSO_F32, d->b * d->s, 1.0);
  for (int64_t i = 0; i < p->scale.n; i++) put(&p->scale, i, 0.01 + 0.001 * (double)(i % 7));
  p->w = new_random(d->w, d->h * (d->dn + d->dv) * d->r, 1.0 / sqrt((double)d->r));
  p->mask = new_zeros(DSO_I8, d->b * d->s);
  for (int64_t i = 0; i < p->mask.n; i++) ((uint8_t *)p->mask.data)[i] = random_below(3) > 0;
  dso_mla_inputs *in = &p->in;
  *in = (dso_mla_inputs){.b = d->b,
                         .t = d->t,
                         .s = d->s,
                         .heads = d->h,
                         .rank = d->r,
                         .nope_dim = d->dn,
                         .rope_dim = d->dr,
                         .v_dim = d->dv};
  int64_t qk = d->dn + d->dr;
  in->q = p->q.data, in->q_bs = d->t * d->h * qk, in->q_ts = d->h * qk, in->q_hs = qk,
  in->q_dtype = d->q;
  in->latent = p->latent.data, in->latent_bs = d->s * d->r, in->latent_ts = d->r,
  in->latent_dtype = d->cache;
  in->rope = p->rope.data, in->rope_bs = d->s * d->dr, in->rope_ts = d->dr, in->rope_dtype = rope;
  in->scale = quantized ? p->scale.data : NULL, in->scale_bs = d->s;
  in->kv_b = (dso_mat){p->w.data, d->r, d->w};
  in->kv_mask = d->masked ? p->mask.data : NULL, in->kv_mask_bs = d->s;
  in->spans = p->spans, in->n_spans = random_spans(d, p->spans);
  in->softmax_scale = (float)(1.0 / sqrt((double)qk)), in->causal = d->causal;
  hide_unused(d, p);
}

static int visible(const shape *d, const problem *p, const dso_span *s, int64_t i, int64_t key) {
  if (d->masked && !((uint8_t *)p->mask.data)[key]) return 0;
  return !d->causal || key - s->kv_begin <= s->kv_end - s->kv_begin - (s->q_end - s->q_begin) + i;
}

/* 参考的结果与梯度。 */
typedef struct {
  double *out, *lse, *dq, *dlatent, *drope, *dw;
} answers;

static double latent_at(const shape *d, const problem *p, int64_t key, int64_t j) {
  return get(&p->latent, key * d->r + j) * (p->in.scale ? get(&p->scale, key) : 1.0);
}

/* 头 h 的权重行 row 与槽位 key 的内积：展开后的一个 K 或 V 元素。 */
static double expand(const shape *d, const problem *p, int64_t key, int64_t h, int64_t row) {
  double sum = 0.0;
  for (int64_t j = 0; j < d->r; j++)
    sum += get(&p->w, (h * (d->dn + d->dv) + row) * d->r + j) * latent_at(d, p, key, j);
  return sum;
}

/* 一个（span，头）的 K、V [n, dn + dr + dv]；只展开有人看得见的槽位。 */
static double *expand_keys(const shape *d, const problem *p, const dso_span *s, int64_t h) {
  int64_t n = s->kv_end - s->kv_begin, width = d->dn + d->dr + d->dv;
  double *kv = doubles(n * width);
  for (int64_t x = 0; x < n; x++) {
    int64_t key = s->kv_begin + x;
    if (!visible(d, p, s, s->q_end - s->q_begin - 1, key)) continue;
    for (int64_t j = 0; j < d->dn; j++) kv[x * width + j] = expand(d, p, key, h, j);
    for (int64_t j = 0; j < d->dr; j++) kv[x * width + d->dn + j] = get(&p->rope, key * d->dr + j);
    for (int64_t j = 0; j < d->dv; j++)
      kv[x * width + d->dn + d->dr + j] = expand(d, p, key, h, d->dn + j);
  }
  return kv;
}

/* 一个查询：概率写进 prob，结果写进 out、lse。 */
static void attend_one(const shape *d, const problem *p, const dso_span *s, const double *kv,
                       int64_t i, int64_t h, double *prob, const answers *a) {
  int64_t n = s->kv_end - s->kv_begin, width = d->dn + d->dr + d->dv, qk = d->dn + d->dr;
  int64_t at = (s->q_begin + i) * d->h + h;
  double top = -INFINITY, sum = 0.0;
  for (int64_t x = 0; x < n; x++) {
    prob[x] = -INFINITY;
    if (!visible(d, p, s, i, s->kv_begin + x)) continue;
    prob[x] = 0.0;
    for (int64_t j = 0; j < qk; j++) prob[x] += get(&p->q, at * qk + j) * kv[x * width + j];
    prob[x] *= p->in.softmax_scale;
    top = fmax(top, prob[x]);
  }
  for (int64_t x = 0; x < n; x++) sum += prob[x] = top == -INFINITY ? 0.0 : exp(prob[x] - top);
  a->lse[at] = sum > 0.0 ? top + log(sum) : -INFINITY;
  for (int64_t x = 0; sum > 0.0 && x < n; x++) {
    prob[x] /= sum;
    for (int64_t j = 0; j < d->dv; j++) a->out[at * d->dv + j] += prob[x] * kv[x * width + qk + j];
  }
}

/* 一个查询的梯度：dq 直接累加，dkv [n, dn + dr + dv] 累加。 */
static void backward_one(const shape *d, const problem *p, const dso_span *s, const double *kv,
                         const double *prob, int64_t i, int64_t h, const buf *grad, double *dkv,
                         const answers *a) {
  int64_t n = s->kv_end - s->kv_begin, width = d->dn + d->dr + d->dv, qk = d->dn + d->dr;
  int64_t at = (s->q_begin + i) * d->h + h;
  double delta = 0.0;
  for (int64_t j = 0; j < d->dv; j++) delta += get(grad, at * d->dv + j) * a->out[at * d->dv + j];
  for (int64_t x = 0; x < n; x++) {
    if (prob[x] == 0.0) continue;
    double dp = 0.0;
    for (int64_t j = 0; j < d->dv; j++) {
      dp += get(grad, at * d->dv + j) * kv[x * width + qk + j];
      dkv[x * width + qk + j] += prob[x] * get(grad, at * d->dv + j);
    }
    double ds = prob[x] * (dp - delta) * p->in.softmax_scale;
    for (int64_t j = 0; j < qk; j++) {
      a->dq[at * qk + j] += ds * kv[x * width + j];
      dkv[x * width + j] += ds * get(&p->q, at * qk + j);
    }
  }
}

/* dkv 传回潜变量、旋转键与权重。 */
static void scatter(const shape *d, const problem *p, const dso_span *s, int64_t h,
                    const double *dkv, const answers *a) {
  int64_t n = s->kv_end - s->kv_begin, width = d->dn + d->dr + d->dv;
  for (int64_t x = 0; x < n; x++) {
    int64_t key = s->kv_begin + x;
    if (!visible(d, p, s, s->q_end - s->q_begin - 1, key)) continue;
    for (int64_t j = 0; j < d->dr; j++) a->drope[key * d->dr + j] += dkv[x * width + d->dn + j];
    for (int64_t row = 0; row < d->dn + d->dv; row++) {
      double g = dkv[x * width + (row < d->dn ? row : row + d->dr)];
      int64_t w = (h * (d->dn + d->dv) + row) * d->r;
      for (int64_t j = 0; j < d->r; j++) {
        a->dlatent[key * d->r + j] += g * get(&p->w, w + j);
        a->dw[w + j] += g * latent_at(d, p, key, j);
      }
    }
  }
}

static answers solve(const shape *d, const problem *p, const buf *grad) {
  int64_t queries = d->b * d->t * d->h;
  answers a = {doubles(queries * d->dv), doubles(queries),   doubles(p->q.n),
               doubles(p->latent.n),     doubles(p->rope.n), doubles(p->w.n)};
  for (int64_t i = 0; i < queries; i++) a.lse[i] = -INFINITY;
  for (int64_t k = 0; k < p->in.n_spans; k++)
    for (int64_t h = 0; h < d->h; h++) {
      const dso_span *s = &p->spans[k];
      int64_t n = s->kv_end - s->kv_begin;
      double *kv = expand_keys(d, p, s, h), *prob = doubles(n),
             *dkv = doubles(n * (d->dn + d->dr + d->dv));
      for (int64_t i = 0; i < s->q_end - s->q_begin; i++) {
        attend_one(d, p, s, kv, i, h, prob, &a);
        if (grad) backward_one(d, p, s, kv, prob, i, h, grad, dkv, &a);
      }
      if (grad) scatter(d, p, s, h, dkv, &a);
    }
  return a;
}

static double largest(const double *v, int64_t n) {
  double top = 1.0;
  for (int64_t i = 0; i < n; i++) top = fmax(top, fabs(v[i]));
  return top;
}

static void backward(const char *label, const dso_isa *isa, const shape *d, problem *p,
                     const buf *grad, const buf *out, const buf *lse, const answers *a,
                     double tol) {
  buf dq = new_zeros(d->q, p->q.n), dl = new_zeros(DSO_F32, p->latent.n),
      dr = new_zeros(DSO_F32, p->rope.n);
  buf dw = new_zeros(DSO_F32, p->w.n), *outs[] = {&dq, &dl, &dr, &dw};
  dso_mla_backward_params back = {p->in,   grad->data, out->data, lse->data,
                                  dq.data, dl.data,    dr.data,   dw.data};
  if (p->in.n_spans > 0) execute(label, &dso_mla_prefill_backward, &back, isa, outs, 4);
  check_close(label, &dq, a->dq, tol, largest(a->dq, dq.n));
  check_close(label, &dl, a->dlatent, tol, largest(a->dlatent, dl.n));
  check_close(label, &dr, a->drope, tol, largest(a->drope, dr.n));
  check_close(label, &dw, a->dw, tol, largest(a->dw, dw.n));
}

/* 缓存的一部分（每个槽位 width 个元素）按 table 拆成页；没有用到的页保持 0xff。 */
static buf paged_part(const buf *part, const shape *d, int64_t size, int64_t width, int64_t pages,
                      const int32_t *table) {
  buf to = new_buf(part->dtype, pages * size * width);
  for (int64_t i = 0; i < d->b * d->s;
       i++) /* 展平的槽位 i 在第 table[i / size] 页：行由整数个页组成 */
    for (int64_t j = 0; j < width; j++)
      put(&to, (table[i / size] * size + i % size) * width + j, get(part, i * width + j));
  return to;
}

/* 每页 size 个槽位（整除一行的槽位数）、次序打乱的页：与连续的缓存逐位相同。 */
static void paged_case(const char *label, const dso_isa *isa, const shape *d, const problem *p,
                       int64_t size, const buf *want) {
  int64_t used = d->b * d->s / size, pages = used + 2;
  int32_t *table = new_buf(DSO_F32, pages).data; /* 同样是 4 字节一个 */
  for (int64_t i = 0; i < pages; i++) {
    int64_t j = random_below(i + 1);
    table[i] = table[j], table[j] = (int32_t)i;
  }
  buf latent = paged_part(&p->latent, d, size, d->r, pages, table);
  buf rope = paged_part(&p->rope, d, size, d->dr, pages, table);
  buf scale = paged_part(&p->scale, d, size, 1, pages, table);
  buf out = new_buf(d->q, want->n), *outs[] = {&out};
  dso_mla_params params = {p->in, out.data, NULL};
  dso_mla_inputs *in = &params.in;
  in->latent = latent.data, in->latent_bs = size * d->r, in->rope = rope.data;
  in->rope_bs = size * d->dr, in->scale = in->scale ? scale.data : NULL, in->scale_bs = size;
  in->pages = table, in->pages_bs = d->s / size, in->page_size = size;
  execute(label, &dso_mla_decode, &params, isa, outs, 1);
  check(memcmp(out.data, want->data, (size_t)(out.n * dso_size_of(out.dtype))) == 0,
        "%s：每页 %lld 个槽位与连续的不同", label, (long long)size);
}

static void mla_case(const dso_isa *isa, shape d) {
  char label[128];
  snprintf(label, sizeof label,
           "%s mla %s/%s b%lld t%lld s%lld h%lld r%lld dn%lld dr%lld dv%lld 因果%d 遮%d", isa->name,
           dtype_name(d.q), dtype_name(d.cache), (long long)d.b, (long long)d.t, (long long)d.s,
           (long long)d.h, (long long)d.r, (long long)d.dn, (long long)d.dr, (long long)d.dv,
           d.causal, d.masked);
  problem p;
  make_problem(&d, &p);
  int64_t queries = d.b * d.t * d.h;
  int gradient = !dso_quantized_latent(d.cache);
  buf grad = new_random(d.q, queries * d.dv, 1.0);
  answers a = solve(&d, &p, gradient ? &grad : NULL);
  double tol = fmax(tolerance(d.q), d.cache == DSO_F16 ? tolerance(DSO_F16) : 0.0);
  buf out = new_buf(d.q, queries * d.dv), *outs[] = {&out};
  dso_mla_params params = {p.in, out.data, NULL};
  execute(label, &dso_mla_decode, &params, isa, outs, 1);
  check_close(label, &out, a.out, tol, 1.0);
  static const int64_t sizes[] = {1, 2, 3, 5, 50, 67};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    if (d.s % sizes[i] == 0) paged_case(label, isa, &d, &p, sizes[i], &out);

  buf full = new_zeros(d.q, queries * d.dv), lse = new_buf(DSO_F32, queries),
      *both[] = {&full, &lse};
  for (int64_t i = 0; i < queries; i++) put(&lse, i, -INFINITY);
  params = (dso_mla_params){p.in, full.data, lse.data};
  if (p.in.n_spans > 0) execute(label, &dso_mla_prefill, &params, isa, both, 2);
  check_close(label, &full, a.out, tol, 1.0);
  check_close(label, &lse, a.lse, tol, 1.0);
  if (gradient) backward(label, isa, &d, &p, &grad, &full, &lse, &a, 2 * tol);
  free_all();
}

void test_mla(void) {
  static const dso_dtype kinds[][3] = {{DSO_F32, DSO_F32, DSO_F32},  {DSO_BF16, DSO_BF16, DSO_BF16},
                                       {DSO_F16, DSO_F16, DSO_F16},  {DSO_F32, DSO_BF16, DSO_BF16},
                                       {DSO_BF16, DSO_I8, DSO_BF16}, {DSO_F32, DSO_I8, DSO_F32},
                                       {DSO_BF16, DSO_F8, DSO_BF16}, {DSO_F32, DSO_F8, DSO_F32}};
  enum { KINDS = sizeof kinds / sizeof *kinds };
  /* b, t, s, h, r, dn, dr, dv；奇数、零旋转、零 nope、跨块（64 键、48 查询、64 组）。 */
  static const int64_t sizes[][8] = {{1, 1, 1, 1, 1, 1, 0, 1},     {2, 1, 5, 3, 16, 8, 4, 6},
                                     {1, 1, 67, 9, 33, 5, 2, 7},   {2, 5, 70, 3, 17, 9, 6, 5},
                                     {1, 49, 65, 2, 8, 4, 0, 16},  {3, 3, 9, 16, 10, 0, 4, 3},
                                     {1, 67, 67, 1, 20, 7, 2, 33}, {2, 2, 2, 65, 6, 2, 2, 2}};
  const dso_isa *isas[8];
  int n = list_isas(isas, 8);
  for (int i = 0; i < n; i++) {
    for (int k = 0; k < KINDS; k++)
      for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        const int64_t *v = sizes[s];
        shape d = {v[0],       v[1],        v[2],
                   v[3],       v[4],        v[5],
                   v[6],       v[7],        (int)(s + (size_t)k) % 3 > 0,
                   (int)s % 2, kinds[k][0], kinds[k][1],
                   kinds[k][2]};
        mla_case(isas[i], d);
      }
    /* 多个分段（每段 512 个槽位）与多个键块（256）。 */
    mla_case(isas[i], (shape){1, 1, 1100, 2, 6, 4, 2, 4, 1, 1, DSO_BF16, DSO_BF16, DSO_BF16});
    mla_case(isas[i], (shape){1, 3, 600, 1, 6, 3, 2, 5, 1, 0, DSO_F32, DSO_F32, DSO_F32});
    for (int extra = 0; extra < 12; extra++) {
      shape d = {1 + random_below(3),
                 1 + random_below(9),
                 1 + random_below(40),
                 1 + random_below(5),
                 1 + random_below(30),
                 1 + random_below(12),
                 2 * random_below(5),
                 1 + random_below(20),
                 (int)random_below(2),
                 (int)random_below(2),
                 0,
                 0,
                 0};
      int k = (int)random_below(KINDS);
      d.q = kinds[k][0], d.cache = kinds[k][1], d.w = kinds[k][2];
      mla_case(isas[i], d);
    }
  }
}
