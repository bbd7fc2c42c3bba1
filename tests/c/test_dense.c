/* linear、swiglu_mlp 与反向：与 double 的三重循环比较。 */
#include <stdio.h>

#include "harness.h"

/* c [m, n] += a · b；步长以元素计。 */
static void accumulate(double *c, int64_t m, int64_t n, int64_t k, const double *a, int64_t ai,
                       int64_t ak, const double *b, int64_t bk, int64_t bj) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t x = 0; x < k; x++)
      for (int64_t j = 0; j < n; j++) c[i * n + j] += a[i * ai + x * ak] * b[x * bk + j * bj];
}

/* 行距 rs 的 [m, n] 取成连续的 double。 */
static double *dense(const buf *b, int64_t m, int64_t n, int64_t rs) {
  double *v = doubles(m * n);
  for (int64_t i = 0; i < m * n; i++) v[i] = get(b, i / n * rs + i % n);
  return v;
}

static double wider(dso_dtype a, dso_dtype b) { return fmax(tolerance(a), tolerance(b)); }

static void linear_case(const dso_isa *isa, dso_dtype x_type, dso_dtype w_type, int64_t m,
                        int64_t n, int64_t k, int bias) {
  char label[96];
  snprintf(label, sizeof label, "%s linear %s/%s [%lld, %lld, %lld]", isa->name, dtype_name(x_type),
           dtype_name(w_type), (long long)m, (long long)n, (long long)k);
  int64_t rs = k + random_below(3), ws = k + random_below(3), gs = n + random_below(3);
  buf x = new_random(x_type, (m - 1) * rs + k, 1.0),
      w = new_random(w_type, (n - 1) * ws + k, 1.0 / sqrt((double)k + 1.0));
  buf b = new_random(w_type, n, 1.0), y = new_buf(x_type, m * n), *outs[] = {&y};
  dso_linear_params p = {
      m, n, k, {x.data, rs, x_type}, {w.data, ws, w_type}, bias ? b.data : NULL, y.data, x_type};
  execute(label, &dso_linear, &p, isa, outs, 1);
  double *xd = dense(&x, m, k, rs), *wd = dense(&w, n, k, ws), *want = doubles(m * n);
  accumulate(want, m, n, k, xd, k, 1, wd, 1, k);
  for (int64_t i = 0; bias && i < m * n; i++) want[i] += get(&b, i % n);
  check_close(label, &y, want, tolerance(x_type), 1.0);

  buf g = new_random(x_type, (m - 1) * gs + n, 1.0), dx = new_buf(x_type, m * k),
      dw = new_buf(w_type, n * k);
  buf db = new_buf(w_type, n), *grads[] = {&dx, &dw, &db};
  int want_dx = random_below(4) > 0 || !bias;
  dso_linear_backward_params q = {m,
                                  n,
                                  k,
                                  {g.data, gs, x_type},
                                  {x.data, rs, x_type},
                                  {w.data, ws, w_type},
                                  want_dx ? dx.data : NULL,
                                  dw.data,
                                  bias ? db.data : NULL};
  execute(label, &dso_linear_backward, &q, isa, grads, 3);
  double *gd = dense(&g, m, n, gs), *rdx = doubles(m * k), *rdw = doubles(n * k), *rdb = doubles(n);
  accumulate(rdx, m, k, n, gd, n, 1, wd, k, 1);
  accumulate(rdw, n, k, m, gd, 1, n, xd, k, 1);
  for (int64_t i = 0; i < m * n; i++) rdb[i % n] += gd[i];
  double tol = wider(x_type, w_type), depth = sqrt((double)m);
  if (want_dx) check_close(label, &dx, rdx, tol, sqrt((double)n / (double)(k + 1)) + 1.0);
  check_close(label, &dw, rdw, tol, depth);
  if (bias) check_close(label, &db, rdb, tol, depth);
  free_all();
}

static double sigmoid(double v) { return 1.0 / (1.0 + exp(-v)); }

static void swiglu_case(const dso_isa *isa, dso_dtype x_type, dso_dtype w_type, int64_t m,
                        int64_t n, int64_t k, int64_t inner) {
  char label[96];
  snprintf(label, sizeof label, "%s swiglu %s/%s [%lld, %lld, %lld, %lld]", isa->name,
           dtype_name(x_type), dtype_name(w_type), (long long)m, (long long)n, (long long)k,
           (long long)inner);
  int64_t rs = k + random_below(3);
  buf x = new_random(x_type, (m - 1) * rs + k, 1.0),
      gate = new_random(w_type, inner * k, 1.0 / sqrt((double)k));
  buf up = new_random(w_type, inner * k, 1.0 / sqrt((double)k)),
      down = new_random(w_type, n * inner, 1.0 / sqrt((double)inner));
  buf y = new_buf(x_type, m * n), *outs[] = {&y};
  dso_mat mx = {x.data, rs, x_type}, mg = {gate.data, k, w_type}, mu = {up.data, k, w_type},
          md = {down.data, inner, w_type};
  dso_swiglu_mlp_params p = {m, n, k, inner, mx, mg, mu, md, y.data};
  execute(label, &dso_swiglu_mlp, &p, isa, outs, 1);

  double *xd = dense(&x, m, k, rs), *gd = dense(&gate, inner, k, k), *ud = dense(&up, inner, k, k);
  double *dd = dense(&down, n, inner, inner), *g = doubles(m * inner), *u = doubles(m * inner),
         *h = doubles(m * inner);
  double *want = doubles(m * n);
  accumulate(g, m, inner, k, xd, k, 1, gd, 1, k);
  accumulate(u, m, inner, k, xd, k, 1, ud, 1, k);
  for (int64_t i = 0; i < m * inner; i++) h[i] = g[i] * sigmoid(g[i]) * u[i];
  accumulate(want, m, n, inner, h, inner, 1, dd, 1, inner);
  check_close(label, &y, want, tolerance(x_type), 1.0);

  buf grad = new_random(x_type, m * n, 1.0), dx = new_buf(x_type, m * k),
      dgate = new_buf(w_type, inner * k);
  buf dup = new_buf(w_type, inner * k), ddown = new_buf(w_type, n * inner),
      *grads[] = {&dx, &dgate, &dup, &ddown};
  dso_swiglu_mlp_backward_params q = {
      m,       n,          k,        inner,     {grad.data, n, x_type}, mx, mg, mu, md,
      dx.data, dgate.data, dup.data, ddown.data};
  execute(label, &dso_swiglu_mlp_backward, &q, isa, grads, 4);
  double *go = dense(&grad, m, n, n), *dh = doubles(m * inner), *rdd = doubles(n * inner);
  double *rdx = doubles(m * k), *rdg = doubles(inner * k), *rdu = doubles(inner * k);
  accumulate(dh, m, inner, n, go, n, 1, dd, inner, 1);
  accumulate(rdd, n, inner, m, go, 1, n, h, inner, 1);
  for (int64_t i = 0; i < m * inner; i++) {
    double s = sigmoid(g[i]), up_i = u[i];
    u[i] = dh[i] * g[i] * s;
    g[i] = dh[i] * up_i * (s + g[i] * s * (1.0 - s));
  }
  accumulate(rdx, m, k, inner, g, inner, 1, gd, k, 1);
  accumulate(rdx, m, k, inner, u, inner, 1, ud, k, 1);
  accumulate(rdg, inner, k, m, g, 1, inner, xd, k, 1);
  accumulate(rdu, inner, k, m, u, 1, inner, xd, k, 1);
  double tol = wider(x_type, w_type), depth = 1.0 + sqrt((double)(m * n) / (double)inner);
  check_close(label, &dx, rdx, tol, 1.0 + sqrt((double)n / (double)k));
  check_close(label, &dgate, rdg, tol, depth);
  check_close(label, &dup, rdu, tol, depth);
  check_close(label, &ddown, rdd, tol, sqrt((double)m));
  free_all();
}

void test_dense(void) {
  static const dso_dtype pairs[][2] = {{DSO_F32, DSO_F32},
                                       {DSO_BF16, DSO_BF16},
                                       {DSO_F16, DSO_F16},
                                       {DSO_F32, DSO_BF16},
                                       {DSO_BF16, DSO_F32}};
  /* 点积路径与打包路径（行数 > 96）、零头、跨块（列 > 128，行 > 528，k 跨分段）。 */
  static const int64_t shapes[][3] = {{1, 1, 1},     {1, 7, 5},      {2, 33, 64},
                                      {5, 250, 31},  {13, 29, 300},  {97, 3, 17},
                                      {101, 130, 9}, {99, 17, 1030}, {531, 5, 4}};
  const dso_isa *isas[8];
  int n = list_isas(isas, 8);
  for (int i = 0; i < n; i++)
    for (int t = 0; t < 5; t++) {
      for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        const int64_t *d = shapes[s];
        if (i == 0 && t > 2 && d[0] * d[1] * d[2] > 100000) continue; /* 标量慢，大形状只跑同类型 */
        linear_case(isas[i], pairs[t][0], pairs[t][1], d[0], d[1], d[2], (int)(s + (size_t)t) % 2);
      }
      swiglu_case(isas[i], pairs[t][0], pairs[t][1], 1, 9, 7, 5);
      swiglu_case(isas[i], pairs[t][0], pairs[t][1], 4, 31, 33, 250);
      swiglu_case(isas[i], pairs[t][0], pairs[t][1], 103, 18, 19, 130);
      if (t < 2 && i > 0)
        swiglu_case(isas[i], pairs[t][0], pairs[t][1], 4231, 3, 4, 5); /* 多于一段 */
    }
}
