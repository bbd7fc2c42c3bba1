/* 按权重抽取一个下标：sample_tokens 与 mtp_verify_sample 共用。 */
#ifndef DSO_SAMPLE_H
#define DSO_SAMPLE_H

#include "isa/isa.h"

/* 权重 w = p；有 q 时是 max(0, p - q)；without >= 0 时第 without 个是 0。 */
typedef struct {
  int64_t n;
  const void *p, *q; /* q 可为 NULL */
  dso_dtype p_dtype, q_dtype;
  int64_t without;
} dso_weights;

enum { DSO_PICK_NOTHING = -1, DSO_PICK_INVALID = -2 }; /* 权重全是 0；p 或 q 里有 NaN、inf */

size_t dso_pick_scratch(int64_t n); /* 字节 */

/* 第一个累计权重超过 u * 总和的下标（u 在 [0, 1)），权重为 0 的绝不会被抽到；或上面的两个负数。 */
int64_t dso_pick(const dso_isa *isa, const dso_weights *weights, double u, void *scratch);

/* Σ w，double 累加，次序只取决于 n。 */
double dso_sum(const float *w, int64_t n);

#endif
