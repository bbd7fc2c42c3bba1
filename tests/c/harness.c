#define _POSIX_C_SOURCE 200112L
#include "harness.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "isa/convert.h"

enum { MOST_BUFFERS = 4096, ALIGN = 64, WORKERS = 3, MOST_PRINTED = 40 };

static uint64_t state = 1;
static void *owned[MOST_BUFFERS];
static int n_owned;
static long passed, failed;

void seed_random(uint64_t seed) { state = seed * 0x9e3779b97f4a7c15u + 1; }

uint64_t random_bits(void) { /* xorshift64* */
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return state * 0x2545f4914f6cdd1du;
}

int64_t random_below(int64_t n) {
  return n > 0 ? (int64_t)((random_bits() >> 11) % (uint64_t)n) : 0;
}

double random_normal(void) {
  double u = ((double)(random_bits() >> 11) + 1.0) * 0x1p-53,
         v = (double)(random_bits() >> 11) * 0x1p-53;
  return sqrt(-2.0 * log(u)) * cos(6.283185307179586 * v);
}

static void *own(size_t bytes, size_t align) {
  void *p = NULL;
  /* 大小为 0 时也要一个合法地址；多出的 1 字节被 ASan 的红区代替不了，但也读不到有意义的东西。 */
  if (posix_memalign(&p, align, bytes ? bytes : 1) || n_owned == MOST_BUFFERS) {
    fprintf(stderr, "测试的缓冲用完了\n");
    exit(2);
  }
  owned[n_owned++] = p;
  return p;
}

void free_all(void) {
  while (n_owned > 0) free(owned[--n_owned]);
}

buf new_buf(dso_dtype dtype, int64_t n) {
  size_t bytes = (size_t)(n * dso_size_of(dtype));
  buf b = {n, dtype, own(bytes, 16)};
  memset(b.data, 0xff, bytes);
  return b;
}

buf new_zeros(dso_dtype dtype, int64_t n) {
  buf b = new_buf(dtype, n);
  memset(b.data, 0, (size_t)(n * dso_size_of(dtype)));
  return b;
}

buf new_random(dso_dtype dtype, int64_t n, double scale) {
  buf b = new_buf(dtype, n);
  for (int64_t i = 0; i < n; i++)
    put(&b, i, dtype == DSO_I8 ? (double)(random_below(255) - 127) : random_normal() * scale);
  return b;
}

double *doubles(int64_t n) {
  double *p = own((size_t)n * sizeof(double), 16);
  for (int64_t i = 0; i < n; i++) p[i] = 0.0;
  return p;
}

double get(const buf *b, int64_t i) {
  switch (b->dtype) {
    case DSO_F32:
      return ((const float *)b->data)[i];
    case DSO_BF16:
      return dso_bf16_to_f32(((const uint16_t *)b->data)[i]);
    case DSO_F16:
      return dso_f16_to_f32(((const uint16_t *)b->data)[i]);
    case DSO_F8:
      return dso_f8_to_f32(((const uint8_t *)b->data)[i]);
    default:
      return ((const int8_t *)b->data)[i];
  }
}

void put(const buf *b, int64_t i, double v) {
  switch (b->dtype) {
    case DSO_F32:
      ((float *)b->data)[i] = (float)v;
      break;
    case DSO_BF16:
      ((uint16_t *)b->data)[i] = dso_f32_to_bf16((float)v);
      break;
    case DSO_F16:
      ((uint16_t *)b->data)[i] = dso_f32_to_f16((float)v);
      break;
    case DSO_F8:
      ((uint8_t *)b->data)[i] = dso_f32_to_f8((float)v);
      break;
    default:
      ((int8_t *)b->data)[i] = (int8_t)v;
  }
}

void check(int ok, const char *format, ...) {
  if (ok) {
    passed++;
    return;
  }
  if (failed++ >= MOST_PRINTED) return;
  va_list args;
  va_start(args, format);
  fprintf(stderr, "失败：");
  vfprintf(stderr, format, args);
  fprintf(stderr, "\n");
  va_end(args);
}

int report(void) {
  printf("%ld passed, %ld failed\n", passed, failed);
  return failed != 0;
}

const char *dtype_name(dso_dtype dtype) {
  static const char *const names[] = {"f32", "bf16", "f16", "i8", "i4", "f8"};
  return names[dtype];
}

double tolerance(dso_dtype dtype) {
  return dtype == DSO_F32 ? 2e-5 : dtype == DSO_F16 ? 3e-3 : 2e-2;
}

void check_close(const char *what, const buf *got, const double *want, double tol, double scale) {
  double worst = 0.0;
  int64_t at = -1;
  for (int64_t i = 0; i < got->n; i++) {
    double g = get(got, i), error = fabs(g - want[i]) / (scale + fabs(want[i]));
    if (isnan(g) != isnan(want[i])) error = INFINITY;
    if (g == want[i] || isnan(want[i])) error = isnan(g) == isnan(want[i]) ? 0.0 : error;
    if (error > worst) worst = error, at = i;
  }
  check(worst <= tol, "%s：第 %lld 个（共 %lld）得 %g，应为 %g，误差 %.2e > %.2e", what,
        (long long)at, (long long)got->n, at < 0 ? 0.0 : get(got, at), at < 0 ? 0.0 : want[at],
        worst, tol);
}

int list_isas(const dso_isa **isas, int most) {
  char names[128], *save = names;
  int n = 0;
  snprintf(names, sizeof names, "%s", dso_isa_available());
  while (save && n < most) {
    char *comma = strchr(save, ',');
    if (comma) *comma = 0;
    check(dso_isa_set(save) == 0, "切换到 %s", save);
    isas[n++] = dso_isa_current();
    save = comma ? comma + 1 : NULL;
  }
  return n;
}

/* order 为 NULL 时串行；否则按 order 的次序，工人随机。 */
static void run_stages(const dso_op *op, const void *params, const dso_isa *isa, int shuffled) {
  dso_plan plan = op->plan(params, isa);
  void *shared = own(plan.shared_bytes, ALIGN), *workers[WORKERS];
  memset(shared, 0xff, plan.shared_bytes);
  for (int i = 0; i < WORKERS; i++) {
    workers[i] = own(plan.worker_bytes, ALIGN);
    memset(workers[i], 0xff, plan.worker_bytes);
  }
  for (int64_t stage = 0; stage < plan.stages; stage++) {
    int64_t tasks = op->tasks(params, stage);
    int64_t *order = malloc((size_t)(tasks + 1) * sizeof *order);
    for (int64_t i = 0; i < tasks; i++) {
      int64_t j = shuffled ? random_below(i + 1) : i;
      order[i] = order[j];
      order[j] = i;
    }
    for (int64_t i = 0; i < tasks; i++) {
      dso_ctx ctx = {params, isa, stage, shared, workers[shuffled ? random_below(WORKERS) : 0]};
      op->run(&ctx, order[i]);
    }
    free(order);
  }
}

void execute(const char *what, const dso_op *op, const void *params, const dso_isa *isa, buf **outs,
             int n_outs) {
  void *before[8], *first[8];
  for (int i = 0; i < n_outs; i++) {
    size_t bytes = (size_t)(outs[i]->n * dso_size_of(outs[i]->dtype));
    before[i] = own(bytes, 16), first[i] = own(bytes, 16);
    memcpy(before[i], outs[i]->data, bytes);
  }
  run_stages(op, params, isa, 0);
  for (int i = 0; i < n_outs; i++) {
    size_t bytes = (size_t)(outs[i]->n * dso_size_of(outs[i]->dtype));
    memcpy(first[i], outs[i]->data, bytes);
    memcpy(outs[i]->data, before[i], bytes);
  }
  run_stages(op, params, isa, 1);
  for (int i = 0; i < n_outs; i++) {
    size_t bytes = (size_t)(outs[i]->n * dso_size_of(outs[i]->dtype));
    check(memcmp(first[i], outs[i]->data, bytes) == 0, "%s（%s，%s）：输出 %d 随任务次序变化", what,
          op->name, isa->name, i);
  }
}
