/* 激活函数及其导数的向量实现，由 simd_rows.h 包含；kind 在编译时展开。 */

typedef int vi __attribute__((vector_size(sizeof(vf)))); /* 比较的结果：全 0 或全 1 */

static inline vf v_where(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

/* 标准正态的分布函数 Φ(x)；Abramowitz 与 Stegun 7.1.26，绝对误差 1.5e-7，负的一侧没有相消。 */
static inline vf v_normal_cdf(vf x, vf bell) {
  vf z = v_max(x, v_set1(0.0f) - x) * v_set1(0.70710678f);
  vf t = v_set1(1.0f) / v_fma(z, v_set1(0.3275911f), v_set1(1.0f));
  vf q = v_fma(t, v_set1(1.061405429f), v_set1(-1.453152027f));
  q = v_fma(t, q, v_set1(1.421413741f));
  q = v_fma(t, q, v_set1(-0.284496736f));
  q = v_fma(t, q, v_set1(0.254829592f)) * t * bell * v_set1(0.5f);
  return v_where(x < v_set1(0.0f), q, v_set1(1.0f) - q);
}

/* 返回 a(x)，*slope 为 a'(x)（不用时由编译器去掉）。 */
static inline __attribute__((always_inline)) vf v_act(dso_act_kind kind, vf x, vf *slope) {
  vf one = v_set1(1.0f), zero = v_set1(0.0f);
  if (kind == DSO_GELU) {
    vf bell = v_exp(x * x * v_set1(-0.5f)), cdf = v_normal_cdf(x, bell);
    *slope = v_fma(x * v_set1(0.39894228f), bell, cdf);
    return x * cdf;
  }
  if (kind == DSO_GELU_TANH) {
    vf square = x * x * v_set1(0.044715f);
    vf s = v_sigmoid(x * v_fma(square, v_set1(1.5957691f), v_set1(1.5957691f)));
    vf inner = v_fma(square, v_set1(3 * 1.5957691f), v_set1(1.5957691f));
    *slope = v_fma(x * s * (one - s), inner, s);
    return x * s;
  }
  if (kind == DSO_RELU) {
    *slope = v_where(x > zero, one, zero);
    return v_max(zero, x);
  }
  if (kind == DSO_RELU2) {
    vf r = v_max(zero, x);
    *slope = r + r;
    return r * r;
  }
  vf s = v_sigmoid(x), a = x * s; /* DSO_SILU */
  *slope = v_fma(a, one - s, s);
  return a;
}

static inline __attribute__((always_inline)) vf v_gated(const dso_act *act, dso_act_kind kind, vf g,
                                                        vf u, int has_up) {
  vf slope;
  if (dso_act_clips(kind)) {
    vf limit = v_set1(act->limit);
    g = v_min(limit, g), u = v_max(v_set1(-act->limit), v_min(limit, u));
    if (kind == DSO_CLIPPED_SILU) return g * v_sigmoid(g) * u;
    return g * v_sigmoid(g * v_set1(act->alpha)) * (u + v_set1(1.0f));
  }
  vf a = v_act(kind, g, &slope);
  if (has_up) a = a * u;
  return a;
}

/* g、u、dh 换成 dg、du、h。 */
static inline __attribute__((always_inline)) void v_gated_backward(const dso_act *act,
                                                                   dso_act_kind kind, vf *g, vf *u,
                                                                   vf *dh, int has_up) {
  vf grad = *dh, one = v_set1(1.0f), zero = v_set1(0.0f), slope;
  if (dso_act_clips(kind)) {
    int silu = kind == DSO_CLIPPED_SILU;
    vf limit = v_set1(act->limit), low = v_set1(-act->limit);
    vf alpha = silu ? one : v_set1(act->alpha), shift = silu ? zero : one;
    vi g_free = *g <= limit, u_free = (*u <= limit) & (*u >= low);
    vf x = v_min(limit, *g), y = v_max(low, v_min(limit, *u)) + shift;
    vf s = v_sigmoid(x * alpha), a = x * s;
    *dh = a * y;
    *g = v_where(g_free, grad * y * v_fma(alpha * a, one - s, s), zero);
    *u = v_where(u_free, grad * a, zero);
    return;
  }
  vf a = v_act(kind, *g, &slope);
  if (!has_up) {
    *g = grad * slope, *dh = a;
    return;
  }
  *g = grad * *u * slope, *dh = a * *u, *u = grad * a;
}

/* 至多一个向量；整的不经栈上缓冲。 */
static inline __attribute__((always_inline)) vf load_some(const float *src, int64_t n) {
  return n >= VL ? v_load(src) : load_part(src, DSO_F32, n);
}

static inline __attribute__((always_inline)) void store_some(float *dst, vf v, int64_t n) {
  if (n >= VL)
    v_store(dst, v);
  else
    store_part(dst, DSO_F32, v, n);
}

static inline __attribute__((always_inline)) void activate_as(const dso_act *act, dso_act_kind kind,
                                                              float *g, const float *u, int64_t n) {
  int has_up = u != NULL;
  vf up = v_set1(0.0f);
  for (int64_t i = 0; i < n; i += VL) {
    if (has_up) up = load_some(u + i, n - i);
    store_some(g + i, v_gated(act, kind, load_some(g + i, n - i), up, has_up), n - i);
  }
}

static inline __attribute__((always_inline)) void activate_backward_as(const dso_act *act,
                                                                       dso_act_kind kind, float *g,
                                                                       float *u, float *dh,
                                                                       int64_t n) {
  int has_up = u != NULL;
  vf up = v_set1(0.0f);
  for (int64_t i = 0; i < n; i += VL) {
    vf gate = load_some(g + i, n - i), grad = load_some(dh + i, n - i);
    if (has_up) up = load_some(u + i, n - i);
    v_gated_backward(act, kind, &gate, &up, &grad, has_up);
    store_some(g + i, gate, n - i);
    store_some(dh + i, grad, n - i);
    if (has_up) store_some(u + i, up, n - i);
  }
}

#define EACH_ACT(X) \
  X(DSO_GELU) X(DSO_GELU_TANH) X(DSO_RELU) X(DSO_RELU2) X(DSO_CLIPPED) X(DSO_CLIPPED_SILU)

static void activate(const dso_act *act, float *g, const float *u, int64_t n) {
#define CASE(KIND)                   \
  case KIND:                         \
    activate_as(act, KIND, g, u, n); \
    break;
  switch (act->kind) {
    EACH_ACT(CASE)
    default:
      activate_as(act, DSO_SILU, g, u, n);
      break;
  }
#undef CASE
}

static void activate_backward(const dso_act *act, float *g, float *u, float *dh, int64_t n) {
#define CASE(KIND)                                \
  case KIND:                                      \
    activate_backward_as(act, KIND, g, u, dh, n); \
    break;
  switch (act->kind) {
    EACH_ACT(CASE)
    default:
      activate_backward_as(act, DSO_SILU, g, u, dh, n);
      break;
  }
#undef CASE
}
