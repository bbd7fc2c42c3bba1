/* 一个头的旋转，rope 与 mla_qkv_a 共用。 */
#ifndef DSO_ROPE_H
#define DSO_ROPE_H

#include "isa/isa.h"

/* out [2 * half]：前后两半；in 成对（interleaved）或前后两半。 */
static inline void dso_rotate(const float *in, float *out, const float *cos, const float *sin,
                              int64_t half, int interleaved) {
  for (int64_t i = 0; i < half; i++) {
    float a = interleaved ? in[2 * i] : in[i], b = interleaved ? in[2 * i + 1] : in[i + half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + half] = b * cos[i] + a * sin[i];
  }
}

#endif
