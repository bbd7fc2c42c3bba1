/* 一个头的旋转，rope 与 mla_qkv_a 共用。 */
#ifndef DSO_ROPE_H
#define DSO_ROPE_H

#include "isa/isa.h"

/* 第 i 对的第 which 个数在 2 * half 个里的位置：pairs 为成对排列，否则前后两半。 */
static inline int64_t dso_pair_at(int pairs, int64_t half, int64_t i, int which) {
  return pairs ? 2 * i + which : i + which * half;
}

/* in、out [2 * half] 各自成对或前后两半；sign 为 -1 时反向转（转置）。 */
static inline void dso_rotate(const float *in, float *out, const float *cos, const float *sin,
                              int64_t half, int pairs_in, int pairs_out, float sign) {
  for (int64_t i = 0; i < half; i++) {
    float a = in[dso_pair_at(pairs_in, half, i, 0)], b = in[dso_pair_at(pairs_in, half, i, 1)];
    float s = sign * sin[i];
    out[dso_pair_at(pairs_out, half, i, 0)] = a * cos[i] - b * s;
    out[dso_pair_at(pairs_out, half, i, 1)] = b * cos[i] + a * s;
  }
}

#endif
