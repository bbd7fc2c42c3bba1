/* AVX-512-BF16：在 AVX-512 之上换成 vdpbf16ps（成对 bf16 点积、fp32 累加）。fp32 格式沿用 AVX-512。 */
#include <string.h>

#include "avx512_vec.h"

static dso_isa base; /* 被覆盖之前的 AVX-512 原语，供 fp32 格式使用；只在初始化时写 */

static inline __m512 dp(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}

static inline __m512i pair(const uint16_t *p) { /* 广播一对 bf16 */
  int32_t bits;
  memcpy(&bits, p, sizeof bits);
  return _mm512_set1_epi32(bits);
}

/* ---- 打包路径：32 个寄存器 = 24 个累加器 + 4 个 B + 1 个广播 ----
 * 只有一个面板时（解码的得分）A 的每行只用一遍、直接来自内存：把后面第二块的行预取到一级缓存。 */
#define DEFINE_TILE(MR, NV)                                                                      \
  static void tile_##MR##x##NV(int64_t k, const uint16_t *a, int64_t lda, int64_t ks,            \
                               const uint16_t *b, int64_t ps, float *c, int64_t ldc,             \
                               int accumulate) {                                                 \
    __m512 acc[MR][NV];                                                                          \
    for (int i = 0; i < MR; i++)                                                                 \
      for (int j = 0; j < NV; j++)                                                               \
        acc[i][j] = accumulate ? _mm512_loadu_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();    \
    for (int64_t x = 0; x < k; x += 2) {                                                         \
      if (NV == 1 && x % 32 == 0)                                                                \
        for (int i = 0; i < MR; i++)                                                             \
          _mm_prefetch((const char *)(a + (2 * MR + i) * lda + x / 2 * ks), _MM_HINT_T0);        \
      __m512i w[NV];                                                                             \
      for (int j = 0; j < NV; j++) w[j] = _mm512_loadu_si512(b + j * ps + x * 16);               \
      _Pragma("GCC unroll 8") for (int i = 0; i < MR; i++) {                                     \
        __m512i v = pair(a + i * lda + x / 2 * ks);                                              \
        _Pragma("GCC unroll 4") for (int j = 0; j < NV; j++) acc[i][j] = dp(acc[i][j], v, w[j]); \
      }                                                                                          \
    }                                                                                            \
    for (int i = 0; i < MR; i++)                                                                 \
      for (int j = 0; j < NV; j++) _mm512_storeu_ps(c + i * ldc + j * 16, acc[i][j]);            \
  }
/* clang-format off */
#define TILES(X) \
  X(1, 4) X(2, 4) X(3, 4) X(4, 4) X(5, 4) X(6, 4) \
  X(1, 2) X(2, 2) X(3, 2) X(4, 2) X(5, 2) X(6, 2) X(7, 2) X(8, 2) \
  X(1, 1) X(2, 1) X(3, 1) X(4, 1) X(5, 1) X(6, 1) X(7, 1) X(8, 1)
/* clang-format on */
TILES(DEFINE_TILE)

typedef void (*tile_fn)(int64_t, const uint16_t *, int64_t, int64_t, const uint16_t *, int64_t,
                        float *, int64_t, int);
#define NAME_TILE(MR, NV) [NV][MR] = tile_##MR##x##NV,
static const tile_fn TILE[5][9] = {TILES(NAME_TILE)};

static void gemm_strided(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, const void *a,
                         int64_t lda, int64_t ks, const void *b, int64_t ps, float *c, int64_t ldc,
                         int accumulate) {
  (void)fmt;
  for (int64_t p = 0; p < panels;) {
    int64_t left = panels - p, nv = left >= 4 ? 4 : left >= 2 ? 2 : 1, mr = nv == 4 ? 6 : 8;
    for (int64_t i = 0; i < m; i += mr)
      TILE[nv][dso_min(mr, m - i)](k, (const uint16_t *)a + i * lda, lda, ks,
                                   (const uint16_t *)b + p * ps, ps, c + i * ldc + p * DSO_PANEL,
                                   ldc, accumulate);
    p += nv;
  }
}

#include "gemm_layouts.h"

#define STREAM_REST base.from_f32
#include "avx512_stream.h"

static void gemm_any(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, const void *a,
                     int64_t lda, const void *b, int64_t ps, float *c, int64_t ldc,
                     int accumulate) {
  (fmt == DSO_BF16 ? gemm : base.gemm)(fmt, m, panels, k, a, lda, b, ps, c, ldc, accumulate);
}

static void gemm_t_any(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, const void *a,
                       int64_t a_stride, const void *b, int64_t ps, float *c, int64_t ldc,
                       int accumulate) {
  (fmt == DSO_BF16 ? gemm_t : base.gemm_t)(fmt, m, panels, k, a, a_stride, b, ps, c, ldc,
                                           accumulate);
}

/* ---- 点积路径：A、W 都是沿 k 连续的 bf16，原地读 ---- */
static inline __m512i load_tail(const uint16_t *p, int64_t n) {
  return _mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}

/* 四个向量各自求和，得到 4 个 fp32：比逐个归约少三分之二的指令。 */
static inline __m128 reduce4(__m512 a, __m512 b, __m512 c, __m512 d) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 sum = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

static inline void put(float *c, float sum, int add) { *c = add ? *c + sum : sum; }

/* ahead > 0 时顺带把 next 起 ahead 行权重预取到二级缓存，下一组列就不必等内存。 */
static inline __attribute__((always_inline)) void dot_tile(int mr, int nr, int ahead, int64_t k,
                                                           const uint16_t *a, int64_t lda,
                                                           const uint16_t *w, int64_t ldw,
                                                           const uint16_t *next, float *c,
                                                           int64_t ldc, int add) {
  __m512 acc[4][8];
  _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) acc[i][j] = _mm512_setzero_ps();
  int64_t x = 0;
  for (; x + 32 <= k; x += 32) {
    __m512i av[4];
    _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++) av[i] =
        _mm512_loadu_si512(a + i * lda + x);
    _Pragma("GCC unroll 8") for (int j = 0; j < ahead; j++)
        _mm_prefetch((const char *)(next + j * ldw + x), _MM_HINT_T1);
    _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
      __m512i wv = _mm512_loadu_si512(w + j * ldw + x);
      _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++) acc[i][j] = dp(acc[i][j], av[i], wv);
    }
  }
  if (x < k)
    for (int j = 0; j < nr; j++) {
      __m512i wv = load_tail(w + j * ldw + x, k - x);
      for (int i = 0; i < mr; i++) acc[i][j] = dp(acc[i][j], load_tail(a + i * lda + x, k - x), wv);
    }
  _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
    float sums[4];
    if (mr == 4)
      _mm_storeu_ps(sums, reduce4(acc[0][j], acc[1][j], acc[2][j], acc[3][j]));
    else
      _Pragma("GCC unroll 4") for (int i = 0; i < mr; i++) sums[i] =
          _mm512_reduce_add_ps(acc[i][j]);
    _Pragma("GCC unroll 4") for (int i = 0; i < mr; i++) put(c + i * ldc + j, sums[i], add);
  }
}

/* 一次 DOT_NR 列 x DOT_KC：24 KiB 权重留在一级缓存里，依次服务全部行块。 */
enum { DOT_MR = 4, DOT_NR = 6, DOT_KC = 2048 };

/* DOT_NR 列、rows 行；ahead 只取 0、1、2、3、6。 */
static void dot_columns(int64_t rows, int64_t ahead, int64_t k, const uint16_t *a, int64_t lda,
                        const uint16_t *w, int64_t ldw, const uint16_t *next, float *c, int64_t ldc,
                        int add) {
#define CASE(MR, AHEAD)                                                \
  case MR * 8 + AHEAD:                                                 \
    dot_tile(MR, DOT_NR, AHEAD, k, a, lda, w, ldw, next, c, ldc, add); \
    break;
#define CASES(MR) CASE(MR, 0) CASE(MR, 1) CASE(MR, 2) CASE(MR, 3) CASE(MR, 6)
  switch (rows * 8 + ahead) { CASES(1) CASES(2) CASES(3) CASES(4) default : break; }
#undef CASES
#undef CASE
}

/* 一组 DOT_NR 列：各行块分摊下一块权重的预取。more 为 0 时后面没有下一组列。 */
static void dot_group(int64_t m, int64_t k, const uint16_t *a, int64_t lda, const uint16_t *w,
                      int64_t ldw, float *c, int64_t ldc, int more) {
  int64_t blocks = dso_ceil_div(m, DOT_MR), share = dso_ceil_div(DOT_NR, blocks);
  if (share == 4 || share == 5) share = 6;
  for (int64_t x = 0; x < k; x += DOT_KC) {
    int64_t kc = dso_min(DOT_KC, k - x);
    const uint16_t *next = x + kc < k ? w + x + kc : more ? w + DOT_NR * ldw : NULL;
    for (int64_t b = 0; b < blocks; b++) {
      int64_t i = b * DOT_MR, first = b * share,
              ahead = next && first + share <= DOT_NR ? share : 0;
      dot_columns(dso_min(DOT_MR, m - i), ahead, kc, a + i * lda + x, lda, w + x, ldw,
                  ahead ? next + first * ldw : w, c + i * ldc, ldc, x > 0);
    }
  }
}

static void dot_bf16(int64_t m, int64_t n, int64_t k, const uint16_t *a, int64_t lda,
                     const uint16_t *w, int64_t ldw, float *c, int64_t ldc) {
  int64_t j = 0;
  if (m == 1) { /* 一行一页（4 KiB）时硬件预取每行都要重来：提前一组列预取 */
    for (; j + 16 <= n; j += 8)
      dot_tile(1, 8, 8, k, a, lda, w + j * ldw, ldw, w + (j + 8) * ldw, c + j, ldc, 0);
    for (; j + 8 <= n; j += 8) dot_tile(1, 8, 0, k, a, lda, w + j * ldw, ldw, w, c + j, ldc, 0);
  }
  for (; j + DOT_NR <= n; j += DOT_NR)
    dot_group(m, k, a, lda, w + j * ldw, ldw, c + j, ldc, j + 2 * DOT_NR <= n);
  for (; j < n; j++) /* 不足一组的尾部，逐列 */
    for (int64_t i = 0; i < m; i++)
      dot_tile(1, 1, 0, k, a + i * lda, lda, w + j * ldw, ldw, w, c + i * ldc + j, ldc, 0);
}

static void dot(dso_dtype fmt, int64_t m, int64_t n, int64_t k, const void *a, int64_t lda,
                const void *w, dso_dtype w_dtype, int64_t ldw, float *c, int64_t ldc) {
  if (fmt == DSO_BF16 && w_dtype == DSO_BF16)
    dot_bf16(m, n, k, (const uint16_t *)a, lda, (const uint16_t *)w, ldw, c, ldc);
  else
    base.dot(fmt, m, n, k, a, lda, w, w_dtype, ldw, c, ldc);
}

/* ---- 打包：以 32 位（一对 bf16）为单位 ---- */
static inline __m512i load_pairs(const void *src, dso_dtype dtype, int64_t index, int64_t n) {
  const uint16_t *h = (const uint16_t *)src + index;
  if (dtype == DSO_BF16) return n >= 32 ? _mm512_loadu_si512(h) : load_tail(h, n);
  _Alignas(64) float wide[32] = {0};
  base.to_f32(wide, dso_at(src, dtype, index), dtype, n < 32 ? n : 32);
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(wide + 16), _mm512_load_ps(wide));
}

static void pack_t(void *dst, dso_dtype fmt, int64_t ps, const void *src, dso_dtype dtype,
                   int64_t ld, int64_t n, int64_t k) {
  if (fmt != DSO_BF16) {
    base.pack_t(dst, fmt, ps, src, dtype, ld, n, k);
    return;
  }
  for (int64_t p = 0; p * DSO_PANEL < n; p++) {
    uint16_t *panel = (uint16_t *)dst + p * ps;
    int64_t width = dso_min(DSO_PANEL, n - p * DSO_PANEL);
    for (int64_t x = 0; x < k; x += 32) {
      __m512i r[16];
      for (int64_t j = 0; j < 16; j++)
        r[j] = j < width ? load_pairs(src, dtype, (p * DSO_PANEL + j) * ld + x, k - x)
                         : _mm512_setzero_si512();
      v_transpose16(r);
      int64_t pairs = dso_min(16, dso_ceil_div(k - x, 2));
      for (int64_t j = 0; j < pairs; j++) _mm512_storeu_si512(panel + (x / 2 + j) * 32, r[j]);
    }
  }
}

/* 16 个元素转 bf16，零扩展到 32 位；n 不足 16 时其余为 0。 */
static inline __m512i load_halves(const void *src, dso_dtype dtype, int64_t index, int64_t n) {
  if (dtype == DSO_F32 && n >= 16)
    return _mm512_cvtepu16_epi32(v_to_bf16(v_load((const float *)src + index)));
  if (dtype == DSO_BF16) {
    __mmask16 mask = n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)src + index));
  }
  _Alignas(64) float wide[16] = {0};
  base.to_f32(wide, dso_at(src, dtype, index), dtype, n < 16 ? n : 16);
  return _mm512_cvtepu16_epi32(v_to_bf16(_mm512_load_ps(wide)));
}

enum { PACK_AHEAD = 8 }; /* 提前这么多行预取：行距大，硬件预取跟不上 */

static void pack_n(void *dst, dso_dtype fmt, int64_t ps, const void *src, dso_dtype dtype,
                   int64_t ld, int64_t n, int64_t k) {
  if (fmt != DSO_BF16) {
    base.pack_n(dst, fmt, ps, src, dtype, ld, n, k);
    return;
  }
  for (int64_t x = 0; x < k; x += 2)
    for (int64_t p = 0; p * DSO_PANEL < n; p++) {
      int64_t col = p * DSO_PANEL, width = n - col;
      _mm_prefetch(dso_at(src, dtype, (x + PACK_AHEAD + (p & 1)) * ld + col), _MM_HINT_T0);
      __m512i even = load_halves(src, dtype, x * ld + col, width);
      __m512i odd =
          x + 1 < k ? load_halves(src, dtype, (x + 1) * ld + col, width) : _mm512_setzero_si512();
      _mm512_storeu_si512((uint16_t *)dst + p * ps + x * 16,
                          _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

/* ---- 量化的权重解成 bf16，一次 32 个 ---- */

enum { UNPACK_AHEAD = 4096 }; /* 提前一页预取：硬件预取不跨页 */

/* 不足 32 个时用掩码；掩码写内存慢，所以只用在末尾。 */
static inline void store_halves(uint16_t *dst, __m512i v, int64_t n) {
  if (n >= 32)
    _mm512_storeu_si512(dst, v);
  else
    _mm512_mask_storeu_epi16(dst, (__mmask32)((1ull << n) - 1), v);
}

static inline __m512i scaled(__m128i codes_low, __m128i codes_high, __m512 scale) {
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes_low));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes_high));
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale));
}

static void dequant_i8(uint16_t *dst, const int8_t *w, float scale, int64_t k) {
  __m512 factor = _mm512_set1_ps(scale);
  int64_t x = 0;
  for (; x + 32 <= k; x += 32) {
    const __m128i *p = (const __m128i *)(w + x);
    _mm_prefetch((const char *)p + UNPACK_AHEAD, _MM_HINT_T0);
    store_halves(dst + x, scaled(_mm_loadu_si128(p), _mm_loadu_si128(p + 1), factor), 32);
  }
  if (x == k) return;
  __m256i rest = _mm256_maskz_loadu_epi8((__mmask32)((1ull << (k - x)) - 1), w + x);
  __m512i v = scaled(_mm256_castsi256_si128(rest), _mm256_extracti128_si256(rest, 1), factor);
  store_halves(dst + x, v, k - x);
}

static inline __m512i scaled_f8(const uint8_t *p, __m512 scale) {
  __m512 low = v_load_f8_256th(p), high = v_load_f8_256th(p + VL);
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale));
}

static void dequant_f8(uint16_t *dst, const uint8_t *w, const dso_quant *q, int64_t k) {
  for (int64_t g = 0, x = 0; x < k; g++) {
    __m512 factor = _mm512_set1_ps(256.0f * q->scale[g]);
    int64_t end = q->group ? dso_min(x + q->group, k) : k;
    for (; x + 32 <= end; x += 32) {
      _mm_prefetch((const char *)w + x + UNPACK_AHEAD, _MM_HINT_T0);
      store_halves(dst + x, scaled_f8(w + x, factor), 32);
    }
    if (x == end) continue;
    uint8_t rest[32] = {0};
    memcpy(rest, w + x, (size_t)(end - x));
    store_halves(dst + x, scaled_f8(rest, factor), end - x);
    x = end;
  }
}

/* 每组的 16 个值先算好，32 个码查一次表。查表只看下标的低 5 位：表存两遍，第 5 位不必屏蔽。 */
static void dequant_i4(uint16_t *dst, const uint8_t *w, const dso_quant *q, int64_t k) {
  for (int64_t g = 0; g * q->group < k; g++) {
    float scale = q->scale[g], zero = q->zero ? (float)q->zero[g] : 8.0f;
    __m512i table = _mm512_castsi256_si512(v_to_bf16(v4_make(scale, -(scale * zero))));
    table = _mm512_shuffle_i64x2(table, table, 0x44);
    int64_t end = dso_min((g + 1) * q->group, k);
    for (int64_t x = g * q->group; x < end; x += 32) {
      _mm_prefetch((const char *)w + x / 2 + UNPACK_AHEAD, _MM_HINT_T0);
      __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(w + x / 2)));
      __m256i high = _mm256_srli_epi16(low, 4);
      __m512i index = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      store_halves(dst + x, _mm512_permutexvar_epi16(index, table), end - x);
    }
  }
}

static void dequant(void *dst, dso_dtype fmt, const void *w, dso_dtype w_dtype, const dso_quant *q,
                    int64_t k) {
  if (fmt != DSO_BF16)
    base.dequant(dst, fmt, w, w_dtype, q, k);
  else if (w_dtype == DSO_I8)
    dequant_i8((uint16_t *)dst, (const int8_t *)w, q->scale[0], k);
  else if (w_dtype == DSO_F8)
    dequant_f8((uint16_t *)dst, (const uint8_t *)w, q, k);
  else
    dequant_i4((uint16_t *)dst, (const uint8_t *)w, q, k);
}

void dso_isa_init_avx512bf16(dso_isa *isa) {
  base = *isa;
  isa->name = "avx512_bf16";
  isa->native_bf16 = 1;
  isa->stream = stream;
  isa->gemm = gemm_any;
  isa->gemm_t = gemm_t_any;
  isa->dot = dot;
  isa->pack_t = pack_t;
  isa->pack_n = pack_n;
  isa->dequant = dequant;
}
