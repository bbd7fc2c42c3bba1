/* 逆累积分布抽样，不排序：先逐块求和（double 累加），找到跨过目标的块，再在块内逐个累加。
 * 求和的次序只取决于 n，所以结果与线程数无关。 */
#include <float.h>

#include "arena.h"
#include "sample.h"

enum { CHUNK = 1024 }; /* 每块的元素数：三块 fp32 都在一级缓存里 */

typedef struct {
  float *w, *q;
  double *sum; /* 各块的和 */
} view;

static size_t lay_out(int64_t n, void *base, view *v) {
  dso_arena arena = {base, 0};
  v->w = dso_take(&arena, CHUNK * sizeof(float));
  v->q = dso_take(&arena, CHUNK * sizeof(float));
  v->sum = dso_take(&arena, (size_t)dso_ceil_div(n, CHUNK) * sizeof(double));
  return arena.used;
}

size_t dso_pick_scratch(int64_t n) {
  view v;
  return lay_out(n, NULL, &v);
}

/* 第 c 块的权重写到 v->w，返回个数；p 或 q 里有 NaN、inf 时返回 -1。 */
static int64_t load_chunk(const dso_isa *isa, const dso_weights *in, int64_t c, const view *v) {
  int64_t first = c * CHUNK, n = dso_min(CHUNK, in->n - first);
  isa->to_f32(v->w, dso_at(in->p, in->p_dtype, first), in->p_dtype, n);
  int valid = isa->vmax(v->w, n) <= FLT_MAX;
  if (in->q) {
    isa->to_f32(v->q, dso_at(in->q, in->q_dtype, first), in->q_dtype, n);
    valid = valid && isa->vmax(v->q, n) <= FLT_MAX;
    for (int64_t i = 0; i < n; i++) v->w[i] -= v->q[i];
  }
  for (int64_t i = 0; i < n; i++) v->w[i] = v->w[i] > 0.0f ? v->w[i] : 0.0f;
  if (in->without >= first && in->without < first + n) v->w[in->without - first] = 0.0f;
  return valid ? n : -1;
}

double dso_sum(const float *w, int64_t n) {
  double lane[4] = {0};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int j = 0; j < 4; j++) lane[j] += w[i + j];
  for (; i < n; i++) lane[0] += w[i];
  return lane[0] + lane[1] + (lane[2] + lane[3]);
}

int64_t dso_pick(const dso_isa *isa, const dso_weights *weights, double u, void *scratch) {
  view v;
  lay_out(weights->n, scratch, &v);
  int64_t chunks = dso_ceil_div(weights->n, CHUNK), chosen = -1;
  double total = 0.0, before = 0.0, start = 0.0;
  for (int64_t c = 0; c < chunks; c++) {
    int64_t n = load_chunk(isa, weights, c, &v);
    if (n < 0) return DSO_PICK_INVALID;
    total += v.sum[c] = dso_sum(v.w, n);
  }
  if (!(total > 0.0)) return DSO_PICK_NOTHING;
  double target = u * total;
  for (int64_t c = 0; c < chunks; c++) { /* 舍入使得没有一块跨过时，是最后一个不空的块 */
    if (v.sum[c] <= 0.0) continue;
    chosen = c, start = before;
    before += v.sum[c];
    if (before > target) break;
  }
  int64_t n = load_chunk(isa, weights, chosen, &v), last = 0;
  for (int64_t i = 0; i < n && start <= target; i++)
    if (v.w[i] > 0.0f) last = i, start += v.w[i];
  return chosen * CHUNK + last;
}
