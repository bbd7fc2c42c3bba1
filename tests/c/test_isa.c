/* 每个可用指令集的每个原语与标量比较，长度取遍向量宽度的零头，缓冲大小恰好。 */
#include "harness.h"

#include <stdio.h>
#include <string.h>

static const int64_t LENGTHS[] = {0,  1,  2,  3,  7,  8,  9,  15,  16,
                                  17, 31, 32, 33, 47, 64, 65, 100, 257};
enum { N_LENGTHS = sizeof LENGTHS / sizeof *LENGTHS };
/* 打包与矩阵乘只用前四种。 */
static const dso_dtype TYPES[] = {DSO_F32, DSO_BF16, DSO_F16, DSO_I8, DSO_F8};

static const dso_isa *scalar, *tested;

static buf copy_of(const buf *b) {
  buf c = new_buf(b->dtype, b->n);
  memcpy(c.data, b->data, (size_t)(b->n * dso_size_of(b->dtype)));
  return c;
}

static void check_same(const char *what, const buf *got, const buf *want, int64_t n) {
  int same = memcmp(got->data, want->data, (size_t)(got->n * dso_size_of(got->dtype))) == 0;
  for (int64_t i = 0; !same && i < got->n; i++)
    if (get(got, i) != get(want, i) && !(isnan(get(got, i)) && isnan(get(want, i)))) {
      check(0, "%s %s %s n=%lld：第 %lld 个得 %g，标量得 %g", tested->name, what,
            dtype_name(got->dtype), (long long)n, (long long)i, get(got, i), get(want, i));
      return;
    }
  check(1, "%s", what);
}

static void check_near(const char *what, const buf *got, const buf *want, double tol) {
  double *values = doubles(want->n);
  for (int64_t i = 0; i < want->n; i++) values[i] = get(want, i);
  char label[96];
  snprintf(label, sizeof label, "%s %s n=%lld", tested->name, what, (long long)got->n);
  check_close(label, got, values, tol, 1.0);
}

/* ---- 转换 ---- */
static void conversions(void) {
  static const float specials[] = {
      0.0f,   -0.0f,   1.0f,    -1.0f,    65504.0f,  65519.0f,    65520.0f,    1e38f,  -1e38f,
      6e-8f,  5.9e-8f, 6.1e-5f, INFINITY, -INFINITY, 1.00390625f, 1.01171875f, 126.5f, -300.0f,
      448.0f, 463.9f,  -464.0f, 1e-3f,    -9e-4f,    0.0146f,     0.0156f};
  enum { N = sizeof specials / sizeof *specials };
  for (int t = 0; t < 5; t++)
    for (int i = 0; i < N_LENGTHS; i++) {
      int64_t n = LENGTHS[i];
      buf src = new_random(TYPES[t], n, 3.0), a = new_buf(DSO_F32, n), b = new_buf(DSO_F32, n);
      scalar->to_f32(a.data, src.data, TYPES[t], n);
      tested->to_f32(b.data, src.data, TYPES[t], n);
      check_same("to_f32", &b, &a, n);
      buf wide = new_random(DSO_F32, n, 40.0), c = new_buf(TYPES[t], n), d = new_buf(TYPES[t], n);
      for (int64_t j = 0; j < n; j++)
        if (random_below(3) == 0) put(&wide, j, specials[random_below(N)]);
      if (TYPES[t] != DSO_I8 && n > 2) put(&wide, 1, NAN);
      /* int8 只用来存除以尺度之后的数，不会大到超出 int32。 */
      for (int64_t j = 0; TYPES[t] == DSO_I8 && j < n; j++)
        if (fabs(get(&wide, j)) > 1e6) put(&wide, j, 127.5);
      scalar->from_f32(c.data, TYPES[t], wide.data, n);
      tested->from_f32(d.data, TYPES[t], wide.data, n);
      check_same("from_f32", &d, &c, n);
      buf e = new_buf(TYPES[t], n + 64); /* 对齐与没有对齐的目标 */
      for (int64_t at = 0; TYPES[t] != DSO_I8 && at < 2; at++) {
        void *to = dso_at_mut((void *)(((uintptr_t)e.data + 63) / 64 * 64), TYPES[t], at);
        tested->stream(to, TYPES[t], wide.data, n);
        tested->stream_end();
        memcpy(d.data, to, (size_t)(n * dso_size_of(TYPES[t])));
        check_same("stream", &d, &c, n);
      }
      free_all();
    }
  buf all = new_buf(DSO_F16, 65536), a = new_buf(DSO_F32, 65536), b = new_buf(DSO_F32, 65536);
  for (int i = 0; i < 65536; i++) ((uint16_t *)all.data)[i] = (uint16_t)i;
  scalar->to_f32(a.data, all.data, DSO_F16, 65536);
  tested->to_f32(b.data, all.data, DSO_F16, 65536);
  check_same("全部 65536 个 fp16", &b, &a, 65536);
  tested->from_f32(all.data, DSO_F16, a.data, 65536);
  int back = 1;
  for (int i = 0; i < 65536; i++)
    back &= ((uint16_t *)all.data)[i] == i || isnan(((float *)a.data)[i]);
  check(back, "%s：fp16 转 fp32 再转回", tested->name);
  free_all();
}

/* 全部 256 个 fp8；各相邻两个的中点与它的左右邻居：舍入取近，正中取偶。 */
static void every_f8(void) {
  uint8_t codes[256], back[256];
  float got[256], want[256];
  for (int i = 0; i < 256; i++) codes[i] = (uint8_t)i;
  scalar->to_f32(want, codes, DSO_F8, 256);
  tested->to_f32(got, codes, DSO_F8, 256);
  tested->from_f32(back, DSO_F8, got, 256);
  for (int i = 0; i < 256; i++) {
    int nan = (i & 0x7f) == 0x7f;
    double exact = ldexp(i & 0x78 ? 8 + (i & 7) : i & 7, (i & 0x78 ? (i >> 3 & 15) : 1) - 10);
    check(nan ? isnan(want[i]) : want[i] == (i < 128 ? exact : -exact), "fp8 %d 得 %g", i, want[i]);
    check(nan ? isnan(got[i]) : got[i] == want[i], "%s：fp8 %d 得 %g", tested->name, i, got[i]);
    check(back[i] == i, "%s：fp8 %d 转 fp32 再转回得 %d", tested->name, i, back[i]);
  }
  for (int i = 0; i < 0x7e; i++) {
    float middle = (want[i] + want[i + 1]) / 2;
    float near[3] = {nextafterf(middle, 0.0f), middle, nextafterf(middle, 1e9f)};
    uint8_t code[3];
    for (int j = 0; j < 3; j++) tested->from_f32(&code[j], DSO_F8, &near[j], 1);
    check(code[0] == i && code[1] == i + i % 2 && code[2] == i + 1, "%s：fp8 %d 与下一个之间的舍入",
          tested->name, i);
  }
}

/* ---- 打包与矩阵乘 ---- */
static void packing(dso_dtype fmt, dso_dtype type, int64_t n, int64_t k) {
  int64_t stride = dso_panel_elems(fmt, k), total = dso_ceil_div(n, DSO_PANEL) * stride;
  int64_t ld_t = k + random_below(3), ld_n = n + random_below(3);
  buf src_t = new_random(type, (n - 1) * ld_t + k, 1.0);
  buf src_n = new_random(type, (k - 1) * ld_n + n, 1.0);
  buf a = new_buf(fmt, total), b = new_buf(fmt, total);
  scalar->pack_t(a.data, fmt, stride, src_t.data, type, ld_t, n, k);
  tested->pack_t(b.data, fmt, stride, src_t.data, type, ld_t, n, k);
  check_same("pack_t", &b, &a, n * 1000 + k);
  scalar->pack_n(a.data, fmt, stride, src_n.data, type, ld_n, n, k);
  tested->pack_n(b.data, fmt, stride, src_n.data, type, ld_n, n, k);
  check_same("pack_n", &b, &a, n * 1000 + k);
  free_all();
}

static void product(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, int accumulate) {
  int64_t width = panels * DSO_PANEL, lda = k + random_below(4), ldc = width + random_below(20);
  int64_t stride = dso_panel_elems(fmt, k) + 32 * random_below(2);
  buf a = new_random(fmt, (m - 1) * lda + k, 1.0);
  buf b = new_random(fmt, (panels - 1) * stride + dso_panel_elems(fmt, k), 1.0 / sqrt((double)k));
  buf c = new_random(DSO_F32, (m - 1) * ldc + width, 1.0), d = copy_of(&c);
  scalar->gemm(fmt, m, panels, k, a.data, lda, b.data, stride, c.data, ldc, accumulate);
  tested->gemm(fmt, m, panels, k, a.data, lda, b.data, stride, d.data, ldc, accumulate);
  check_near("gemm", &d, &c, 5e-6);
  free_all();
}

/* A 由 pack_n 从 [k][m] 打包：结果应等于先转置再乘。 */
static void product_t(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, int accumulate) {
  int64_t width = panels * DSO_PANEL, ldc = width + random_below(20);
  int64_t stride = dso_panel_elems(fmt, k), m_panels = dso_ceil_div(m, DSO_PANEL);
  buf src = new_random(fmt, (k - 1) * m + m, 1.0), a = new_buf(fmt, m_panels * stride);
  buf b = new_random(fmt, panels * stride, 1.0 / sqrt((double)k));
  buf c = new_random(DSO_F32, (m - 1) * ldc + width, 1.0), d = copy_of(&c);
  tested->pack_n(a.data, fmt, stride, src.data, fmt, m, m, k);
  scalar->gemm_t(fmt, m, panels, k, a.data, stride, b.data, stride, c.data, ldc, accumulate);
  tested->gemm_t(fmt, m, panels, k, a.data, stride, b.data, stride, d.data, ldc, accumulate);
  check_near("gemm_t", &d, &c, 5e-6);
  buf flipped = new_buf(fmt, m * k), e = copy_of(&c);
  for (int64_t i = 0; i < m * k; i++) put(&flipped, i, get(&src, i % k * m + i / k));
  if (accumulate) return; /* 其余由上面与标量的比较覆盖 */
  scalar->gemm(fmt, m, panels, k, flipped.data, k, b.data, stride, e.data, ldc, 0);
  check_near("gemm_t 与 gemm", &d, &e, 5e-6);
}

static void dots(dso_dtype fmt, dso_dtype w_type, int64_t m, int64_t n, int64_t k) {
  int64_t lda = k + random_below(4), ldw = k + random_below(4), ldc = n + random_below(4);
  buf a = new_random(fmt, (m - 1) * lda + k, 1.0 / sqrt((double)k));
  buf w = new_random(w_type, (n - 1) * ldw + k, w_type == DSO_I8 ? 1.0 : 1.0);
  buf c = new_zeros(DSO_F32, (m - 1) * ldc + n), d = copy_of(&c);
  scalar->dot(fmt, m, n, k, a.data, lda, w.data, w_type, ldw, c.data, ldc);
  tested->dot(fmt, m, n, k, a.data, lda, w.data, w_type, ldw, d.data, ldc);
  check_near("dot", &d, &c, w_type == DSO_I8 ? 1e-4 : 5e-6);
  if (fmt == DSO_F32) {
    int64_t ld = n + random_below(4);
    buf v = new_random(w_type, (k - 1) * ld + n, 1.0);
    scalar->axpy_n(m, n, k, a.data, lda, v.data, w_type, ld, c.data, ldc);
    tested->axpy_n(m, n, k, a.data, lda, v.data, w_type, ld, d.data, ldc);
    check_near("axpy_n", &d, &c, w_type == DSO_I8 ? 1e-4 : 5e-6);
  }
  free_all();
}

static void matrices(void) {
  static const int64_t ns[] = {1, 5, 15, 16, 17, 33, 64, 70},
                       ks[] = {1, 2, 3, 8, 16, 31, 32, 33, 64, 65, 130};
  for (int f = 0; f <= tested->native_bf16; f++)
    for (size_t i = 0; i < sizeof ns / sizeof *ns; i++)
      for (size_t j = 0; j < sizeof ks / sizeof *ks; j++)
        packing(f ? DSO_BF16 : DSO_F32, TYPES[(i + j) % (f ? 3 : 4)], ns[i], ks[j]);
  for (int f = 0; f <= tested->native_bf16; f++)
    for (int64_t m = 1; m <= 17; m++)
      for (int64_t panels = 1; panels <= 9; panels += 1 + (m > 8)) {
        int64_t k = 2 * (1 + random_below(20)), long_k = m == 7 ? 300 : k; /* 跨过部分和的分段 */
        product(f ? DSO_BF16 : DSO_F32, m, panels, long_k, (int)(m + panels) % 2);
        product_t(f ? DSO_BF16 : DSO_F32, 2 * m, panels, k, (int)m % 2);
        free_all();
      }
  static const int64_t dot_ns[] = {1, 4, 5, 6, 7, 8, 13, 16, 24, 31}, dot_ms[] = {1, 2, 3, 4, 5, 9};
  static const int64_t dot_ks[] = {1, 7, 16, 31, 32, 33, 100};
  for (size_t m = 0; m < sizeof dot_ms / sizeof *dot_ms; m++)
    for (size_t n = 0; n < sizeof dot_ns / sizeof *dot_ns; n++)
      for (size_t k = 0; k < sizeof dot_ks / sizeof *dot_ks; k++) {
        dots(DSO_F32, TYPES[(m + n + k) % 4], dot_ms[m], dot_ns[n], dot_ks[k]);
        if (tested->native_bf16) dots(DSO_BF16, DSO_BF16, dot_ms[m], dot_ns[n], dot_ks[k]);
      }
  for (int t = 0; t < 4; t++) dots(DSO_F32, TYPES[t], 3, 37, 2100); /* 沿 k 分段 */
  if (tested->native_bf16) dots(DSO_BF16, DSO_BF16, 5, 19, 4099);
}

static void transposes(void) {
  for (int64_t m = 1; m < 40; m += 3)
    for (int64_t n = 1; n < 40; n += 5) {
      int64_t lds = n + random_below(3), ldd = m + random_below(3);
      buf src = new_random(DSO_F32, (m - 1) * lds + n, 1.0);
      buf a = new_zeros(DSO_F32, (n - 1) * ldd + m), b = copy_of(&a);
      scalar->transpose(a.data, ldd, src.data, lds, m, n);
      tested->transpose(b.data, ldd, src.data, lds, m, n);
      check_same("transpose", &b, &a, m * 1000 + n);
      free_all();
    }
}

/* ---- 逐行 ---- */
static void softmax(int64_t n, dso_dtype fmt, int kind) {
  int64_t n_pad = fmt == DSO_BF16 ? dso_round_up(n, 2) : n + random_below(9);
  buf s = new_random(DSO_F32, n, 5.0), a = new_buf(fmt, n_pad), b = new_buf(fmt, n_pad);
  for (int64_t i = 0; i < n; i++)
    if (kind == 2 || (kind == 1 && random_below(2))) put(&s, i, -INFINITY);
  if (kind == 3 && n > 0) put(&s, random_below(n), NAN);
  float m0 = kind == 4 ? 1.5f : -INFINITY, l0 = kind == 4 ? 2.0f : 0.0f, m1 = m0, l1 = l0;
  float k0 = scalar->softmax_row(s.data, n, n_pad, 0.3f, &m0, &l0, a.data, fmt);
  float k1 = tested->softmax_row(s.data, n, n_pad, 0.3f, &m1, &l1, b.data, fmt);
  check(isnan(l0) == isnan(l1) && (isnan(l0) || fabsf(l0 - l1) <= 1e-5f * (1.0f + l0)),
        "%s softmax_row n=%lld 种类 %d：l = %g，标量 %g", tested->name, (long long)n, kind, l1, l0);
  check(kind == 3 || (m0 == m1 && fabsf(k0 - k1) <= 1e-6f),
        "%s softmax_row n=%lld 种类 %d：m = %g，标量 %g", tested->name, (long long)n, kind, m1, m0);
  if (kind != 3) check_near("softmax_row", &b, &a, fmt == DSO_BF16 ? 8e-3 : 2e-6);
  if (kind != 4) check(kind == 3 || k1 == 0.0f, "%s softmax_row：首块的系数应为 0", tested->name);
}

static void softmax_gradient(int64_t n) {
  buf s = new_random(DSO_F32, n, 2.0), dp = new_random(DSO_F32, n, 1.0), s1 = copy_of(&s),
      dp1 = copy_of(&dp);
  buf lse = new_random(DSO_F32, n, 1.0), delta = new_random(DSO_F32, n, 1.0);
  for (int64_t i = 0; i < n; i++)
    put(&lse, i, random_below(5) ? fabs(get(&lse, i)) + 2.0 : INFINITY);
  scalar->softmax_backward(s.data, dp.data, n, 0.7f, lse.data, delta.data);
  tested->softmax_backward(s1.data, dp1.data, n, 0.7f, lse.data, delta.data);
  check_near("softmax_backward p", &s1, &s, 2e-6);
  check_near("softmax_backward ds", &dp1, &dp, 4e-6);
}

static void activation(const dso_act *act, int64_t n, int has_up) {
  buf g = new_random(DSO_F32, n, 6.0), u = new_random(DSO_F32, n, 6.0),
      dh = new_random(DSO_F32, n, 1.0);
  if (n > 2) put(&g, 0, 200.0), put(&g, 1, -200.0);
  buf g1 = copy_of(&g), g2 = copy_of(&g), g3 = copy_of(&g), u1 = copy_of(&u), u2 = copy_of(&u),
      dh1 = copy_of(&dh);
  scalar->activate(act, g.data, has_up ? u.data : NULL, n);
  tested->activate(act, g1.data, has_up ? u.data : NULL, n);
  check_near("activate", &g1, &g, 1e-5);
  scalar->activate_backward(act, g2.data, has_up ? u1.data : NULL, dh.data, n);
  tested->activate_backward(act, g3.data, has_up ? u2.data : NULL, dh1.data, n);
  check_near("activate_backward dg", &g3, &g2, 2e-5);
  check_near("activate_backward du", &u2, &u1, 1e-5);
  check_near("activate_backward h", &dh1, &dh, 1e-5);
}

static void activations(int64_t n) {
  for (int kind = DSO_SILU; kind <= DSO_CLIPPED_SILU; kind++) {
    dso_act act = {(dso_act_kind)kind, 1.702f, 3.0f};
    activation(&act, n, 1);
    if (!dso_act_clips(act.kind)) activation(&act, n, 0);
  }
}

static void vectors(int64_t n) {
  buf x = new_random(DSO_F32, n, 1.0), y = new_random(DSO_F32, n, 1.0), y1 = copy_of(&y);
  double sum = 0.0, top = 0.0;
  for (int64_t i = 0; i < n; i++) sum += get(&x, i) * get(&y, i), top = fmax(top, fabs(get(&x, i)));
  check(fabs(tested->vdot(x.data, y.data, n) - sum) <= 1e-5 * (1.0 + fabs(sum)) + 1e-6 * (double)n,
        "%s vdot n=%lld", tested->name, (long long)n);
  check(tested->vamax(x.data, n) == (float)top, "%s vamax n=%lld", tested->name, (long long)n);
  double most = -INFINITY;
  for (int64_t i = 0; i < n; i++) most = fmax(most, get(&x, i));
  check(tested->vmax(x.data, n) == (float)most, "%s vmax n=%lld", tested->name, (long long)n);
  scalar->vaxpy(y.data, 0.37f, x.data, n);
  tested->vaxpy(y1.data, 0.37f, x.data, n);
  check_near("vaxpy", &y1, &y, 1e-6);
  scalar->vscale(y.data, -1.7f, n);
  memcpy(y1.data, y.data, 0);
  for (int64_t i = 0; i < n; i++) put(&y1, i, get(&y, i) / -1.7);
  tested->vscale(y1.data, -1.7f, n);
  check_near("vscale", &y1, &y, 1e-6);
  for (int64_t i = 0; i < n; i += 1 + n / 9) {
    double keep = get(&x, i);
    put(&x, i, NAN);
    check(isnan(tested->vamax(x.data, n)), "%s vamax：第 %lld 个（共 %lld）是 NaN", tested->name,
          (long long)i, (long long)n);
    check(isnan(tested->vmax(x.data, n)), "%s vmax：第 %lld 个（共 %lld）是 NaN", tested->name,
          (long long)i, (long long)n);
    put(&x, i, INFINITY);
    check(tested->vmax(x.data, n) == INFINITY, "%s vmax inf", tested->name);
    put(&x, i, -INFINITY);
    check(tested->vmax(x.data, n) <= (float)most, "%s vmax -inf", tested->name);
    put(&x, i, keep);
  }
}

static void rows(void) {
  for (int i = 0; i < N_LENGTHS; i++) {
    int64_t n = LENGTHS[i];
    for (int kind = 0; kind < 5; kind++)
      for (int f = 0; f <= tested->native_bf16; f++)
        softmax(n, f ? DSO_BF16 : DSO_F32, kind), free_all();
    softmax_gradient(n);
    activations(n);
    vectors(n);
    free_all();
  }
}

void test_isa(void) {
  const dso_isa *isas[8];
  int n = list_isas(isas, 8);
  scalar = isas[0];
  check(strcmp(scalar->name, "scalar") == 0, "第一个指令集应为 scalar");
  check(dso_isa_set("neon") == -1 && strstr(dso_isa_compiled(), dso_isa_available()) != NULL,
        "指令集列表");
  for (int i = 0; i < n; i++) {
    tested = isas[i];
    conversions();
    every_f8();
    matrices();
    transposes();
    rows();
  }
}
