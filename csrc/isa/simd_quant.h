/* 量化权重的向量实现，由 avx2.c、avx512.c 各包含一次（在 simd_gemm.h 之后）。
 * DOT_NR_QUANT：行多时一次的列数；一行时 DOT_NR_WIDE 列。
 *
 * int4、fp8 读入时直接解成 fp32 再乘加：尺度（与零点）在解开时并进去，不另算组内部分和。int4 并进每组一次的表里
 * （v4_unpack），一行、AVX-512 时每 32 个权重 6 条指令：读、移位、两次查表、两次乘加。 */

#define QUANT_STEP 32                /* 一次解开的权重；int4 是一段 16 字节 */
#define QUANT_VECS (QUANT_STEP / VL) /* 它们的向量数 */

/* x 个权重（x 为 QUANT_STEP 的倍数）的字节数；一组多少个权重（fp8 可以整行一组）。 */
static inline int64_t quant_bytes(dso_dtype type, int64_t x) { return type == DSO_I4 ? x / 2 : x; }
static inline int64_t quant_group(const dso_quant *q, int64_t k) { return q->group ? q->group : k; }

/* 一列一组的尺度：int4 是表，fp8 是 2^8 倍的尺度（v_load_f8_256th 少乘的在这里补上）。 */
typedef struct {
  v4 table;
  vf scale;
} group_scale;

static inline group_scale group_scale_of(dso_dtype type, const dso_quant *q, int64_t at) {
  float scale = q->scale[at], zero = q->zero ? (float)q->zero[at] : 8.0f;
  if (type == DSO_F8) return (group_scale){.scale = v_set1(256.0f * scale)};
  return (group_scale){.table = v4_make(scale, -(scale * zero))};
}

static inline __attribute__((always_inline)) void unpack(dso_dtype type, vf *out, const uint8_t *p,
                                                         group_scale s) {
  if (type == DSO_I4)
    v4_unpack(out, p, s.table);
  else
    _Pragma("GCC unroll 4") for (int v = 0; v < QUANT_VECS; v++) out[v] =
        v_load_f8_256th(p + v * VL) * s.scale;
}

/* 一步 QUANT_STEP 个权重：nr 列各解开一次，供 mr 行使用。 */
static inline __attribute__((always_inline)) void quant_step(dso_dtype type, int mr, int nr,
                                                             const float *a, int64_t lda,
                                                             const uint8_t *w, int64_t ldw,
                                                             const group_scale *scale,
                                                             vf acc[DOT_MR][DOT_NR_WIDE]) {
  _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
    vf wv[QUANT_VECS];
    unpack(type, wv, w + j * ldw, scale[j]);
    _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
        _Pragma("GCC unroll 4") for (int v = 0; v < QUANT_VECS; v++) acc[i][j] =
            v_fma(v_load(a + i * lda + v * VL), wv[v], acc[i][j]);
  }
}

/* k 的零头：A 补 0 到一步，int4 补齐的权重因此不起作用；fp8 的行不补齐，多出的权重当作 0。 */
static inline __attribute__((always_inline)) void quant_tail(dso_dtype type, int mr, int nr,
                                                             int64_t rest, const float *a,
                                                             int64_t lda, const uint8_t *w,
                                                             int64_t ldw, const group_scale *scale,
                                                             vf acc[DOT_MR][DOT_NR_WIDE]) {
  _Alignas(64) float padded[DOT_MR][QUANT_STEP] = {{0}};
  uint8_t codes[DOT_NR_WIDE][QUANT_STEP] = {{0}};
  for (int i = 0; i < mr; i++) memcpy(padded[i], a + i * lda, (size_t)rest * 4);
  if (type == DSO_F8) {
    for (int j = 0; j < nr; j++) memcpy(codes[j], w + j * ldw, (size_t)rest);
    w = codes[0], ldw = QUANT_STEP;
  }
  quant_step(type, mr, nr, padded[0], QUANT_STEP, w, ldw, scale, acc);
}

static inline __attribute__((always_inline)) void quant_tile(dso_dtype type, int mr, int nr,
                                                             int64_t k, const float *a, int64_t lda,
                                                             const uint8_t *w, int64_t ldw,
                                                             const dso_quant *q, float *c,
                                                             int64_t ldc) {
  vf acc[DOT_MR][DOT_NR_WIDE];
  _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) acc[i][j] = v_set1(0.0f);
  for (int64_t g = 0, x = 0; x < k; g++) {
    int64_t end = dso_min(x + quant_group(q, k), k);
    group_scale scale[DOT_NR_WIDE];
    _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) scale[j] =
        group_scale_of(type, q, j * q->groups + g);
    for (; x + QUANT_STEP <= end; x += QUANT_STEP)
      quant_step(type, mr, nr, a + x, lda, w + quant_bytes(type, x), ldw, scale, acc);
    if (x < end)
      quant_tail(type, mr, nr, end - x, a + x, lda, w + quant_bytes(type, x), ldw, scale, acc);
    x = end;
  }
  _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) c[i * ldc + j] = v_hsum(acc[i][j]);
}

static inline __attribute__((always_inline)) void quant_rows(dso_dtype type, int nr, int64_t m,
                                                             int64_t k, const float *a, int64_t lda,
                                                             const uint8_t *w, int64_t ldw,
                                                             const dso_quant *q, float *c,
                                                             int64_t ldc) {
  int64_t i = 0;
  for (; i + DOT_MR <= m; i += DOT_MR)
    quant_tile(type, DOT_MR, nr, k, a + i * lda, lda, w, ldw, q, c + i * ldc, ldc);
  for (; i < m; i++) quant_tile(type, 1, nr, k, a + i * lda, lda, w, ldw, q, c + i * ldc, ldc);
}

static inline __attribute__((always_inline)) void dot_quant(dso_dtype type, int64_t m, int64_t n,
                                                            int64_t k, const float *a, int64_t lda,
                                                            const uint8_t *w, int64_t ldw,
                                                            const dso_quant *q, float *c,
                                                            int64_t ldc) {
  int64_t j = 0;
  if (m == 1)
    for (; j + DOT_NR_WIDE <= n; j += DOT_NR_WIDE) {
      dso_quant at = dso_quant_at(q, j, 0);
      quant_tile(type, 1, DOT_NR_WIDE, k, a, lda, w + j * ldw, ldw, &at, c + j, ldc);
    }
  for (; j + DOT_NR_QUANT <= n; j += DOT_NR_QUANT) {
    dso_quant at = dso_quant_at(q, j, 0);
    quant_rows(type, DOT_NR_QUANT, m, k, a, lda, w + j * ldw, ldw, &at, c + j, ldc);
  }
  for (; j < n; j++) {
    dso_quant at = dso_quant_at(q, j, 0);
    quant_rows(type, 1, m, k, a, lda, w + j * ldw, ldw, &at, c + j, ldc);
  }
}

static void pack_q(void *dst, const void *src, dso_dtype dtype, int64_t k, dso_dtype w_dtype,
                   int64_t group) {
  (void)w_dtype, (void)group;
  to_f32((float *)dst, src, dtype, k);
}

static void dot_q(int64_t m, int64_t n, int64_t k, const void *a, int64_t a_stride, const void *w,
                  dso_dtype w_dtype, int64_t ldw, const dso_quant *q, float *c, int64_t ldc,
                  const void *next) {
  (void)next;
  const float *x = (const float *)a;
  int64_t lda = a_stride / (int64_t)sizeof *x;
  switch (w_dtype) {
    case DSO_I4:
      dot_quant(DSO_I4, m, n, k, x, lda, (const uint8_t *)w, ldw, q, c, ldc);
      return;
    case DSO_F8:
      dot_quant(DSO_F8, m, n, k, x, lda, (const uint8_t *)w, ldw, q, c, ldc);
      return;
    default:
      dot_f32(m, n, k, x, lda, w, DSO_I8, ldw, c, ldc);
      for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) c[i * ldc + j] *= q->scale[j];
  }
}

/* int8、fp8：一组一个尺度，码一个一字节。 */
static void dequant_bytes(float *dst, const void *w, dso_dtype type, const dso_quant *q,
                          int64_t k) {
  for (int64_t g = 0, x = 0; x < k; g++, x += quant_group(q, k)) {
    int64_t n = dso_min(quant_group(q, k), k - x);
    to_f32(dst + x, dso_at(w, type, x), type, n);
    vscale(dst + x, q->scale[g], n);
  }
}

static void dequant(void *to, dso_dtype fmt, const void *w, dso_dtype w_dtype, const dso_quant *q,
                    int64_t k) {
  (void)fmt; /* 本指令集只用 fp32 计算格式 */
  float *dst = (float *)to;
  if (w_dtype != DSO_I4) {
    dequant_bytes(dst, w, w_dtype, q, k);
    return;
  }
  const uint8_t *codes = (const uint8_t *)w;
  for (int64_t x = 0; x < k; x += QUANT_STEP) {
    vf out[QUANT_VECS];
    unpack(DSO_I4, out, codes + quant_bytes(DSO_I4, x), group_scale_of(DSO_I4, q, x / q->group));
    if (x + QUANT_STEP <= k) {
      for (int v = 0; v < QUANT_VECS; v++) v_store(dst + x + v * VL, out[v]);
    } else {
      _Alignas(64) float whole[QUANT_STEP];
      for (int v = 0; v < QUANT_VECS; v++) v_store(whole + v * VL, out[v]);
      memcpy(dst + x, whole, (size_t)(k - x) * 4);
    }
  }
}
