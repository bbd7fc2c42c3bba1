/* 量化权重的原语与整个算子，对照 double；每个缓冲大小恰好，读写越界由 ASan 报告。 */
#include <stdio.h>
#include <string.h>

#include "harness.h"

/* 一种量化：类型、组（0 为整行一组）、带不带零点。 */
typedef struct {
  dso_dtype type;
  int64_t group;
  int zero;
} scheme;

static const scheme SCHEMES[] = {
    {DSO_I8, 0, 0},   {DSO_I4, 32, 0},  {DSO_I4, 32, 1}, {DSO_I4, 64, 0},  {DSO_I4, 64, 1},
    {DSO_I4, 128, 0}, {DSO_I4, 128, 1}, {DSO_F8, 0, 0},  {DSO_F8, 128, 0},
};
enum { SCHEME_COUNT = sizeof SCHEMES / sizeof *SCHEMES };

static const char *scheme_name(scheme s) {
  return s.type == DSO_I8 ? "int8" : s.type == DSO_I4 ? "int4" : "fp8";
}

static int64_t groups_of(scheme s, int64_t k) { return s.group ? dso_ceil_div(k, s.group) : 1; }

/* 一行码的字节数。 */
static int64_t width_of(scheme s, int64_t k) {
  return s.type == DSO_I4 ? groups_of(s, k) * s.group / 2 : k;
}

/* 一个量化矩阵 [rows, k]：恰好大小的码、尺度、零点，与反量化的 double 值。 */
typedef struct {
  dso_mat mat;
  dso_quant quant;
  double *value;
} matrix;

static int int4_code(const uint8_t *row, int64_t x) {
  int byte = row[x / 32 * 16 + x % 16];
  return x % 32 < 16 ? byte & 15 : byte >> 4;
}

/* 随机的码：fp8 的是正态的数（NaN 另有测试），其余是随机的字节。 */
static buf new_codes(scheme s, int64_t n) {
  return s.type == DSO_F8 ? new_random(DSO_F8, n, 100.0) : new_random(DSO_I8, n, 1.0);
}

static double code_at(scheme s, const buf *codes, int64_t width, int64_t row, int64_t x) {
  if (s.type != DSO_I4) return get(codes, row * width + x);
  return int4_code((const uint8_t *)codes->data + row * width, x);
}

static matrix new_matrix(int64_t rows, int64_t k, scheme s) {
  int64_t groups = groups_of(s, k), width = width_of(s, k);
  buf codes = new_codes(s, rows * width), scale = new_random(DSO_F32, rows * groups, 1);
  matrix m = {.mat = {codes.data, width, s.type},
              .quant = {scale.data, NULL, s.group, groups},
              .value = doubles(rows * k)};
  /* 码的上界；fp8 的是正态的，取与均匀的同样的方差 */
  double most = s.type == DSO_I4 ? 8 : s.type == DSO_I8 ? 127 : 100 * sqrt(3);
  for (int64_t i = 0; i < rows * groups; i++)
    put(&scale, i, get(&scale, i) / (most * sqrt((double)k)));
  if (s.zero) {
    buf zeros = new_random(DSO_I8, rows * groups, 1.0);
    for (int64_t i = 0; i < rows * groups; i++) ((uint8_t *)zeros.data)[i] &= 15;
    m.quant.zero = zeros.data;
  }
  for (int64_t i = 0; i < rows * k; i++) {
    int64_t row = i / k, x = i % k, at = row * groups + (s.group ? x / s.group : 0);
    int shift = s.type != DSO_I4 ? 0 : s.zero ? m.quant.zero[at] : 8;
    m.value[i] = get(&scale, at) * (code_at(s, &codes, width, row, x) - shift);
  }
  return m;
}

/* 有的指令集把 A 化为 16 位定点，误差是每行（组）最大值的 1 / 65278。 */
static double dot_tolerance(const dso_isa *isa) {
  int fixed = strcmp(isa->name, "avx512_vnni") == 0 || strcmp(isa->name, "avx512_bf16") == 0;
  return fixed ? 2e-4 : 2e-5;
}

/* C [m, n] = A [m, k] · Wᵀ；打包的 A 大小恰好。 */
static void multiply_into(const dso_isa *isa, const buf *a, int64_t lda, int64_t m, int64_t n,
                          int64_t k, const matrix *w, buf *c, int64_t ldc) {
  int64_t stride = (int64_t)dso_pack_q_bytes(k);
  buf packed = new_buf(DSO_I8, m * stride);
  for (int64_t i = 0; i < m; i++)
    isa->pack_q((char *)packed.data + i * stride, dso_at(a->data, a->dtype, i * lda), a->dtype, k,
                w->mat.dtype, w->quant.group);
  isa->dot_q(m, n, k, packed.data, stride, w->mat.data, w->mat.dtype, w->mat.rs, &w->quant, c->data,
             ldc, random_below(2) ? w->mat.data : NULL);
}

static buf multiply(const dso_isa *isa, const buf *a, int64_t m, int64_t n, int64_t k,
                    const matrix *w) {
  buf c = new_buf(DSO_F32, m * n);
  multiply_into(isa, a, k, m, n, k, w, &c, n);
  return c;
}

static void product(const dso_isa *isa, int64_t m, int64_t n, int64_t k, scheme s) {
  int64_t lda = k + random_below(4), ldc = n + random_below(4);
  matrix w = new_matrix(n, k, s);
  buf a = new_random(DSO_F32, (m - 1) * lda + k, 1.0), c = new_zeros(DSO_F32, (m - 1) * ldc + n);
  multiply_into(isa, &a, lda, m, n, k, &w, &c, ldc);
  double *want = doubles(c.n);
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++)
      for (int64_t x = 0; x < k; x++)
        want[i * ldc + j] += get(&a, i * lda + x) * w.value[j * k + x];
  char label[96];
  snprintf(label, sizeof label, "%s dot_q %s m=%d n=%d k=%d 组=%d", isa->name, scheme_name(s),
           (int)m, (int)n, (int)k, (int)s.group);
  check_close(label, &c, want, dot_tolerance(isa), 1.0);
  buf row = new_buf(DSO_F32, k);
  dso_quant last = dso_quant_at(&w.quant, n - 1, 0);
  const void *codes = dso_at(w.mat.data, w.mat.dtype, (n - 1) * w.mat.rs);
  isa->dequant(row.data, DSO_F32, codes, w.mat.dtype, &last, k);
  snprintf(label, sizeof label, "%s dequant %s k=%d 组=%d", isa->name, scheme_name(s), (int)k,
           (int)s.group);
  check_close(label, &row, w.value + (n - 1) * k, 2e-6, 1.0);
  if (isa->native_bf16) {
    buf half = new_buf(DSO_BF16, k);
    isa->dequant(half.data, DSO_BF16, codes, w.mat.dtype, &last, k);
    check_close(label, &half, w.value + (n - 1) * k, 4e-3, 1e-2);
  }
  free_all();
}

/* 极端的激活：全 0、极小、极大、一个离群值、每个位置的 NaN 与无穷。一行一种，互不影响。 */
enum { EXTREMES = 6 };

static void extremes(const dso_isa *isa, int64_t k, scheme s) {
  int64_t n = 9;
  matrix w = new_matrix(n, k, s);
  buf a = new_random(DSO_F32, EXTREMES * k, 1.0);
  int64_t at = random_below(k);
  for (int64_t x = 0; x < k; x++) {
    put(&a, x, 0.0), put(&a, k + x, 1e-42 * (double)x);
    put(&a, 2 * k + x, 1e30 * get(&a, 2 * k + x));
  }
  put(&a, 3 * k + at, 1e5), put(&a, 4 * k + at, NAN), put(&a, 5 * k + at, INFINITY);
  buf c = multiply(isa, &a, EXTREMES, n, k, &w);
  char label[96];
  for (int64_t i = 0; i < EXTREMES; i++)
    for (int64_t j = 0; j < n; j++) {
      double want = 0.0, size = 0.0, got = get(&c, i * n + j);
      for (int64_t x = 0; x < k; x++) {
        double term = get(&a, i * k + x) * w.value[j * k + x];
        want += term, size = fmax(size, fabs(get(&a, i * k + x)));
      }
      snprintf(label, sizeof label, "%s %s 极端 %d k=%d 组=%d：%g，应为 %g", isa->name,
               scheme_name(s), (int)i, (int)k, (int)s.group, got, want);
      if (i == 4)
        check(isnan(got), "%s", label);
      else if (i == 5)
        check(!isfinite(got), "%s", label);
      else
        check(fabs(got - want) <= dot_tolerance(isa) * (fabs(want) + size) + 1e-34, "%s", label);
    }
  free_all();
}

/* 累加的范围：全部取同号的最大值，int8 的 k 至定点的上限与再长一个。标量逐个累加，误差随 k 增长，所以容差宽；
 * 溢出会差得多。 */
static void saturated(const dso_isa *isa, int64_t k, scheme s, int code) {
  int64_t groups = groups_of(s, k), width = width_of(s, k);
  buf codes = new_buf(DSO_I8, width), scale = new_buf(DSO_F32, groups), a = new_buf(DSO_F32, 2 * k);
  memset(codes.data, s.group ? code * 17 : code, (size_t)width);
  for (int64_t g = 0; g < groups; g++) put(&scale, g, 1.0);
  for (int64_t x = 0; x < 2 * k; x++) put(&a, x, x < k ? 1.0 : -1.0);
  matrix w = {.mat = {codes.data, width, s.type}, .quant = {scale.data, NULL, s.group, groups}};
  buf c = multiply(isa, &a, 2, 1, k, &w);
  double want[2] = {(double)k * (s.group ? code - 8 : code), 0.0};
  want[1] = -want[0];
  char label[96];
  snprintf(label, sizeof label, "%s 满量程 k=%d 组=%d 码=%d", isa->name, (int)k, (int)s.group,
           code);
  check_close(label, &c, want, 1e-2, 0.0);
  free_all();
}

/* fp8 的 256 个码：dequant 逐个对照，NaN 只在 0x7f、0xff；dot_q 里一个 NaN 的码只影响它那一列。 */
enum { CODES = 256, NAN_CODE = 0x7f };

static void all_codes(const dso_isa *isa, dso_dtype fmt, int64_t group) {
  scheme s = {DSO_F8, group, 0};
  matrix w = new_matrix(1, CODES, s);
  buf codes = new_buf(DSO_F8, CODES), out = new_buf(fmt, CODES);
  for (int i = 0; i < CODES; i++) ((uint8_t *)codes.data)[i] = (uint8_t)i;
  isa->dequant(out.data, fmt, codes.data, DSO_F8, &w.quant, CODES);
  for (int i = 0; i < CODES; i++) {
    double scale = w.quant.scale[group ? i / group : 0], want = scale * get(&codes, i);
    double got = get(&out, i), limit = (fmt == DSO_BF16 ? 4e-3 : 1e-6) * fabs(want);
    check(isnan(want) == (i % 128 == NAN_CODE), "对照的码 %d 是 %g", i, want);
    check(isnan(want) ? isnan(got) : fabs(got - want) <= limit, "%s 码 %d 组=%d：%g，应为 %g",
          isa->name, i, (int)group, got, want);
  }
  free_all();
}

static void nan_code(const dso_isa *isa, int64_t m, int64_t k, int64_t group) {
  scheme s = {DSO_F8, group, 0};
  int64_t n = 9, bad = random_below(n);
  matrix w = new_matrix(n, k, s);
  ((uint8_t *)w.mat.data)[bad * k + random_below(k)] = NAN_CODE;
  buf a = new_random(DSO_F32, m * k, 1.0), c = multiply(isa, &a, m, n, k, &w);
  for (int64_t i = 0; i < m * n; i++)
    check(isnan(get(&c, i)) == (i % n == bad), "%s NaN 的码 m=%d k=%d 组=%d 第 %d 个：%g",
          isa->name, (int)m, (int)k, (int)group, (int)i, get(&c, i));
  free_all();
}

/* 两个量化的专家（行数不同），silu；第一个有偏置，类型与 x 的不同。 */
enum { EXPERTS = 2 };

static double silu(double x) { return x / (1.0 + exp(-x)); }

/* 返回 y 里各项平方和的根的最大值：各项各自舍入，误差随它，而不随（可能相消了的）和。 */
static double expert_row(const matrix *w, const buf *bias, int64_t inner, const dso_moe_inputs *in,
                         const double *x, double factor, double *y) {
  double *h = doubles(inner);
  for (int64_t j = 0; j < inner; j++) {
    double g = bias ? get(&bias[0], j) : 0.0, u = bias ? get(&bias[1], j) : 0.0;
    for (int64_t i = 0; i < in->k; i++)
      g += x[i] * w[0].value[j * in->k + i], u += x[i] * w[1].value[j * in->k + i];
    h[j] = silu(g) * u;
  }
  double most = 0.0;
  for (int64_t j = 0; j < in->n; j++) {
    double squares = 0.0;
    y[j] += bias ? factor * get(&bias[2], j) : 0.0;
    for (int64_t i = 0; i < inner; i++) {
      double term = factor * h[i] * w[2].value[j * inner + i];
      y[j] += term, squares += term * term;
    }
    most = fmax(most, sqrt(squares));
  }
  return most;
}

static void whole(const dso_isa *isa, dso_dtype dtype, int64_t tokens, scheme s) {
  int64_t k = 130, inner = 37, n = 70, few = dso_min(tokens, 3);
  matrix w[EXPERTS][3];
  dso_expert experts[EXPERTS] = {0};
  for (int e = 0; e < EXPERTS; e++) {
    w[e][0] = new_matrix(inner, k, s), w[e][1] = new_matrix(inner, k, s);
    w[e][2] = new_matrix(n, inner, s);
    experts[e] = (dso_expert){.inner = inner,
                              .gate = w[e][0].mat,
                              .up = w[e][1].mat,
                              .down = w[e][2].mat,
                              .bias_step = 1,
                              .gate_quant = w[e][0].quant,
                              .up_quant = w[e][1].quant,
                              .down_quant = w[e][2].quant};
  }
  dso_dtype other = dtype == DSO_F16 ? DSO_F32 : (dso_dtype)(dtype + 1);
  buf bias[] = {new_random(other, inner, 1.0), new_random(other, inner, 1.0),
                new_random(other, n, 1.0)};
  experts[0].gate_bias = bias[0].data, experts[0].up_bias = bias[1].data;
  experts[0].down_bias = bias[2].data, experts[0].bias_dtype = other;
  int64_t begin[EXPERTS + 1] = {0, tokens, tokens + few}, at[3 * (EXPERTS + 1)], token[128];
  float weight[128];
  for (int64_t i = 0; i < tokens + few; i++)
    token[i] = i < tokens ? i : i - tokens, weight[i] = (float)(0.1 * (double)(i % 7) + 0.2);
  buf x = new_random(dtype, tokens * k, 1.0), y = new_buf(dtype, tokens * n);
  dso_moe_params p = {.in = {.tokens = tokens,
                             .k = k,
                             .n = n,
                             .experts = EXPERTS,
                             .x = {x.data, k, dtype},
                             .expert = experts,
                             .begin = begin,
                             .token = token,
                             .weight = weight,
                             .gated = 1},
                      .y = y.data};
  dso_moe_prepare(&p.in, 0, at);
  buf *outs[] = {&y};
  char label[96];
  snprintf(label, sizeof label, "%s moe_experts %s %s T=%d 组=%d", isa->name, scheme_name(s),
           dtype_name(dtype), (int)tokens, (int)s.group);
  execute(label, &dso_moe_experts, &p, isa, outs, 1);
  double *want = doubles(y.n), *row = doubles(k), most = 1.0;
  for (int e = 0; e < EXPERTS; e++)
    for (int64_t i = begin[e]; i < begin[e + 1]; i++) {
      for (int64_t j = 0; j < k; j++) row[j] = get(&x, token[i] * k + j);
      double size =
          expert_row(w[e], e ? NULL : bias, inner, &p.in, row, weight[i], want + token[i] * n);
      most = fmax(most, size);
    }
  check_close(label, &y, want, fmax(tolerance(dtype), dot_tolerance(isa)), most);
  free_all();
}

static void every_shape(const dso_isa *isa, scheme s) {
  static const int64_t ms[] = {1, 2, 3, 4, 5, 9}, ns[] = {1, 4, 7, 8, 13};
  static const int64_t ks[] = {1, 15, 31, 32, 33, 64, 100, 257};
  for (size_t m = 0; m < sizeof ms / sizeof *ms; m++)
    for (size_t n = 0; n < sizeof ns / sizeof *ns; n++)
      for (size_t k = 0; k < sizeof ks / sizeof *ks; k++) product(isa, ms[m], ns[n], ks[k], s);
  for (int t = DSO_F32; t <= DSO_F16; t++) {
    whole(isa, (dso_dtype)t, 1, s);
    whole(isa, (dso_dtype)t, 40, s);
    whole(isa, (dso_dtype)t, 97, s);
  }
  for (size_t k = 0; k < sizeof ks / sizeof *ks; k++) {
    extremes(isa, ks[k], s);
    if (s.type == DSO_F8) nan_code(isa, 1, ks[k], s.group), nan_code(isa, 6, ks[k], s.group);
  }
  product(isa, 17, 27, 100, s);
  if (s.type != DSO_F8) return;
  all_codes(isa, DSO_F32, s.group);
  if (isa->native_bf16) all_codes(isa, DSO_BF16, s.group);
}

void test_quant(void) {
  static const scheme int8 = {DSO_I8, 0, 0};
  const dso_isa *isas[8];
  int count = list_isas(isas, 8);
  for (int i = 0; i < count; i++) {
    for (int64_t k = (1 << 20) - 1; k <= (1 << 20) + 1; k++)
      saturated(isas[i], k, int8, 127), saturated(isas[i], k, int8, -128);
    for (int64_t group = 32; group <= 128; group *= 2) {
      scheme int4 = {DSO_I4, group, 0};
      saturated(isas[i], 4000, int4, 15), saturated(isas[i], 4000, int4, 0);
    }
    for (int s = 0; s < SCHEME_COUNT; s++) every_shape(isas[i], SCHEMES[s]);
  }
}
