/* AVX-512-VNNI：量化权重的点积用 vpdpbusd（无符号字节乘有符号字节，四个一组累加进 int32）。
 *
 * 激活不量化成 8 位：每行（int4 时每组）取一个尺度，化为 16 位定点 x = step * (256 hi + lo)，hi、lo 是
 * 有符号字节，舍入不超过最大值的 1 / 65278，比 bf16 自己的舍入细。权重是无符号的一方：int4 的码 0..15
 * 原样，int8 翻转最高位（加 128）；于是 Σ w x = step * (256 Σ w hi + Σ w lo)，再减去零点乘 Σ x。
 *
 * 定点的排列与权重的一次读入对齐：
 *   int8  每 64 个：hi [64]、lo [64]；
 *   int4  每 128 个（64 字节权重）：hi、lo 各两个向量，先低 4 位的、后高 4 位的。
 * int32 的范围：int4 一步至多 8 个 15 * 128，乘 256 也只有 2^22；int8 整行累加，每个 int32 得 k / 16 个
 * 不超过 2^14 的积（加 128 的部分由初值抵消，中途按模 2^32 回绕无妨），k 至 2^20 放得下。
 * 激活有 NaN 或无穷时尺度取 NaN，结果随之是 NaN。
 */
#include <string.h>

#include "avx512_vec.h"

enum {
  COLUMNS = 8,       /* 一次的列数：它们的权重留在一级缓存里，依次服务各行块 */
  ROWS = 4,          /* 一次至多的行数 */
  I8_STEP = 64,      /* 一次读入的权重 */
  I4_STEP = 128,     /* 同上，64 字节 */
  CHUNK = 128,       /* 一次转成 fp32 的激活：最大的组 */
  MAX_K = 1 << 20,   /* 再长 int8 的累加放不下 */
  LEVELS_16 = 32639, /* 127 * 256 + 127：hi、lo 都不出界 */
};

static dso_isa base; /* 被覆盖之前的 AVX-512 原语；只在初始化时写 */

static inline __m512i dp(__m512i acc, __m512i w, __m512i x) {
  return _mm512_dpbusd_epi32(acc, w, x);
}

/* ---- 激活化为定点 ---- */

/* 一行定点的各部分；int4 的尺度与和补 0 到 16 的倍数。 */
typedef struct {
  int8_t *codes;
  float *step; /* int4：[组数]；int8：一个 */
  float
      *sum; /* int4：[组数]，step * Σ (256 hi + lo)；int8：-128 Σ hi、-128 Σ lo，2 * 16 个 int32 */
} fixed_row;

static inline fixed_row fixed_at(const void *packed, int64_t k, int64_t groups) {
  int8_t *codes = (int8_t *)packed;
  float *step = (float *)(codes + 2 * dso_round_up(k, I4_STEP));
  return (fixed_row){codes, step, step + dso_round_up(groups, VL)};
}

static inline __mmask16 mask_of(int64_t rest) {
  return rest >= VL ? 0xffff : (__mmask16)((1u << rest) - 1);
}

/* n 个元素（至多 CHUNK）转成 fp32，补 0 到 16 的倍数。 */
static void load_chunk(float *to, const void *src, dso_dtype dtype, int64_t at, int64_t n) {
  base.to_f32(to, dso_at(src, dtype, at), dtype, n);
  memset(to + n, 0, (size_t)(dso_round_up(n, VL) - n) * sizeof *to);
}

/* 绝对值的位，逐道取大。按整数比较：NaN、无穷最大，不会丢。 */
static inline __m512i top_of(__m512i top, const float *a, int64_t n) {
  __m512i sign = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < n; i += VL)
    top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_loadu_si512(a + i), sign));
  return top;
}

/* 尺度与它的倒数；不是有限的为 NaN、0。 */
static float step_of(__m512i top, float *inverse) {
  uint32_t bits = _mm512_reduce_max_epu32(top);
  float most;
  memcpy(&most, &bits, sizeof most);
  *inverse = 0.0f;
  if (bits >= 0x7f800000) return NAN;
  most = most > 1e-30f ? most : 1e-30f; /* 倒数不上溢；再小的数算作 0 */
  *inverse = LEVELS_16 / most;
  return most / LEVELS_16;
}

/* 16 个数的 hi、lo 字节；返回 16 位的值。lo 就是低字节：256 hi 的低字节为 0。 */
static inline __m512i put_fixed(int8_t *hi, int8_t *lo, const float *a, float inverse) {
  __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(a), _mm512_set1_ps(inverse)));
  __m512i high = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
  _mm_storeu_si128((__m128i *)hi, _mm512_cvtepi32_epi8(high));
  _mm_storeu_si128((__m128i *)lo, _mm512_cvtepi32_epi8(v));
  return v;
}

static void pack_i8(fixed_row row, const void *src, dso_dtype dtype, int64_t k) {
  float a[CHUNK], inverse;
  __m512i top = _mm512_setzero_si512(), high = top, low = top;
  for (int64_t x = 0; x < k; x += CHUNK) {
    load_chunk(a, src, dtype, x, dso_min(CHUNK, k - x));
    top = top_of(top, a, dso_min(CHUNK, k - x));
  }
  *row.step = step_of(top, &inverse);
  for (int64_t x = 0; x < k; x += CHUNK) {
    int64_t n = dso_min(CHUNK, k - x);
    load_chunk(a, src, dtype, x, n);
    for (int64_t i = 0; i < n; i += VL) {
      int8_t *hi = row.codes + (x + i) / I8_STEP * 2 * I8_STEP + i % I8_STEP;
      put_fixed(hi, hi + I8_STEP, a + i, inverse);
    }
  }
  __m512i shift = _mm512_set1_epi8((char)128), zero = _mm512_setzero_si512();
  for (const int8_t *at = row.codes; at < row.codes + 2 * k; at += 2 * I8_STEP) {
    high = dp(high, shift, _mm512_loadu_si512(at));
    low = dp(low, shift, _mm512_loadu_si512(at + I8_STEP));
  }
  _mm512_storeu_si512(row.sum, _mm512_sub_epi32(zero, high));
  _mm512_storeu_si512(row.sum + VL, _mm512_sub_epi32(zero, low));
}

static void pack_i4(fixed_row row, const void *src, dso_dtype dtype, int64_t k, int64_t group) {
  int64_t padded = dso_round_up(dso_ceil_div(k, group), VL);
  memset(row.step, 0, (size_t)padded * 2 * sizeof(float)); /* step 与 sum 相连 */
  for (int64_t g = 0, x = 0; x < k; g++, x += group) {
    float a[CHUNK], inverse;
    int64_t n = dso_min(group, k - x);
    load_chunk(a, src, dtype, x, n);
    float step = step_of(top_of(_mm512_setzero_si512(), a, n), &inverse);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += VL) {
      int64_t r = (x + i) % I4_STEP / VL; /* 偶数是低 4 位；r / 2 是第几段 16 字节 */
      int8_t *hi = row.codes + x / I4_STEP * 2 * I4_STEP + r % 2 * 64 + r / 2 * VL;
      sum = _mm512_add_epi32(sum, put_fixed(hi, hi + I4_STEP, a + i, inverse));
    }
    row.step[g] = step, row.sum[g] = step * (float)_mm512_reduce_add_epi32(sum);
  }
}

/* fp8 的码不是整数，沿用 AVX-512 的。 */
static int fixed_point(dso_dtype w_dtype, int64_t k) { return w_dtype != DSO_F8 && k <= MAX_K; }

static void pack_q(void *dst, const void *src, dso_dtype dtype, int64_t k, dso_dtype w_dtype,
                   int64_t group) {
  if (!fixed_point(w_dtype, k)) {
    base.pack_q(dst, src, dtype, k, w_dtype, group);
    return;
  }
  fixed_row row = fixed_at(dst, k, w_dtype == DSO_I8 ? 1 : dso_ceil_div(k, group));
  int64_t last = dso_round_up(k, I4_STEP) - I4_STEP;
  memset(row.codes + 2 * last, 0, 2 * I4_STEP); /* 末一步多出的 */
  if (w_dtype == DSO_I8)
    pack_i8(row, src, dtype, k);
  else
    pack_i4(row, src, dtype, k, group);
}

/* 若干列权重，与同时要预取的另外几列（各列行距相同）。 */
typedef struct {
  const char *at, *ahead;
  int64_t ld;
} columns;

/* 第 j 列 offset 处的 64 字节；bytes 不足 64 时只读 bytes 字节，其余为 0。 */
static inline __attribute__((always_inline)) __m512i load_column(const columns *w, int64_t j,
                                                                 int64_t offset, int64_t bytes) {
  const char *p = w->at + j * w->ld + offset;
  _mm_prefetch(w->ahead + j * w->ld + offset, _MM_HINT_T1);
  return bytes >= 64 ? _mm512_loadu_si512(p)
                     : _mm512_maskz_loadu_epi8(((__mmask64)1 << bytes) - 1, p);
}

/* ---- int8 ---- */

/* 一步 64 个权重；rest 不足 64 时只读 rest 个。 */
static inline __attribute__((always_inline)) void i8_step(int mr, int nr, int64_t rest, int64_t at,
                                                          const fixed_row *row, const columns *w,
                                                          __m512i high[ROWS][COLUMNS],
                                                          __m512i low[ROWS][COLUMNS]) {
  __m512i flip = _mm512_set1_epi8((char)128), xh[ROWS], xl[ROWS];
  _Pragma("GCC unroll 4") for (int i = 0; i < mr; i++) {
    xh[i] = _mm512_loadu_si512(row[i].codes + 2 * at);
    xl[i] = _mm512_loadu_si512(row[i].codes + 2 * at + I8_STEP);
  }
  _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
    __m512i wv = _mm512_xor_si512(load_column(w, j, at, rest), flip);
    _Pragma("GCC unroll 4") for (int i = 0; i < mr; i++) {
      high[i][j] = dp(high[i][j], wv, xh[i]);
      low[i][j] = dp(low[i][j], wv, xl[i]);
    }
  }
}

static inline __attribute__((always_inline)) void i8_tile(int mr, int nr, int64_t k,
                                                          const fixed_row *row, columns w,
                                                          const float *scale, float *c,
                                                          int64_t ldc) {
  __m512i high[ROWS][COLUMNS], low[ROWS][COLUMNS];
  _Pragma("GCC unroll 4") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
    high[i][j] = _mm512_loadu_si512(row[i].sum);
    low[i][j] = _mm512_loadu_si512(row[i].sum + VL);
  }
  int64_t x = 0;
  for (; x + I8_STEP <= k; x += I8_STEP) i8_step(mr, nr, I8_STEP, x, row, &w, high, low);
  if (x < k) i8_step(mr, nr, k - x, x, row, &w, high, low);
  _Pragma("GCC unroll 4") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
    vf sum = v_fma(_mm512_cvtepi32_ps(high[i][j]), v_set1(256.0f), _mm512_cvtepi32_ps(low[i][j]));
    c[i * ldc + j] = *row[i].step * scale[j] * v_hsum(sum);
  }
}

/* ---- int4 ---- */

/* 一步 128 个权重涉及 per = 1、2 或 4 组：各组的尺度铺到它那一段权重的 int32 上。 */
static inline __attribute__((always_inline)) vf spread(int per, const float *p) {
  if (per == 1) return v_set1(*p);
  __m512i index = per == 2 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                           : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m128 four =
      per == 2 ? _mm_castpd_ps(_mm_load_sd((const double *)(const void *)p)) : _mm_loadu_ps(p);
  return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(four));
}

/* 一步；bytes 不足 64 时只读 bytes 字节。scale 指向这一步的尺度。 */
static inline __attribute__((always_inline)) void i4_step(int mr, int nr, int per, int64_t bytes,
                                                          int64_t s, const fixed_row *row,
                                                          const columns *w,
                                                          float scale[ROWS][COLUMNS][VL],
                                                          int64_t at, vf acc[ROWS][COLUMNS]) {
  __m512i nibble = _mm512_set1_epi8(15);
  _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
    __m512i both = load_column(w, j, s * 64, bytes);
    __m512i w0 = _mm512_and_si512(both, nibble);
    __m512i w1 = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    _Pragma("GCC unroll 4") for (int i = 0; i < mr; i++) {
      const int8_t *x = row[i].codes + s * 2 * I4_STEP;
      __m512i t = dp(_mm512_setzero_si512(), w0, _mm512_loadu_si512(x));
      t = _mm512_slli_epi32(dp(t, w1, _mm512_loadu_si512(x + 64)), 8);
      t = dp(dp(t, w0, _mm512_loadu_si512(x + 128)), w1, _mm512_loadu_si512(x + 192));
      acc[i][j] = v_fma(_mm512_cvtepi32_ps(t), spread(per, scale[i][j] + at), acc[i][j]);
    }
  }
}

/* 第 g 组起至多 16 组：权重与激活的尺度之积（其余为 0）；减去零点的部分 Σ 尺度 * 零点 * 激活之和。 */
static inline __attribute__((always_inline)) void i4_scales(int mr, int nr, int64_t g,
                                                            const fixed_row *row,
                                                            const dso_quant *q,
                                                            float product[ROWS][COLUMNS][VL],
                                                            vf acc[ROWS][COLUMNS]) {
  __mmask16 mask = mask_of(q->groups - g);
  _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
    int64_t at = j * q->groups + g;
    vf zero =
        q->zero ? _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, q->zero + at)))
                : v_set1(8.0f);
    vf scale = _mm512_maskz_loadu_ps(mask, q->scale + at), shift = scale * zero;
    _Pragma("GCC unroll 4") for (int i = 0; i < mr; i++) {
      v_store(product[i][j], scale * v_load(row[i].step + g));
      acc[i][j] = _mm512_fnmadd_ps(shift, v_load(row[i].sum + g), acc[i][j]);
    }
  }
}

static inline __attribute__((always_inline)) void i4_tile(int mr, int nr, int per,
                                                          const fixed_row *row, columns w,
                                                          const dso_quant *q, float *c,
                                                          int64_t ldc) {
  vf acc[ROWS][COLUMNS];
  _Alignas(64) float scale[ROWS][COLUMNS][VL];
  _Pragma("GCC unroll 4") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) acc[i][j] = v_set1(0.0f);
  for (int64_t g = 0; g < q->groups; g += VL) {
    i4_scales(mr, nr, g, row, q, scale, acc);
    int64_t groups = dso_min(VL, q->groups - g), steps = groups / per, first = g / per;
    for (int64_t s = 0; s < steps; s++)
      i4_step(mr, nr, per, 64, first + s, row, &w, scale, s * per, acc);
    int64_t rest = groups - steps * per;
    if (rest)
      i4_step(mr, nr, per, rest * 64 / per, first + steps, row, &w, scale, steps * per, acc);
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) c[i * ldc + j] = v_hsum(acc[i][j]);
}

/* ---- 行与列的划分 ---- */

typedef struct {
  int64_t m, n, k, a_stride, ldw, ldc;
  const char *a, *w;
  dso_quant q;
  float *c;
} product;

/* 第 i 行起 mr 行、第 j 列起 nr 列；ahead 为要预取的那组列的第一行。per 为 0 时 int8。 */
static inline __attribute__((always_inline)) void tile(int mr, int nr, int per, const product *p,
                                                       int64_t i, int64_t j, const char *ahead) {
  fixed_row row[ROWS];
  _Pragma("GCC unroll 4") for (int r = 0; r < mr; r++) row[r] =
      fixed_at(p->a + (i + r) * p->a_stride, p->k, p->q.groups);
  float *c = p->c + i * p->ldc + j;
  columns w = {p->w + j * p->ldw, ahead, p->ldw};
  dso_quant q = dso_quant_at(&p->q, j, 0);
  if (per == 0)
    i8_tile(mr, nr, p->k, row, w, q.scale, c, p->ldc);
  else
    i4_tile(mr, nr, per, row, w, &q, c, p->ldc);
}

/* 各种块各成一个函数：合在一个里，编译器的寄存器分配会变差。X(per, 行, 列)。 */
/* clang-format off */
#define I8_TILES(X) X(0, 1, 8) X(0, 2, 4) X(0, 3, 2) X(0, 4, 2) X(0, 1, 1)
#define I4_TILES(X, PER) X(PER, 1, 8) X(PER, 2, 4) X(PER, 3, 4) X(PER, 4, 4) X(PER, 1, 1)
#define TILES(X) I8_TILES(X) I4_TILES(X, 1) I4_TILES(X, 2) I4_TILES(X, 4)
/* clang-format on */
#define DEFINE_TILE(PER, MR, NR)                                                                 \
  static __attribute__((noinline)) void tile_##PER##_##MR##x##NR(const product *p, int64_t i,    \
                                                                 int64_t j, const char *ahead) { \
    tile(MR, NR, PER, p, i, j, ahead);                                                           \
  }
TILES(DEFINE_TILE)

typedef void (*tile_fn)(const product *, int64_t, int64_t, const char *);
#define NAME_TILE(PER, MR, NR) [PER][MR][NR] = tile_##PER##_##MR##x##NR,
static const tile_fn TILE[5][ROWS + 1][COLUMNS + 1] = {TILES(NAME_TILE)};

/* 第 j 列起一组列的尺度：与权重分开存放，组小时也不少。越过末尾的预取无害。 */
static void prefetch_scales(const product *p, int64_t j) {
  const char *at = (const char *)(p->q.scale + j * p->q.groups);
  for (int64_t x = 0; x < COLUMNS * p->q.groups * 4; x += 64) _mm_prefetch(at + x, _MM_HINT_T0);
}

/* 一组列依次服务各行块；第一个行块顺带预取下一组列。 */
static void run(int64_t per, const product *p, const char *next) {
  int64_t j = 0;
  for (; j + COLUMNS <= p->n; j += COLUMNS) {
    if (per > 0) prefetch_scales(p, j + COLUMNS);
    const char *here = p->w + j * p->ldw;
    const char *ahead = j + 2 * COLUMNS <= p->n ? here + COLUMNS * p->ldw : next ? next : here;
    for (int64_t i = 0, mr; i < p->m; i += mr, ahead = here) {
      mr = dso_min(ROWS, p->m - i);
      int64_t nr = mr == 1 ? 8 : mr > 2 && per == 0 ? 2 : 4;
      for (int64_t x = 0; x < COLUMNS; x += nr) TILE[per][mr][nr](p, i, j + x, ahead + x * p->ldw);
    }
  }
  for (; j < p->n; j++)
    for (int64_t i = 0; i < p->m; i++) TILE[per][1][1](p, i, j, p->w + j * p->ldw);
}

static void dot_q(int64_t m, int64_t n, int64_t k, const void *a, int64_t a_stride, const void *w,
                  dso_dtype w_dtype, int64_t ldw, const dso_quant *q, float *c, int64_t ldc,
                  const void *next) {
  if (!fixed_point(w_dtype, k)) {
    base.dot_q(m, n, k, a, a_stride, w, w_dtype, ldw, q, c, ldc, next);
    return;
  }
  product p = {m, n, k, a_stride, ldw, ldc, a, w, *q, c};
  int64_t per = w_dtype == DSO_I8 ? 0 : I4_STEP / q->group;
  run(per, &p, next);
}

void dso_isa_init_avx512vnni(dso_isa *isa) {
  base = *isa;
  isa->name = "avx512_vnni";
  isa->pack_q = pack_q;
  isa->dot_q = dot_q;
}
