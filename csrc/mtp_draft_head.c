/* mtp_draft_head：各行的草稿 argmax_v (W x + b)_v，不写出 logits；可以只看词表的一部分。
 *
 * 阶段 0  x 不是计算格式时转成 fp32；
 * 阶段 1  每任务一段候选的词元：与 linear 的解码路径同样的点积，每行只留下这一段里最大的值与下标；
 * 阶段 2  每行在各段里取最大的。
 * 候选的下标相邻的一段一次算完，权重原地读：只读用到的行。分数留在 fp32，不舍入成 x 的 dtype。
 */
#include <math.h>
#include <string.h>

#include "arena.h"
#include "gemm.h"

typedef struct {
  void *x;        /* 转成 fp32 的 x [M, K] */
  float *best;    /* [段, M]：各段各行的最大值；有 NaN 时是 NaN */
  int64_t *where; /* [段, M]：它是第几个候选 */
  size_t bytes;
} scratch;

static int64_t parts(const dso_mtp_draft_head_params *p) {
  return dso_ceil_div(p->count, dso_dot_columns(p->k, p->weight.dtype));
}

static scratch lay_out(const dso_mtp_draft_head_params *p, void *base) {
  dso_arena arena = {base, 0};
  scratch s;
  s.x = dso_take(&arena, (size_t)(p->m * p->k) * 4);
  s.best = dso_take(&arena, (size_t)(parts(p) * p->m) * sizeof(float));
  s.where = dso_take(&arena, (size_t)(parts(p) * p->m) * sizeof(int64_t));
  s.bytes = arena.used;
  return s;
}

static dso_plan plan(const void *params, const dso_isa *isa) {
  const dso_mtp_draft_head_params *p = params;
  (void)isa;
  return (dso_plan){3, lay_out(p, NULL).bytes, (size_t)DSO_DOT_MAX_M * DSO_DOT_MAX_N * 4,
                    p->m * p->count * p->k};
}

static int64_t tasks(const void *params, int64_t stage) {
  const dso_mtp_draft_head_params *p = params;
  if (stage == 0) return p->x.dtype != DSO_F32 ? p->m : 0;
  return stage == 1 ? parts(p) : 1;
}

static dso_dtype format(const dso_isa *isa, const dso_mtp_draft_head_params *p) {
  return dso_compute_format(isa, p->x.dtype == DSO_BF16 && p->weight.dtype == DSO_BF16);
}

static int64_t token_at(const dso_mtp_draft_head_params *p, int64_t i) {
  return p->vocabulary ? p->vocabulary[i] : i;
}

/* 从候选 i 起（不到 end）下标相邻的有几个。 */
static int64_t run_length(const dso_mtp_draft_head_params *p, int64_t i, int64_t end) {
  if (!p->vocabulary) return end - i;
  int64_t n = 1;
  while (i + n < end && p->vocabulary[i + n] == p->vocabulary[i] + n) n++;
  return n;
}

static void add_bias(const dso_mtp_draft_head_params *p, const dso_isa *isa, int64_t first,
                     int64_t n, float *c, int64_t rows, int64_t ldc) {
  float bias[DSO_DOT_MAX_N];
  isa->to_f32(bias, dso_at(p->bias, p->weight.dtype, first), p->weight.dtype, n);
  for (int64_t i = 0; i < rows; i++) isa->vaxpy(c + i * ldc, 1.0f, bias, n);
}

/* 行 [row, row + rows) 对候选 [begin, begin + n) 的分数 c [rows, n]。 */
static void dots(const dso_ctx *ctx, const dso_mat *x, dso_dtype fmt, int64_t rows, int64_t begin,
                 int64_t n) {
  const dso_mtp_draft_head_params *p = ctx->params;
  float *c = ctx->worker;
  memset(c, 0, (size_t)(rows * n) * 4);
  for (int64_t i = 0, run; i < n; i += run) {
    int64_t first = token_at(p, begin + i);
    run = run_length(p, begin + i, begin + n);
    if (p->k)
      ctx->isa->dot(fmt, rows, run, p->k, x->data, x->rs,
                    dso_at(p->weight.data, p->weight.dtype, first * p->weight.rs), p->weight.dtype,
                    p->weight.rs, c + i, n);
    if (p->bias) add_bias(p, ctx->isa, first, run, c + i, rows, n);
  }
}

static void score(const dso_ctx *ctx, int64_t part) {
  const dso_mtp_draft_head_params *p = ctx->params;
  scratch s = lay_out(p, ctx->shared);
  dso_dtype fmt = format(ctx->isa, p);
  dso_mat x = p->x.dtype == fmt ? p->x : (dso_mat){s.x, p->k, DSO_F32};
  int64_t block = dso_dot_columns(p->k, p->weight.dtype), begin = part * block,
          n = dso_min(block, p->count - begin);
  for (int64_t r0 = 0; r0 < p->m; r0 += DSO_DOT_MAX_M) {
    int64_t rows = dso_min(DSO_DOT_MAX_M, p->m - r0);
    dso_mat some = {dso_at(x.data, fmt, r0 * x.rs), x.rs, fmt};
    dots(ctx, &some, fmt, rows, begin, n);
    for (int64_t r = 0; r < rows; r++) {
      const float *row = (float *)ctx->worker + r * n;
      float top = ctx->isa->vmax(row, n);
      int64_t at = 0;
      while (top == top && row[at] != top) at++;
      s.best[part * p->m + r0 + r] = top, s.where[part * p->m + r0 + r] = begin + at;
    }
  }
}

static void choose(const dso_ctx *ctx) {
  const dso_mtp_draft_head_params *p = ctx->params;
  scratch s = lay_out(p, ctx->shared);
  for (int64_t r = 0; r < p->m; r++) {
    float best = s.best[r];
    int64_t where = s.where[r];
    for (int64_t part = 1; part < parts(p) && best == best; part++) {
      float other = s.best[part * p->m + r];
      if (other > best || other != other) best = other, where = s.where[part * p->m + r];
    }
    p->token[r] = best == best ? token_at(p, where) : -1;
  }
}

static void run(const dso_ctx *ctx, int64_t task) {
  const dso_mtp_draft_head_params *p = ctx->params;
  if (ctx->stage == 0) {
    if (format(ctx->isa, p) == DSO_F32)
      ctx->isa->to_f32((float *)lay_out(p, ctx->shared).x + task * p->k,
                       dso_at(p->x.data, p->x.dtype, task * p->x.rs), p->x.dtype, p->k);
  } else if (ctx->stage == 1) {
    score(ctx, task);
  } else {
    choose(ctx);
  }
}

const dso_op dso_mtp_draft_head = {"mtp_draft_head", plan, tasks, run};
