/* 每个指令集提供的原语表。算子只通过此表计算，不知道指令集；指令集文件不知道算子。
 *
 * 计算格式（fmt）：DSO_F32 用 fp32 乘加；DSO_BF16 用成对 bf16 点积、fp32 累加（仅当 native_bf16）。
 * 打包面板：16 列一块。DSO_F32：[n/16][k][16]；DSO_BF16：[n/16][⌈k/2⌉][16][2]，多余处填 0。
 */
#ifndef DSO_ISA_H
#define DSO_ISA_H

#include "../dso.h"

#define DSO_PANEL 16 /* 面板宽度：一个 zmm 的 fp32 个数，各指令集相同，打包布局因此相同 */

typedef struct dso_isa {
  const char *name;
  int native_bf16;

  /* 类型转换，n 个元素；认得 DSO_F8 的只有这两个（与由它们拼成的 stream），以及量化的权重的三个。 */
  void (*to_f32)(float *dst, const void *src, dso_dtype dtype, int64_t n);
  void (*from_f32)(void *dst, dso_dtype dtype, const float *src, int64_t n);

  /* 同 from_f32，但可以绕过缓存（写出大而近期不读的结果，省去先读后写）；次正规的 bf16 可以成 0。
   * 一个任务的写出之后调用一次 stream_end。 */
  void (*stream)(void *dst, dso_dtype dtype, const float *src, int64_t n);
  void (*stream_end)(void);

  /* 打包 B：pack_t 的源是 [n][k]（k 连续），pack_n 的源是 [k][n]（n 连续）；ld 为源的行距。
   * panel_stride 为目标面板间距（目标 fmt 的元素数）。 */
  void (*pack_t)(void *dst, dso_dtype fmt, int64_t panel_stride, const void *src, dso_dtype dtype,
                 int64_t ld, int64_t n, int64_t k);
  void (*pack_n)(void *dst, dso_dtype fmt, int64_t panel_stride, const void *src, dso_dtype dtype,
                 int64_t ld, int64_t n, int64_t k);

  /* C [m, 16 * panels] (+)= A [m, k] · B；A 行主序。BF16 时 k 为偶数。 */
  void (*gemm)(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, const void *a, int64_t lda,
               const void *b, int64_t panel_stride, float *c, int64_t ldc, int accumulate);
  /* 同上，但 A 由 pack_n 从 [k][m] 打包而来（面板间距 a_stride）：求 Aᵀ·B 不必转置 A。 */
  void (*gemm_t)(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, const void *a,
                 int64_t a_stride, const void *b, int64_t panel_stride, float *c, int64_t ldc,
                 int accumulate);

  /* 行数少时不打包，直接读权重：dot 为 C [m, n] = A [m, k] · W [n, k]ᵀ，
   * axpy_n 为 C [m, n] = A [m, k] · W [k, n]（A 为 fp32）。 */
  void (*dot)(dso_dtype fmt, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
              const void *w, dso_dtype w_dtype, int64_t ldw, float *c, int64_t ldc);
  void (*axpy_n)(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const void *w,
                 dso_dtype w_dtype, int64_t ldw, float *c, int64_t ldc);

  /* 量化的权重（int8、int4、fp8，每组 32 的倍数）：dot_q 为 C [m, n] = A [m, k] · 反量化(W)ᵀ，dequant 解开
   * 一行的前 k 个成计算格式 fmt。q 指向第一行的尺度，ldw 是行距（int4 以字节计）。A 的各行先由 pack_q 换成本指令集要的样子
   * （fp32 或定点，dso_pack_q_bytes(k) 字节，w_dtype、group 是要乘的权重的），行距 a_stride 字节。
   * next 是接下来要用的同样行距的权重（可为 NULL）：顺带预取。 */
  void (*pack_q)(void *dst, const void *src, dso_dtype dtype, int64_t k, dso_dtype w_dtype,
                 int64_t group);
  void (*dot_q)(int64_t m, int64_t n, int64_t k, const void *a, int64_t a_stride, const void *w,
                dso_dtype w_dtype, int64_t ldw, const dso_quant *q, float *c, int64_t ldc,
                const void *next);
  void (*dequant)(void *dst, dso_dtype fmt, const void *w, dso_dtype w_dtype, const dso_quant *q,
                  int64_t k);

  void (*transpose)(float *dst, int64_t ldd, const float *src, int64_t lds, int64_t m, int64_t n);

  /* 在线 softmax 的一步：s [n] 乘 scale，更新行最大值 *m 与指数和 *l，
   * p [n_pad]（fmt）= exp(s - m)，n 之后填 0；返回旧累加量应乘的系数。 */
  float (*softmax_row)(const float *s, int64_t n, int64_t n_pad, float scale, float *m, float *l,
                       void *p, dso_dtype fmt);
  /* 反向，原地：s 变为 p = exp(s * scale - lse)，dp 变为 ds = p * (dp - delta) * scale。
   * lse、delta 逐元素给出；lse = +inf 的元素得 0。 */
  void (*softmax_backward)(float *s, float *dp, int64_t n, float scale, const float *lse,
                           const float *delta);

  /* gate = a(gate) * up；up 为 NULL 时 gate = a(gate)。 */
  void (*activate)(const dso_act *act, float *gate, const float *up, int64_t n);
  /* 反向：给定 g、u、dh，g、u、dh 依次换成 dg、du、h（前向的结果）；u 可为 NULL。 */
  void (*activate_backward)(const dso_act *act, float *g_dg, float *u_du, float *dh_h, int64_t n);
  float (*vdot)(const float *a, const float *b, int64_t n);
  void (*vaxpy)(float *y, float a, const float *x, int64_t n);
  void (*vscale)(float *y, float a, int64_t n);
  float (*vamax)(const float *x, int64_t n); /* 最大绝对值，含 NaN 时返回 NaN */
  float (*vmax)(const float *x, int64_t n);  /* 最大值，含 NaN 时返回 NaN；n 为 0 时 -inf */
} dso_isa;

/* 指令集由低到高，后一级包含前一级；dso_cpu_level 是这台机器支持的最高一级。 */
enum dso_level { DSO_SCALAR, DSO_AVX2, DSO_AVX512, DSO_AVX512_VNNI, DSO_AVX512_BF16, DSO_LEVELS };
int dso_cpu_level(void);

void dso_isa_init_scalar(dso_isa *isa);
void dso_isa_init_avx2(dso_isa *isa);
void dso_isa_init_avx512(dso_isa *isa);
void dso_isa_init_avx512vnni(dso_isa *isa);
void dso_isa_init_avx512bf16(dso_isa *isa);

static inline int64_t dso_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t dso_round_up(int64_t a, int64_t b) { return dso_ceil_div(a, b) * b; }
static inline int64_t dso_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t dso_max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t dso_size_of(dso_dtype dtype) {
  return dtype == DSO_F32 ? 4 : dtype == DSO_BF16 || dtype == DSO_F16 ? 2 : 1;
}
static inline const void *dso_at(const void *base, dso_dtype dtype, int64_t index) {
  return (const char *)base + index * dso_size_of(dtype);
}
static inline void *dso_at_mut(void *base, dso_dtype dtype, int64_t index) {
  return (char *)base + index * dso_size_of(dtype);
}
/* 第 row 行、第 group 组起的尺度与零点。 */
static inline dso_quant dso_quant_at(const dso_quant *q, int64_t row, int64_t group) {
  dso_quant at = *q;
  at.scale += row * q->groups + group;
  if (at.zero) at.zero += row * q->groups + group;
  return at;
}
/* pack_q 的一行：fp32，或定点的每元素两字节加每组（至少 32 个）两个 fp32；64 的倍数。 */
static inline size_t dso_pack_q_bytes(int64_t k) {
  return (size_t)(4 * dso_round_up(k, 128) + 256);
}
/* 打包后一个面板的元素数。 */
static inline int64_t dso_panel_elems(dso_dtype fmt, int64_t k) {
  return DSO_PANEL * (fmt == DSO_BF16 ? dso_round_up(k, 2) : k);
}

#endif
