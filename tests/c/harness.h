/* C 核测试的小框架：大小恰好的堆缓冲（ASan 因此能看到任何越界）、随机数、按 dtype 比较、
 * 把算子串行执行一遍，再以打乱的任务次序执行一遍并要求逐位相同。 */
#ifndef DSO_TEST_HARNESS_H
#define DSO_TEST_HARNESS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "isa/isa.h"

/* 一个大小恰好的堆缓冲；value 是各元素的 double 值（参考计算用）。 */
typedef struct {
  int64_t n;
  dso_dtype dtype;
  void *data;
} buf;

void seed_random(uint64_t seed);
uint64_t random_bits(void);
int64_t random_below(int64_t n);
double random_normal(void);

buf new_buf(dso_dtype dtype, int64_t n);                  /* 内容为 0xff：浮点读出来是 NaN */
buf new_random(dso_dtype dtype, int64_t n, double scale); /* 正态；int8 为 [-127, 127] 均匀 */
buf new_zeros(dso_dtype dtype, int64_t n);
double get(const buf *b, int64_t i);
void put(const buf *b, int64_t i, double v);
double *doubles(int64_t n); /* 清零；与 buf 一样由 free_all 释放 */
void free_all(void);

/* 每次检查记一次通过或失败；失败打印说明。 */
void check(int ok, const char *format, ...) __attribute__((format(printf, 2, 3)));
int report(void); /* 打印 'N passed, N failed'，返回失败数 */
const char *dtype_name(dso_dtype dtype);
double tolerance(dso_dtype dtype);
/* 逐元素 |got - want| <= tol * (scale + |want|)；NaN 的位置要一致。 */
void check_close(const char *what, const buf *got, const double *want, double tol, double scale);

/* 可用的指令集；返回个数。 */
int list_isas(const dso_isa **isas, int most);
/* 执行一个算子两遍（串行；打乱任务次序、多个工人），outs 的内容要逐位相同。
 * 暂存的大小恰好是 plan 所报的，内容预先填 NaN。 */
void execute(const char *what, const dso_op *op, const void *params, const dso_isa *isa, buf **outs,
             int n_outs);

void test_select(void);
void test_isa(void);
void test_dense(void);
void test_rows(void);
void test_mla(void);
void test_moe(void);
void test_moe_route(void);
void test_quant(void);
void test_mtp(void);

#endif
