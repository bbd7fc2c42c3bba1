/* 矩阵乘的一块：C [mc, nc] = A [m0:m0+mc, :] · B [:, n0:n0+nc]，由各算子的任务调用。 */
#ifndef DSO_GEMM_H
#define DSO_GEMM_H

#include "isa/isa.h"

/* 分块，依据是二级缓存（1 MiB 上下）：B 块 NB x KB、A 块 MB x KB 与 C 块 MB x NB 同时放得下。 */
enum {
  DSO_NB = 128,       /* 每任务的输出列：8 个面板 */
  DSO_MB = 528,       /* 每任务的输出行：摊薄打包 B 的开销（约 4 %） */
  DSO_KB_BYTES = 1024 /* 每行每次处理的 k 字节数 */
};

typedef struct {
  const dso_isa *isa;
  dso_dtype fmt;
  int64_t k;
  dso_mat a, b;
  int a_transposed; /* 1：a 的存储是 [k][m] */
  int b_transposed; /* 1：b 的存储是 [n][k]（nn.Linear 的权重） */
} dso_gemm;

/* 全部操作数是 bf16 且指令集原生支持时用 bf16 点积，否则 fp32。 */
dso_dtype dso_compute_format(const dso_isa *isa, int all_bf16);

size_t dso_gemm_scratch(void); /* 一块所需暂存，字节 */

/* c 的行距 ldc >= 16 的倍数向上取整的 nc；accumulate 为 0 时覆盖（k 为 0 时填 0）。nc 可大于
 * DSO_NB：B 存成 [k][n] 而行数少时，宽块一次连续读完 B 的一长段行。 */
void dso_gemm_block(const dso_gemm *g, int64_t m0, int64_t mc, int64_t n0, int64_t nc, float *c,
                    int64_t ldc, int accumulate, void *scratch);

/* 结果直接写到的地方：第 (i, j) 个元素在 data[i * rs + j]。 */
typedef struct {
  void *data;
  int64_t rs;
  dso_dtype dtype;
  int add;    /* 1：加到原有的值上 */
  int stream; /* 1：绕过缓存写出 */
} dso_gemm_out;

/* 同上，但 A 转置存放，结果转成 out 的类型写出；c [mc, ldc] 是中转。 */
void dso_gemm_store(const dso_gemm *g, int64_t m0, int64_t mc, int64_t n0, int64_t nc,
                    const dso_gemm_out *out, float *c, int64_t ldc, void *scratch);

/* 输出 [m, n] 划成 (行块, 列块)；行块尽量均匀，每块不超过 DSO_MB，列块 DSO_NB。 */
typedef struct {
  int64_t m0, mc, n0, nc;
} dso_block;

int64_t dso_block_count(int64_t m, int64_t n);
dso_block dso_block_at(int64_t m, int64_t n, int64_t index);

/* 行数少（解码）时不打包：按列块做点积，一块读一段权重。 */
enum {
  DSO_DOT_MAX_M = 96,      /* 至此点积路径不慢于打包路径（打包要多读写一遍 W） */
  DSO_DOT_MAX_N = 240,     /* 每任务的列数上限 */
  DSO_DOT_BYTES = 1 << 18, /* 每任务读的权重：足够摊薄调度，又足够均衡负载 */
  DSO_DOT_UNIT = 24        /* 6 与 8 的公倍数：两种寄存器块都没有零头 */
};

/* k 列权重的列块宽度。 */
static inline int64_t dso_dot_columns(int64_t k, dso_dtype dtype) {
  int64_t fit = DSO_DOT_BYTES / dso_max(1, k * dso_size_of(dtype)) / DSO_DOT_UNIT * DSO_DOT_UNIT;
  return dso_min(DSO_DOT_MAX_N, dso_max(DSO_DOT_UNIT, fit));
}

#endif
