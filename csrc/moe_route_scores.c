/* 路由的打分函数；见 moe_route.h。
 *
 * 三种打分都只要 exp：借 softmax_row 按指令集算。它不管无穷与 NaN，那样的行改用 libm。
 */
#include <float.h>
#include <math.h>

#include "moe_route.h"

static void softmax(const dso_isa *isa, const float *z, int64_t n, float *s, int finite) {
  float top = -INFINITY, sum = 0.0f;
  if (finite) {
    isa->softmax_row(z, n, n, 1.0f, &top, &sum, s, DSO_F32);
  } else {
    for (int64_t i = 0; i < n; i++) top = z[i] > top ? z[i] : top;
    for (int64_t i = 0; i < n; i++) sum += s[i] = expf(z[i] - top);
  }
  isa->vscale(s, 1.0f / sum, n);
}

/* s = exp(-|z|)：指数不大于 0，不会溢出；sigmoid 与 softplus 都可由它稳定地得到。 */
static void exp_minus_abs(const dso_isa *isa, const float *z, int64_t n, float *s, int finite) {
  for (int64_t i = 0; i < n; i++) s[i] = fabsf(z[i]);
  if (finite) {
    float top = 0.0f, sum = 0.0f; /* 起始最大值 0：-|z| 都不超过它，不会被平移 */
    isa->softmax_row(s, n, n, -1.0f, &top, &sum, s, DSO_F32);
  } else {
    for (int64_t i = 0; i < n; i++) s[i] = expf(-s[i]);
  }
}

void dso_route_scores(const dso_isa *isa, dso_score score, const float *z, int64_t n, float *s) {
  int finite = isa->vamax(z, n) <= FLT_MAX;
  if (score == DSO_SCORE_SOFTMAX) {
    softmax(isa, z, n, s, finite);
    return;
  }
  exp_minus_abs(isa, z, n, s, finite);
  if (score == DSO_SCORE_SIGMOID)
    for (int64_t i = 0; i < n; i++) s[i] = (z[i] >= 0.0f ? 1.0f : s[i]) / (1.0f + s[i]);
  else
    for (int64_t i = 0; i < n; i++) s[i] = sqrtf((z[i] > 0.0f ? z[i] : 0.0f) + log1pf(s[i]));
}
