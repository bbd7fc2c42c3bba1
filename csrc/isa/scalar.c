/* 标量原语：完整、直白，任何架构可用，也是其余指令集的对照。 */
#include "convert.h"
#include "isa.h"

static float load(const void *src, dso_dtype dtype, int64_t i) {
  switch (dtype) {
    case DSO_F32:
      return ((const float *)src)[i];
    case DSO_BF16:
      return dso_bf16_to_f32(((const uint16_t *)src)[i]);
    case DSO_F16:
      return dso_f16_to_f32(((const uint16_t *)src)[i]);
    case DSO_F8:
      return dso_f8_to_f32(((const uint8_t *)src)[i]);
    default:
      return (float)((const int8_t *)src)[i];
  }
}

static int8_t to_i8(float v) {
  if (!(v > -127.0f)) return v != v ? 0 : -127;
  return (int8_t)lrintf(v < 127.0f ? v : 127.0f);
}

static void store(void *dst, dso_dtype dtype, int64_t i, float v) {
  switch (dtype) {
    case DSO_F32:
      ((float *)dst)[i] = v;
      break;
    case DSO_BF16:
      ((uint16_t *)dst)[i] = dso_f32_to_bf16(v);
      break;
    case DSO_F16:
      ((uint16_t *)dst)[i] = dso_f32_to_f16(v);
      break;
    case DSO_F8:
      ((uint8_t *)dst)[i] = dso_f32_to_f8(v);
      break;
    default:
      ((int8_t *)dst)[i] = to_i8(v);
  }
}

static void to_f32(float *dst, const void *src, dso_dtype dtype, int64_t n) {
  for (int64_t i = 0; i < n; i++) dst[i] = load(src, dtype, i);
}

static void from_f32(void *dst, dso_dtype dtype, const float *src, int64_t n) {
  for (int64_t i = 0; i < n; i++) store(dst, dtype, i, src[i]);
}

static void stream_end(void) {}

/* 面板内 (k, j) 的元素下标。 */
static int64_t slot(dso_dtype fmt, int64_t k, int64_t j) {
  return fmt == DSO_BF16 ? (k / 2 * DSO_PANEL + j) * 2 + k % 2 : k * DSO_PANEL + j;
}

static void pack(void *dst, dso_dtype fmt, int64_t panel_stride, const void *src, dso_dtype dtype,
                 int64_t n_stride, int64_t k_stride, int64_t n, int64_t k) {
  int64_t k_pad = fmt == DSO_BF16 ? dso_round_up(k, 2) : k;
  for (int64_t p = 0; p * DSO_PANEL < n; p++)
    for (int64_t i = 0; i < k_pad; i++)
      for (int64_t j = 0; j < DSO_PANEL; j++) {
        int64_t col = p * DSO_PANEL + j;
        float v = col < n && i < k ? load(src, dtype, col * n_stride + i * k_stride) : 0.0f;
        store(dst, fmt, p * panel_stride + slot(fmt, i, j), v);
      }
}

static void pack_t(void *dst, dso_dtype fmt, int64_t panel_stride, const void *src, dso_dtype dtype,
                   int64_t ld, int64_t n, int64_t k) {
  pack(dst, fmt, panel_stride, src, dtype, ld, 1, n, k);
}

static void pack_n(void *dst, dso_dtype fmt, int64_t panel_stride, const void *src, dso_dtype dtype,
                   int64_t ld, int64_t n, int64_t k) {
  pack(dst, fmt, panel_stride, src, dtype, 1, ld, n, k);
}

static void gemm_strided(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, const void *a,
                         int64_t lda, int64_t a_ks, const void *b, int64_t panel_stride, float *c,
                         int64_t ldc, int accumulate) {
  int64_t pair = fmt == DSO_BF16 ? 2 : 1;
  for (int64_t i = 0; i < m; i++)
    for (int64_t p = 0; p < panels; p++) {
      float acc[DSO_PANEL] = {0};
      for (int64_t x = 0; x < k; x++) {
        float av = load(a, fmt, i * lda + x / pair * a_ks + x % pair);
        for (int64_t j = 0; j < DSO_PANEL; j++)
          acc[j] += av * load(b, fmt, p * panel_stride + slot(fmt, x, j));
      }
      float *row = c + i * ldc + p * DSO_PANEL;
      for (int64_t j = 0; j < DSO_PANEL; j++) row[j] = accumulate ? row[j] + acc[j] : acc[j];
    }
}

#include "gemm_layouts.h"

static void dot(dso_dtype fmt, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
                const void *w, dso_dtype w_dtype, int64_t ldw, float *c, int64_t ldc) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float acc = 0.0f;
      for (int64_t x = 0; x < k; x++)
        acc += load(a, fmt, i * lda + x) * load(w, w_dtype, j * ldw + x);
      c[i * ldc + j] = acc;
    }
}

static void axpy_n(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const void *w,
                   dso_dtype w_dtype, int64_t ldw, float *c, int64_t ldc) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float acc = 0.0f;
      for (int64_t x = 0; x < k; x++) acc += a[i * lda + x] * load(w, w_dtype, x * ldw + j);
      c[i * ldc + j] = acc;
    }
}

/* 第 x 个码减零点，乘尺度；int4 的码在 32 个一段的 16 字节里。 */
static float quantized(const void *w, dso_dtype dtype, const dso_quant *q, int64_t x) {
  int64_t at = x % 32, g = q->group ? x / q->group : 0;
  if (dtype != DSO_I4) return q->scale[g] * load(w, dtype, x);
  int byte = ((const uint8_t *)w)[x / 32 * 16 + at % 16], zero = q->zero ? q->zero[g] : 8;
  return q->scale[g] * (float)((at < 16 ? byte & 15 : byte >> 4) - zero);
}

static void dequant(void *dst, dso_dtype fmt, const void *w, dso_dtype w_dtype, const dso_quant *q,
                    int64_t k) {
  for (int64_t x = 0; x < k; x++) store(dst, fmt, x, quantized(w, w_dtype, q, x));
}

static void pack_q(void *dst, const void *src, dso_dtype dtype, int64_t k, dso_dtype w_dtype,
                   int64_t group) {
  (void)w_dtype, (void)group;
  to_f32(dst, src, dtype, k);
}

static void dot_q(int64_t m, int64_t n, int64_t k, const void *a, int64_t a_stride, const void *w,
                  dso_dtype w_dtype, int64_t ldw, const dso_quant *q, float *c, int64_t ldc,
                  const void *next) {
  (void)next;
  for (int64_t j = 0; j < n; j++) {
    dso_quant row = dso_quant_at(q, j, 0);
    const void *wj = dso_at(w, w_dtype, j * ldw);
    for (int64_t i = 0; i < m; i++) {
      const float *x = (const float *)((const char *)a + i * a_stride);
      float acc = 0.0f;
      for (int64_t at = 0; at < k; at++) acc += x[at] * quantized(wj, w_dtype, &row, at);
      c[i * ldc + j] = acc;
    }
  }
}

static void transpose(float *dst, int64_t ldd, const float *src, int64_t lds, int64_t m,
                      int64_t n) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) dst[j * ldd + i] = src[i * lds + j];
}

static float softmax_row(const float *s, int64_t n, int64_t n_pad, float scale, float *m, float *l,
                         void *p, dso_dtype fmt) {
  float top = *m, sum = 0.0f;
  for (int64_t i = 0; i < n; i++) top = s[i] * scale > top ? s[i] * scale : top;
  float safe = top == -INFINITY ? 0.0f : top, keep = *m == -INFINITY ? 0.0f : expf(*m - safe);
  for (int64_t i = 0; i < n_pad; i++) {
    float e = i < n ? expf(s[i] * scale - safe) : 0.0f;
    sum += e;
    store(p, fmt, i, e);
  }
  *l = *l * keep + sum;
  *m = top;
  return keep;
}

static void softmax_backward(float *s, float *dp, int64_t n, float scale, const float *lse,
                             const float *delta) {
  for (int64_t i = 0; i < n; i++) {
    s[i] = expf(s[i] * scale - lse[i]);
    dp[i] = s[i] * (dp[i] - delta[i]) * scale;
  }
}

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* 返回 a(x)，*slope 为 a'(x)。 */
static float act_of(dso_act_kind kind, float x, float *slope) {
  switch (kind) {
    case DSO_GELU: {
      float cdf = 0.5f * erfcf(-x * 0.70710678f);
      *slope = cdf + x * 0.39894228f * expf(-0.5f * x * x);
      return x * cdf;
    }
    case DSO_GELU_TANH: {
      float s = sigmoid(1.5957691f * x * (1.0f + 0.044715f * x * x));
      *slope = s + x * s * (1.0f - s) * 1.5957691f * (1.0f + 3 * 0.044715f * x * x);
      return x * s;
    }
    case DSO_RELU:
      *slope = x > 0.0f;
      return x < 0.0f ? 0.0f : x;
    case DSO_RELU2: {
      float r = x < 0.0f ? 0.0f : x;
      *slope = 2.0f * r;
      return r * r;
    }
    default: {
      float s = sigmoid(x);
      *slope = s + x * s * (1.0f - s);
      return x * s;
    }
  }
}

static float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

/* 截断的两种只差这两个数。 */
static float clip_alpha(const dso_act *act) { return act->kind == DSO_CLIPPED ? act->alpha : 1.0f; }
static float clip_shift(const dso_act *act) { return act->kind == DSO_CLIPPED ? 1.0f : 0.0f; }

static void activate(const dso_act *act, float *gate, const float *up, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float slope;
    if (dso_act_clips(act->kind)) {
      float g = gate[i] > act->limit ? act->limit : gate[i];
      gate[i] = g * sigmoid(clip_alpha(act) * g) *
                (clamp(up[i], -act->limit, act->limit) + clip_shift(act));
    } else {
      gate[i] = act_of(act->kind, gate[i], &slope) * (up ? up[i] : 1.0f);
    }
  }
}

static void activate_backward(const dso_act *act, float *g_dg, float *u_du, float *dh_h,
                              int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    float grad = dh_h[i], slope, g = g_dg[i], u = u_du ? u_du[i] : 1.0f;
    int g_free = 1, u_free = 1;
    float a;
    if (dso_act_clips(act->kind)) {
      float alpha = clip_alpha(act);
      /* NaN 不算自由：与 torch 的 clamp 一样，它的梯度为 0 */
      g_free = g <= act->limit, u_free = u <= act->limit && u >= -act->limit;
      g = g > act->limit ? act->limit : g, u = clamp(u, -act->limit, act->limit) + clip_shift(act);
      float s = sigmoid(alpha * g);
      a = g * s, slope = s + alpha * a * (1.0f - s);
    } else {
      a = act_of(act->kind, g, &slope);
    }
    dh_h[i] = a * u;
    g_dg[i] = g_free ? grad * u * slope : 0.0f;
    if (u_du) u_du[i] = u_free ? grad * a : 0.0f;
  }
}

static float vdot(const float *a, const float *b, int64_t n) {
  double acc = 0.0; /* 逐个累加，fp32 的误差随长度增长 */
  for (int64_t i = 0; i < n; i++) acc += (double)a[i] * b[i];
  return (float)acc;
}

static void vaxpy(float *y, float a, const float *x, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}

static void vscale(float *y, float a, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] *= a;
}

static float vamax(const float *x, int64_t n) {
  float top = 0.0f;
  for (int64_t i = 0; i < n; i++) {
    if (x[i] != x[i]) return x[i];
    top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
  }
  return top;
}

static float vmax(const float *x, int64_t n) {
  float top = -INFINITY;
  for (int64_t i = 0; i < n; i++) {
    if (x[i] != x[i]) return x[i];
    top = x[i] > top ? x[i] : top;
  }
  return top;
}

void dso_isa_init_scalar(dso_isa *isa) {
  *isa = (dso_isa){
      .name = "scalar",
      .to_f32 = to_f32,
      .from_f32 = from_f32,
      .stream = from_f32,
      .stream_end = stream_end,
      .pack_t = pack_t,
      .pack_n = pack_n,
      .gemm = gemm,
      .gemm_t = gemm_t,
      .dot = dot,
      .axpy_n = axpy_n,
      .pack_q = pack_q,
      .dot_q = dot_q,
      .dequant = dequant,
      .transpose = transpose,
      .softmax_row = softmax_row,
      .softmax_backward = softmax_backward,
      .activate = activate,
      .activate_backward = activate_backward,
      .vdot = vdot,
      .vaxpy = vaxpy,
      .vscale = vscale,
      .vamax = vamax,
      .vmax = vmax,
  };
}
