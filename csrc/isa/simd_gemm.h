/* fp32 矩阵原语的向量实现，由 avx2.c、avx512.c 各包含一次。
 * 寄存器块的大小由包含者给出：
 *   GEMM_TILES(X)  打包路径的 (行数, 面板数)；DOT_MR、DOT_NR  点积路径的行、列数。 */

#define PV (DSO_PANEL / VL) /* 一个面板的向量数 */

#define DEFINE_GEMM_TILE(MR, NV)                                                                   \
  static void gemm_##MR##x##NV(int64_t k, const float *a, int64_t lda, int64_t ks, const float *b, \
                               int64_t ps, float *c, int64_t ldc, int accumulate) {                \
    vf acc[MR][NV * PV];                                                                           \
    for (int i = 0; i < MR; i++)                                                                   \
      for (int j = 0; j < NV * PV; j++) acc[i][j] = v_set1(0.0f);                                  \
    for (int64_t x = 0; x < k; x++) {                                                              \
      vf w[NV * PV];                                                                               \
      for (int j = 0; j < NV * PV; j++)                                                            \
        w[j] = v_load(b + (j / PV) * ps + x * DSO_PANEL + (j % PV) * VL);                          \
      _Pragma("GCC unroll 16") for (int i = 0; i < MR; i++) {                                      \
        vf v = v_set1(a[i * lda + x * ks]);                                                        \
        _Pragma("GCC unroll 8") for (int j = 0; j < NV * PV; j++) acc[i][j] =                      \
            v_fma(v, w[j], acc[i][j]);                                                             \
      }                                                                                            \
    }                                                                                              \
    for (int i = 0; i < MR; i++)                                                                   \
      for (int j = 0; j < NV * PV; j++) {                                                          \
        float *at = c + i * ldc + j * VL;                                                          \
        v_store(at, (accumulate ? v_load(at) : v_set1(0.0f)) + acc[i][j]);                         \
      }                                                                                            \
  }
GEMM_TILES(DEFINE_GEMM_TILE)

typedef void (*gemm_tile_f32)(int64_t, const float *, int64_t, int64_t, const float *, int64_t,
                              float *, int64_t, int);
#define NAME_GEMM_TILE(MR, NV) [NV][MR] = gemm_##MR##x##NV,
static const gemm_tile_f32 GEMM_F32[GEMM_MAX_NV + 1][GEMM_MAX_MR + 1] = {
    GEMM_TILES(NAME_GEMM_TILE)};

/* 沿 k 每 GEMM_KC 步另起一个部分和：一路累加到底，误差随 k 增长，会大于通行的 BLAS。 */
#define GEMM_KC 128

static void gemm_f32(int64_t m, int64_t panels, int64_t k, const float *a, int64_t lda, int64_t ks,
                     const float *b, int64_t ps, float *c, int64_t ldc, int accumulate) {
  for (int64_t p = 0; p < panels;) {
    int nv = GEMM_NV(panels - p), mr = GEMM_MR(nv);
    for (int64_t i = 0; i < m; i += mr) {
      int64_t rows = dso_min(mr, m - i);
      int64_t x = 0;
      do {
        GEMM_F32[nv][rows](dso_min(GEMM_KC, k - x), a + i * lda + x * ks, lda, ks,
                           b + p * ps + x * DSO_PANEL, ps, c + i * ldc + p * DSO_PANEL, ldc,
                           accumulate || x > 0);
        x += GEMM_KC;
      } while (x < k);
    }
    p += nv;
  }
}

/* ---- 点积路径：A、W 都沿 k 连续，W 在读入时转 fp32；add 为 1 时累加到 c。
 * ahead 为 1 时顺带把其后的 nr 行权重预取到二级缓存。 ---- */
static inline __attribute__((always_inline)) void dot_tile(int mr, int nr, int ahead, int64_t k,
                                                           const float *a, int64_t lda,
                                                           const void *w, dso_dtype dtype,
                                                           int64_t ldw, float *c, int64_t ldc,
                                                           int add) {
  vf acc[DOT_MR][DOT_NR_WIDE];
  _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) acc[i][j] = v_set1(0.0f);
  int64_t x = 0;
  for (; x + VL <= k; x += VL) {
    vf av[DOT_MR];
    _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++) av[i] = v_load(a + i * lda + x);
    _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
      if (ahead) _mm_prefetch((const char *)dso_at(w, dtype, (nr + j) * ldw + x), _MM_HINT_T1);
      vf wv = load_full(dso_at(w, dtype, j * ldw + x), dtype);
      _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++) acc[i][j] = v_fma(av[i], wv, acc[i][j]);
    }
  }
  if (x < k)
    for (int j = 0; j < nr; j++) {
      vf wv = load_part(dso_at(w, dtype, j * ldw + x), dtype, k - x);
      for (int i = 0; i < mr; i++)
        acc[i][j] = v_fma(load_part(a + i * lda + x, DSO_F32, k - x), wv, acc[i][j]);
    }
  _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
    float sum = v_hsum(acc[i][j]);
    c[i * ldc + j] = add ? c[i * ldc + j] + sum : sum;
  }
}

/* 一组列沿 k 分段：这一段权重留在一级缓存里，依次服务全部行块。 */
#define DOT_KC 1024

/* 至多 DOT_MR 行；more 为 1 时预取其后的一组列。 */
static inline __attribute__((always_inline)) void dot_rows(int nr, int64_t m, int more, int64_t k,
                                                           const float *a, int64_t lda,
                                                           const void *w, dso_dtype dtype,
                                                           int64_t ldw, float *c, int64_t ldc,
                                                           int add) {
#define ROWS(MR)                                                \
  if (DOT_MR >= MR && m == MR && more)                          \
    dot_tile(MR, nr, 1, k, a, lda, w, dtype, ldw, c, ldc, add); \
  else if (DOT_MR >= MR && m == MR)                             \
    dot_tile(MR, nr, 0, k, a, lda, w, dtype, ldw, c, ldc, add);
  ROWS(1) ROWS(2) ROWS(3) ROWS(4)
#undef ROWS
}

static inline __attribute__((always_inline)) void dot_group(int nr, int64_t m, int more, int64_t k,
                                                            const float *a, int64_t lda,
                                                            const void *w, dso_dtype dtype,
                                                            int64_t ldw, float *c, int64_t ldc) {
  for (int64_t x = 0; x < k; x += DOT_KC)
    for (int64_t i = 0; i < m; i += DOT_MR)
      dot_rows(nr, dso_min(DOT_MR, m - i), more && i == 0, dso_min(DOT_KC, k - x), a + i * lda + x,
               lda, dso_at(w, dtype, x), dtype, ldw, c + i * ldc, ldc, x > 0);
}

static inline __attribute__((always_inline)) void dot_f32_as(int64_t m, int64_t n, int64_t k,
                                                             const float *a, int64_t lda,
                                                             const void *w, dso_dtype dtype,
                                                             int64_t ldw, float *c, int64_t ldc) {
  int64_t j = 0;
  if (m == 1) {
    for (; j + 2 * DOT_NR_WIDE <= n; j += DOT_NR_WIDE)
      dot_tile(1, DOT_NR_WIDE, 1, k, a, lda, dso_at(w, dtype, j * ldw), dtype, ldw, c + j, ldc, 0);
    for (; j + DOT_NR_WIDE <= n; j += DOT_NR_WIDE)
      dot_tile(1, DOT_NR_WIDE, 0, k, a, lda, dso_at(w, dtype, j * ldw), dtype, ldw, c + j, ldc, 0);
  }
  for (; j + DOT_NR <= n; j += DOT_NR)
    dot_group(DOT_NR, m, j + 2 * DOT_NR <= n, k, a, lda, dso_at(w, dtype, j * ldw), dtype, ldw,
              c + j, ldc);
  for (; j < n; j++)
    dot_group(1, m, 0, k, a, lda, dso_at(w, dtype, j * ldw), dtype, ldw, c + j, ldc);
}

static void dot_f32(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const void *w,
                    dso_dtype dtype, int64_t ldw, float *c, int64_t ldc) {
  switch (dtype) {
    case DSO_F32:
      dot_f32_as(m, n, k, a, lda, w, DSO_F32, ldw, c, ldc);
      break;
    case DSO_BF16:
      dot_f32_as(m, n, k, a, lda, w, DSO_BF16, ldw, c, ldc);
      break;
    case DSO_F16:
      dot_f32_as(m, n, k, a, lda, w, DSO_F16, ldw, c, ldc);
      break;
    default:
      dot_f32_as(m, n, k, a, lda, w, DSO_I8, ldw, c, ldc);
      break;
  }
}

/* ---- C [m, n] = A [m, k] · W [k, n]，W 沿 n 连续，原地读 ---- */
#define AXPY_NV 4    /* 每次 4 个向量列 */
#define AXPY_AHEAD 8 /* 提前这么多行预取：行距大，硬件预取跟不上 */

static inline
    __attribute__((always_inline)) void axpy_tile(int mr, int nv, int64_t k, const float *a,
                                                  int64_t lda, const void *w, dso_dtype dtype,
                                                  int64_t ldw, float *c, int64_t ldc) {
  vf acc[AXPY_MR][AXPY_MAX];
  _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 16") for (int j = 0; j < nv; j++) acc[i][j] = v_set1(0.0f);
  for (int64_t x = 0; x < k; x++) {
    _Pragma("GCC unroll 16") for (int j = 0; j < nv; j++) {
      const void *at = dso_at(w, dtype, x * ldw + j * VL);
      if (j * VL * dso_size_of(dtype) % 64 == 0)
        __builtin_prefetch(dso_at(at, dtype, AXPY_AHEAD * ldw));
      vf wv = load_full(at, dtype);
      _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++) acc[i][j] =
          v_fma(v_set1(a[i * lda + x]), wv, acc[i][j]);
    }
  }
  _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 16") for (int j = 0; j < nv; j++)
          v_store(c + i * ldc + j * VL, acc[i][j]);
}

static inline __attribute__((always_inline)) void axpy_n_as(int64_t m, int64_t n, int64_t k,
                                                            const float *a, int64_t lda,
                                                            const void *w, dso_dtype dtype,
                                                            int64_t ldw, float *c, int64_t ldc) {
  int64_t j = 0;
  if (m == 1)
    for (; j + AXPY_MAX * VL <= n; j += AXPY_MAX * VL)
      axpy_tile(1, AXPY_MAX, k, a, lda, dso_at(w, dtype, j), dtype, ldw, c + j, ldc);
  for (; j + AXPY_NV * VL <= n; j += AXPY_NV * VL) {
    const void *wj = dso_at(w, dtype, j);
    int64_t i = 0;
    for (; i + AXPY_MR <= m; i += AXPY_MR)
      axpy_tile(AXPY_MR, AXPY_NV, k, a + i * lda, lda, wj, dtype, ldw, c + i * ldc + j, ldc);
    for (; i < m; i++)
      axpy_tile(1, AXPY_NV, k, a + i * lda, lda, wj, dtype, ldw, c + i * ldc + j, ldc);
  }
  for (; j < n; j += VL) {
    int64_t width = dso_min(VL, n - j);
    for (int64_t i = 0; i < m; i++) {
      vf acc = v_set1(0.0f);
      for (int64_t x = 0; x < k; x++)
        acc = v_fma(v_set1(a[i * lda + x]), load_part(dso_at(w, dtype, x * ldw + j), dtype, width),
                    acc);
      store_part(c + i * ldc + j, DSO_F32, acc, width);
    }
  }
}

static void axpy_n(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const void *w,
                   dso_dtype dtype, int64_t ldw, float *c, int64_t ldc) {
  switch (dtype) {
    case DSO_F32:
      axpy_n_as(m, n, k, a, lda, w, DSO_F32, ldw, c, ldc);
      break;
    case DSO_BF16:
      axpy_n_as(m, n, k, a, lda, w, DSO_BF16, ldw, c, ldc);
      break;
    case DSO_F16:
      axpy_n_as(m, n, k, a, lda, w, DSO_F16, ldw, c, ldc);
      break;
    default:
      axpy_n_as(m, n, k, a, lda, w, DSO_I8, ldw, c, ldc);
      break;
  }
}

/* ---- fp32 打包 ---- */
static inline __attribute__((always_inline)) void pack_n_as(float *dst, int64_t ps, const void *src,
                                                            dso_dtype dtype, int64_t ld, int64_t n,
                                                            int64_t k) {
  for (int64_t p = 0; p * DSO_PANEL < n; p++) {
    int64_t width = dso_min(DSO_PANEL, n - p * DSO_PANEL);
    for (int64_t x = 0; x < k; x++) {
      float *row = dst + p * ps + x * DSO_PANEL;
      const void *from = dso_at(src, dtype, x * ld + p * DSO_PANEL);
      for (int64_t j = 0; j < DSO_PANEL; j += VL) {
        int64_t rest = width - j;
        v_store(row + j, rest >= VL ? load_full(dso_at(from, dtype, j), dtype)
                         : rest > 0 ? load_part(dso_at(from, dtype, j), dtype, rest)
                                    : v_set1(0.0f));
      }
    }
  }
}

static void pack_n_f32(float *dst, int64_t ps, const void *src, dso_dtype dtype, int64_t ld,
                       int64_t n, int64_t k) {
  switch (dtype) {
    case DSO_F32:
      pack_n_as(dst, ps, src, DSO_F32, ld, n, k);
      break;
    case DSO_BF16:
      pack_n_as(dst, ps, src, DSO_BF16, ld, n, k);
      break;
    case DSO_F16:
      pack_n_as(dst, ps, src, DSO_F16, ld, n, k);
      break;
    default:
      pack_n_as(dst, ps, src, DSO_I8, ld, n, k);
      break;
  }
}

/* 一次转置 16 列 x PACK_K 行；转换先写到栈上。 */
#define PACK_K 64
static void pack_t_f32(float *dst, int64_t ps, const void *src, dso_dtype dtype, int64_t ld,
                       int64_t n, int64_t k) {
  _Alignas(64) float rows[DSO_PANEL][PACK_K];
  for (int64_t p = 0; p * DSO_PANEL < n; p++) {
    int64_t width = dso_min(DSO_PANEL, n - p * DSO_PANEL);
    for (int64_t x = 0; x < k; x += PACK_K) {
      int64_t depth = dso_min(PACK_K, k - x);
      for (int64_t j = 0; j < width; j++)
        to_f32(rows[j], dso_at(src, dtype, (p * DSO_PANEL + j) * ld + x), dtype, depth);
      if (width < DSO_PANEL) memset(rows[width], 0, sizeof(rows[0]) * (size_t)(DSO_PANEL - width));
      transpose(dst + p * ps + x * DSO_PANEL, DSO_PANEL, rows[0], PACK_K, DSO_PANEL, depth);
    }
  }
}
