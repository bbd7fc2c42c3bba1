/* 一行的 RMS 归一化：rms_norm 与 mtp_input 共用。 */
#ifndef DSO_RMS_NORM_H
#define DSO_RMS_NORM_H

#include <math.h>

#include "isa/isa.h"

/* y [n]（dtype）= cast(v * rsqrt(mean(v²) + eps)) * weight；v [n] 用作中转，被改写。 */
static inline void dso_rms_norm_row(const dso_isa *isa, float *v, const float *weight, float eps,
                                    int64_t n, void *y, dso_dtype dtype) {
  float mean = isa->vdot(v, v, n) / (float)n;
  isa->vscale(v, 1.0f / sqrtf(mean + eps), n);
  if (dtype != DSO_F32) { /* 先舍入到 dtype 再取回：与“先存成该 dtype”的结果一致 */
    isa->from_f32(y, dtype, v, n);
    isa->to_f32(v, y, dtype, n);
  }
  for (int64_t i = 0; i < n; i++) v[i] *= weight[i];
  isa->from_f32(y, dtype, v, n);
}

#endif
