/* moe_route 与其反向共用的打分。 */
#ifndef DSO_MOE_ROUTE_H
#define DSO_MOE_ROUTE_H

#include "isa/isa.h"

enum { DSO_ROUTE_TOKENS = 16 }; /* 逐词元的阶段里每任务的词元数 */

/* s [n] = score(z [n])，fp32。z 里可以有无穷与 NaN，结果与数学定义一致（NaN 进则 NaN 出）。 */
void dso_route_scores(const dso_isa *isa, dso_score score, const float *z, int64_t n, float *s);

#endif
