/* 逐行原语的向量实现，由 avx2.c、avx512.c 各包含一次（向量宽度 VL 与 v_* 由前面的头给出）。
 * 尾部不足 VL 的元素经栈上缓冲，绝不越界读写。 */

static inline __attribute__((always_inline)) vf load_full(const void *src, dso_dtype dtype) {
  switch (dtype) {
    case DSO_F32:
      return v_load((const float *)src);
    case DSO_BF16:
      return v_load_bf16((const uint16_t *)src);
    case DSO_F16:
      return v_load_f16((const uint16_t *)src);
    case DSO_F8:
      return v_load_f8((const uint8_t *)src);
    default:
      return v_load_i8((const int8_t *)src);
  }
}

static inline __attribute__((always_inline)) void store_full(void *dst, dso_dtype dtype, vf v) {
  switch (dtype) {
    case DSO_F32:
      v_store((float *)dst, v);
      break;
    case DSO_BF16:
      v_store_bf16((uint16_t *)dst, v);
      break;
    case DSO_F16:
      v_store_f16((uint16_t *)dst, v);
      break;
    case DSO_F8:
      v_store_f8((uint8_t *)dst, v);
      break;
    default:
      v_store_i8((int8_t *)dst, v_max(v_set1(-127.0f), v));
      break;
  }
}

/* n < VL 个元素，其余为 0。 */
static inline vf load_part(const void *src, dso_dtype dtype, int64_t n) {
  _Alignas(64) char buffer[VL * 4] = {0};
  memcpy(buffer, src, (size_t)(n * dso_size_of(dtype)));
  return load_full(buffer, dtype);
}

static inline void store_part(void *dst, dso_dtype dtype, vf v, int64_t n) {
  _Alignas(64) char buffer[VL * 4];
  store_full(buffer, dtype, v);
  memcpy(dst, buffer, (size_t)(n * dso_size_of(dtype)));
}

static inline __attribute__((always_inline)) void to_f32_as(float *dst, const void *src,
                                                            dso_dtype dtype, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) v_store(dst + i, load_full(dso_at(src, dtype, i), dtype));
  if (i < n) store_part(dst + i, DSO_F32, load_part(dso_at(src, dtype, i), dtype, n - i), n - i);
}

static void to_f32(float *dst, const void *src, dso_dtype dtype, int64_t n) {
  switch (dtype) {
    case DSO_F32:
      memcpy(dst, src, (size_t)n * 4);
      break;
    case DSO_BF16:
      to_f32_as(dst, src, DSO_BF16, n);
      break;
    case DSO_F16:
      to_f32_as(dst, src, DSO_F16, n);
      break;
    case DSO_F8:
      to_f32_as(dst, src, DSO_F8, n);
      break;
    default:
      to_f32_as(dst, src, DSO_I8, n);
      break;
  }
}

static inline __attribute__((always_inline)) void from_f32_as(void *dst, dso_dtype dtype,
                                                              const float *src, int64_t n) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store_full(dso_at_mut(dst, dtype, i), dtype, v_load(src + i));
  if (i < n)
    store_part(dso_at_mut(dst, dtype, i), dtype, load_part(src + i, DSO_F32, n - i), n - i);
}

static void from_f32(void *dst, dso_dtype dtype, const float *src, int64_t n) {
  switch (dtype) {
    case DSO_F32:
      memcpy(dst, src, (size_t)n * 4);
      break;
    case DSO_BF16:
      from_f32_as(dst, DSO_BF16, src, n);
      break;
    case DSO_F16:
      from_f32_as(dst, DSO_F16, src, n);
      break;
    case DSO_F8:
      from_f32_as(dst, DSO_F8, src, n);
      break;
    default:
      from_f32_as(dst, DSO_I8, src, n);
      break;
  }
}

/* exp：先化为 2^n * e^f，|f| <= ln2/2，六次多项式，误差约 1 ulp。NaN 原样传下去。 */
static inline vf v_exp(vf x) {
  x = v_min(v_set1(88.7f), v_max(v_set1(-104.0f), x));
  vf n = v_round(x * v_set1(1.44269504088896341f));
  vf f = v_fma(n, v_set1(-0.693359375f), x);
  f = v_fma(n, v_set1(2.12194440e-4f), f);
  vf p = v_set1(1.9875691500e-4f);
  p = v_fma(p, f, v_set1(1.3981999507e-3f));
  p = v_fma(p, f, v_set1(8.3334519073e-3f));
  p = v_fma(p, f, v_set1(4.1665795894e-2f));
  p = v_fma(p, f, v_set1(1.6666665459e-1f));
  p = v_fma(p, f, v_set1(5.0000001201e-1f));
  p = v_fma(p * f, f, f + v_set1(1.0f));
  return v_exp2_scale(p, n);
}

/* 行最大值；含 NaN 时不保证得到 NaN（随后的 exp 会传出 NaN）。 */
static inline float row_max(const float *s, int64_t n) {
  vf top = v_set1(-INFINITY);
  int64_t i = 0;
  for (; i + VL <= n; i += VL) top = v_max(top, v_load(s + i));
  float best = v_hmax(top);
  for (; i < n; i++) best = s[i] > best ? s[i] : best;
  return best;
}

static inline __attribute__((always_inline)) float softmax_row_as(const float *s, int64_t n,
                                                                  int64_t n_pad, float scale,
                                                                  float *m, float *l, void *p,
                                                                  dso_dtype fmt) {
  float top = n > 0 ? row_max(s, n) * scale : -INFINITY;
  top = *m > top ? *m : top;
  float safe = top == -INFINITY ? 0.0f : top, keep = *m == -INFINITY ? 0.0f : expf(*m - safe);
  vf mul = v_set1(scale), bias = v_set1(-safe), sum = v_set1(0.0f);
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    vf e = v_exp(v_fma(v_load(s + i), mul, bias));
    sum = sum + e;
    store_full(dso_at_mut(p, fmt, i), fmt, e);
  }
  float total = v_hsum(sum);
  if (i < n_pad) {
    float tail[VL] = {0};
    int64_t rest = n - i > 0 ? n - i : 0;
    v_store(tail, v_exp(v_fma(load_part(s + i, DSO_F32, rest), mul, bias)));
    for (int64_t j = 0; j < VL; j++) tail[j] = j < rest ? tail[j] : 0.0f;
    for (int64_t j = 0; j < rest; j++) total += tail[j];
    store_part(dso_at_mut(p, fmt, i), fmt, v_load(tail), dso_min(VL, n_pad - i));
    for (i += VL; i < n_pad; i += VL)
      store_part(dso_at_mut(p, fmt, i), fmt, v_set1(0.0f), dso_min(VL, n_pad - i));
  }
  *l = *l * keep + total;
  *m = top;
  return keep;
}

static float softmax_row(const float *s, int64_t n, int64_t n_pad, float scale, float *m, float *l,
                         void *p, dso_dtype fmt) {
  return fmt == DSO_BF16 ? softmax_row_as(s, n, n_pad, scale, m, l, p, DSO_BF16)
                         : softmax_row_as(s, n, n_pad, scale, m, l, p, DSO_F32);
}

static void softmax_backward(float *s, float *dp, int64_t n, float scale, const float *lse,
                             const float *delta) {
  vf mul = v_set1(scale);
  for (int64_t i = 0; i < n; i += VL) {
    int64_t width = dso_min(VL, n - i);
    if (width == VL) {
      vf e = v_exp(v_load(s + i) * mul - v_load(lse + i));
      v_store(s + i, e);
      v_store(dp + i, e * (v_load(dp + i) - v_load(delta + i)) * mul);
    } else {
      vf e = v_exp(load_part(s + i, DSO_F32, width) * mul - load_part(lse + i, DSO_F32, width));
      store_part(s + i, DSO_F32, e, width);
      vf g = load_part(dp + i, DSO_F32, width) - load_part(delta + i, DSO_F32, width);
      store_part(dp + i, DSO_F32, e * g * mul, width);
    }
  }
}

static inline vf v_sigmoid(vf x) { return v_set1(1.0f) / (v_set1(1.0f) + v_exp(v_set1(0.0f) - x)); }

#include "simd_act.h"

static float vdot(const float *a, const float *b, int64_t n) {
  vf s0 = v_set1(0.0f), s1 = s0;
  int64_t i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    s0 = v_fma(v_load(a + i), v_load(b + i), s0);
    s1 = v_fma(v_load(a + i + VL), v_load(b + i + VL), s1);
  }
  float sum = v_hsum(s0 + s1);
  for (; i < n; i++) sum += a[i] * b[i];
  return sum;
}

static void vaxpy(float *y, float a, const float *x, int64_t n) {
  vf k = v_set1(a);
  int64_t i = 0;
  for (; i + VL <= n; i += VL) v_store(y + i, v_fma(k, v_load(x + i), v_load(y + i)));
  for (; i < n; i++) y[i] += a * x[i];
}

static void vscale(float *y, float a, int64_t n) {
  vf k = v_set1(a);
  int64_t i = 0;
  for (; i + VL <= n; i += VL) v_store(y + i, k * v_load(y + i));
  for (; i < n; i++) y[i] *= a;
}

static float vamax(const float *x, int64_t n) {
  vf top = v_set1(0.0f), probe = top;
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    vf v = v_load(x + i);
    top = v_max(top, v_abs(v));
    probe = probe + (v - v); /* 有 NaN 或无穷则为 NaN */
  }
  float best = v_hmax(top), odd = v_hsum(probe);
  for (; i < n; i++) {
    best = fabsf(x[i]) > best ? fabsf(x[i]) : best;
    odd += x[i] - x[i];
  }
  return odd == odd ? best : (best == INFINITY ? INFINITY : NAN);
}

static float vmax(const float *x, int64_t n) {
  vf top = v_set1(-INFINITY), probe = v_set1(0.0f);
  int64_t i = 0;
  for (; i + VL <= n; i += VL) {
    vf v = v_load(x + i);
    top = v_max(top, v);
    probe = v_fma(v_min(v_set1(1.0f), v_max(v_set1(-1.0f), v)), v_set1(0.0f), probe);
  }
  float best = v_hmax(top), odd = v_hsum(probe); /* 夹到 [-1, 1] 之后只有 NaN 乘 0 不得 0 */
  for (; i < n; i++) {
    best = x[i] > best ? x[i] : best;
    odd += x[i] != x[i] ? NAN : 0.0f;
  }
  return odd == odd ? best : NAN;
}
