/* moe_experts 与其反向共用：行的划分、中间量的位置、专家权重上的矩阵乘、激活。 */
#ifndef DSO_MOE_EXPERTS_H
#define DSO_MOE_EXPERTS_H

#include "gemm.h"

enum {
  DSO_MOE_GATHER = 16,     /* 收集阶段每任务的行数 */
  DSO_MOE_PACK = 8,        /* 打包每任务的行数：一个词元时只有一个任务，不惊动别的线程 */
  DSO_MOE_SEGMENT = 2048,  /* 累加阶段每任务的词元数上限：累加器放得进二级缓存 */
  DSO_MOE_AXPY_ROWS = 8,   /* 转置的权重：至此直接读，再多则打包 */
  DSO_MOE_QUANT_ROWS = 16, /* 量化的权重：至此边读边解，再多则先解开（只解一遍） */
  DSO_MOE_WIDE = 512,      /* 反向的宽块；DSO_DOT_MAX_M 行时放得进 DSO_MOE_BLOCK */
  DSO_MOE_BLOCK = DSO_MB * DSO_NB
};

static inline int64_t dso_moe_rows(const dso_moe_inputs *in, int64_t e) {
  return in->begin[e + 1] - in->begin[e];
}

static inline int64_t dso_moe_total(const dso_moe_inputs *in) { return in->begin[in->experts]; }

/* 权重都是 bf16 且 x 也是时用 bf16 点积。 */
static inline dso_dtype dso_moe_format(const dso_isa *isa, const dso_moe_inputs *in) {
  return dso_compute_format(isa, in->all_bf16);
}

/* 前缀和 at [count + 1] 里 task 所属的一段：at[i] <= task < at[i + 1]。 */
static inline int64_t dso_moe_find(const int64_t *at, int64_t count, int64_t task) {
  int64_t low = 0;
  while (count - low > 1) {
    int64_t middle = low + (count - low) / 2;
    if (at[middle] <= task)
      low = middle;
    else
      count = middle;
  }
  return low;
}

static inline int dso_moe_is_quantized(const dso_mat *w) {
  return w->dtype == DSO_I8 || w->dtype == DSO_I4 || w->dtype == DSO_F8;
}

/* 行数少时直接读权重，不打包；没有量化的权重。 */
static inline int dso_moe_is_direct_plain(const dso_moe_inputs *in, int64_t m) {
  return m <= (in->transposed ? DSO_MOE_AXPY_ROWS : DSO_DOT_MAX_M);
}

/* 一次调用里的专家：有量化的就按它们的界（其余的至 DSO_DOT_MAX_M 仍直接读）。 */
static inline int dso_moe_is_direct(const dso_moe_inputs *in, int64_t m) {
  if (in->quantized) return m <= DSO_MOE_QUANT_ROWS;
  return dso_moe_is_direct_plain(in, m);
}

/* 量化而行数少的专家：边读边解，它的行先由 pack_q 打包。返回打包的行距（字节），不是这样的为 0。 */
static inline int64_t dso_moe_packed_stride(const dso_moe_inputs *in, int64_t e) {
  return in->packed_at[e] < in->packed_at[e + 1] ? (int64_t)dso_pack_q_bytes(in->widest) : 0;
}

/* out [m, nc] = a [m, k] · W 的第 [n0, n0 + nc) 列（再加偏置）；ldc >= nc 按 16 取整。 */
typedef struct {
  int64_t m, k, n0, nc;
  const void *a; /* 计算格式，行距 k；packed_stride 不为 0 时是打包的行（量化的 w） */
  dso_mat w;
  const void *bias; /* 可为 NULL */
  dso_dtype bias_dtype;
  int64_t bias_step;
  const dso_quant *quant; /* 只用于量化的 w */
  int64_t packed_stride;
  const void *next; /* 接下来要读的权重，见 dot_q */
} dso_moe_product;

typedef struct {
  float *rows;    /* 转置：A 转成 fp32，[至多 DSO_MOE_AXPY_ROWS, widest] */
  void *unpacked; /* 量化：解开的一段权重；全部边读边解时没有 */
  void *scratch;  /* dso_gemm_scratch()；全部直接读时没有 */
} dso_moe_scratch;

size_t dso_moe_scratch_bytes(const dso_moe_inputs *in, int packs);
dso_moe_scratch dso_moe_scratch_at(const dso_moe_inputs *in, void *base);

void dso_moe_multiply(const dso_isa *isa, const dso_moe_inputs *in, dso_dtype fmt,
                      const dso_moe_product *p, float *out, int64_t ldc,
                      const dso_moe_scratch *scratch);

/* 一个专家的 gate、up 的一块，[m, nc]，行距 ld。g 兼作交错布局的中转（那时 ld >= 2 nc）。 */
void dso_moe_gate_up(const dso_isa *isa, const dso_moe_inputs *in, dso_dtype fmt,
                     const dso_expert *e, int64_t m, int64_t n0, int64_t nc, const void *x,
                     float *g, float *u, int64_t ld, const dso_moe_scratch *scratch);

/* inner 方向每任务的列数。反向时行数少的专家取宽块：dY · down 要逐行读 down 的这一段，窄了就不连续。 */
int64_t dso_moe_hidden_columns(const dso_moe_inputs *in, int64_t e);

/* 专家 e 的词元落在 [t0, t1) 的行：[*first, 返回值)，排序后的下标。 */
int64_t dso_moe_rows_in(const dso_moe_inputs *in, int64_t e, int64_t t0, int64_t t1,
                        int64_t *first);

/* (专家，行块，列块)。 */
typedef struct {
  int64_t expert, row, m, n0, nc;
} dso_moe_block;

static inline int64_t dso_moe_hidden_tasks(const dso_moe_inputs *in) {
  return in->task_at[in->experts];
}
dso_moe_block dso_moe_hidden_block(const dso_moe_inputs *in, int64_t task);

/* 专家 e 的第 row 行在 saved 里：gate 的下标，隔 *up 是 up。 */
static inline int64_t dso_moe_saved_at(const dso_moe_inputs *in, const dso_moe_saved *saved,
                                       int64_t e, int64_t row, int64_t *up) {
  int64_t times = in->gated ? 2 : 1;
  *up = e < saved->routed ? saved->rs : in->expert[e].inner;
  return e < saved->routed ? (in->begin[e] + row) * times * *up
                           : saved->shared_at + row * times * *up;
}

/* src 的若干行（下标 token[i]）排成连续的，转成计算格式；task 为第几组 DSO_MOE_GATHER 行。 */
void dso_moe_gather(const dso_isa *isa, const dso_moe_inputs *in, dso_dtype fmt, dso_mat src,
                    int64_t width, int64_t task, void *dst);

static inline int64_t dso_moe_gather_tasks(const dso_moe_inputs *in) {
  return dso_ceil_div(dso_moe_total(in), DSO_MOE_GATHER);
}

static inline size_t dso_moe_bytes(int64_t elems, dso_dtype fmt) {
  return ((size_t)(elems * dso_size_of(fmt)) + 63) / 64 * 64;
}

#endif
