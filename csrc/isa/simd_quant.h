/* 量化权重的向量实现，由 avx2.c、avx512.c 各包含一次（在 simd_gemm.h 之后）。
 * DOT_NR_QUANT：行多时一次的列数；int4 一行时 DOT_NR_WIDE 列。
 *
 * int4 读入时直接解成 fp32（v4_unpack）再乘加：尺度与零点并进每组一次的表里，不另算组内部分和。
 * 一行、AVX-512 时每 32 个权重 6 条指令：读、移位、两次查表、两次乘加。 */

#define I4_STEP 32             /* 一段 16 字节 */
#define I4_VECS (I4_STEP / VL) /* 一段的向量数 */
#define I4_BYTES(x) ((x) / 2)  /* 第 x 个权重（x 为 I4_STEP 的倍数）的字节位置 */

static inline v4 i4_table(const dso_quant *q, int64_t at) {
  float scale = q->scale[at], zero = q->zero ? (float)q->zero[at] : 8.0f;
  return v4_make(scale, -(scale * zero));
}

/* 一段 I4_STEP 个权重：nr 列各解开一次，供 mr 行使用。 */
static inline __attribute__((always_inline)) void i4_step(int mr, int nr, const float *a,
                                                          int64_t lda, const uint8_t *w,
                                                          int64_t ldw, const v4 *table,
                                                          vf acc[DOT_MR][DOT_NR_WIDE]) {
  _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
    vf wv[I4_VECS];
    v4_unpack(wv, w + j * ldw, table[j]);
    _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
        _Pragma("GCC unroll 4") for (int v = 0; v < I4_VECS; v++) acc[i][j] =
            v_fma(v_load(a + i * lda + v * VL), wv[v], acc[i][j]);
  }
}

/* k 的零头：A 补 0 到一段，补齐的权重因此不起作用。 */
static inline __attribute__((always_inline)) void i4_tail(int mr, int nr, int64_t rest,
                                                          const float *a, int64_t lda,
                                                          const uint8_t *w, int64_t ldw,
                                                          const v4 *table,
                                                          vf acc[DOT_MR][DOT_NR_WIDE]) {
  _Alignas(64) float padded[DOT_MR][I4_STEP] = {{0}};
  for (int i = 0; i < mr; i++) memcpy(padded[i], a + i * lda, (size_t)rest * 4);
  i4_step(mr, nr, padded[0], I4_STEP, w, ldw, table, acc);
}

static inline __attribute__((always_inline)) void i4_tile(int mr, int nr, int64_t k, const float *a,
                                                          int64_t lda, const uint8_t *w,
                                                          int64_t ldw, const dso_quant *q, float *c,
                                                          int64_t ldc) {
  vf acc[DOT_MR][DOT_NR_WIDE];
  _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) acc[i][j] = v_set1(0.0f);
  for (int64_t g = 0, x = 0; x < k; g++) {
    int64_t end = dso_min(x + q->group, k);
    v4 table[DOT_NR_WIDE];
    _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) table[j] = i4_table(q, j * q->groups + g);
    for (; x + I4_STEP <= end; x += I4_STEP)
      i4_step(mr, nr, a + x, lda, w + I4_BYTES(x), ldw, table, acc);
    if (x < end) i4_tail(mr, nr, end - x, a + x, lda, w + I4_BYTES(x), ldw, table, acc);
    x = end;
  }
  _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) c[i * ldc + j] = v_hsum(acc[i][j]);
}

static inline __attribute__((always_inline)) void i4_group(int nr, int64_t m, int64_t k,
                                                           const float *a, int64_t lda,
                                                           const uint8_t *w, int64_t ldw,
                                                           const dso_quant *q, float *c,
                                                           int64_t ldc) {
  int64_t i = 0;
  for (; i + DOT_MR <= m; i += DOT_MR)
    i4_tile(DOT_MR, nr, k, a + i * lda, lda, w, ldw, q, c + i * ldc, ldc);
  for (; i < m; i++) i4_tile(1, nr, k, a + i * lda, lda, w, ldw, q, c + i * ldc, ldc);
}

static void dot_i4(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const uint8_t *w,
                   int64_t ldw, const dso_quant *q, float *c, int64_t ldc) {
  int64_t j = 0;
  if (m == 1)
    for (; j + DOT_NR_WIDE <= n; j += DOT_NR_WIDE) {
      dso_quant at = dso_quant_at(q, j, 0);
      i4_tile(1, DOT_NR_WIDE, k, a, lda, w + j * ldw, ldw, &at, c + j, ldc);
    }
  for (; j + DOT_NR_QUANT <= n; j += DOT_NR_QUANT) {
    dso_quant at = dso_quant_at(q, j, 0);
    i4_group(DOT_NR_QUANT, m, k, a, lda, w + j * ldw, ldw, &at, c + j, ldc);
  }
  for (; j < n; j++) {
    dso_quant at = dso_quant_at(q, j, 0);
    i4_group(1, m, k, a, lda, w + j * ldw, ldw, &at, c + j, ldc);
  }
}

/* ---- fp8：码转成 fp32 乘加，一组（或整行）的和再乘尺度；NaN 的码另记，最后整列换成 NaN ---- */

#define F8_STEP 32
#define F8_VECS (F8_STEP / VL)

/* 一步 F8_STEP 个权重：nr 列各解开一次，供 mr 行使用；顺带预取其后的 nr 列（越过末尾的预取无害）。 */
static inline __attribute__((always_inline)) void f8_step(int mr, int nr, const float *a,
                                                          int64_t lda, const uint8_t *w,
                                                          int64_t ldw, v_bytes *most,
                                                          vf part[DOT_MR][DOT_NR_WIDE]) {
  _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) {
    vf wv[F8_VECS];
    _mm_prefetch((const char *)(w + (nr + j) * ldw), _MM_HINT_T1);
    v8_unpack(wv, w + j * ldw, &most[j]);
    _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
        _Pragma("GCC unroll 4") for (int v = 0; v < F8_VECS; v++) part[i][j] =
            v_fma(v_load(a + i * lda + v * VL), wv[v], part[i][j]);
  }
}

/* k 的零头：两边都补 0 到一步（行不补齐，不能多读）。 */
static inline __attribute__((always_inline)) void f8_tail(int mr, int nr, int64_t rest,
                                                          const float *a, int64_t lda,
                                                          const uint8_t *w, int64_t ldw,
                                                          v_bytes *most,
                                                          vf part[DOT_MR][DOT_NR_WIDE]) {
  _Alignas(64) float padded[DOT_MR][F8_STEP] = {{0}};
  uint8_t codes[DOT_NR_WIDE][F8_STEP] = {{0}};
  for (int i = 0; i < mr; i++) memcpy(padded[i], a + i * lda, (size_t)rest * 4);
  for (int j = 0; j < nr; j++) memcpy(codes[j], w + j * ldw, (size_t)rest);
  f8_step(mr, nr, padded[0], F8_STEP, codes[0], F8_STEP, most, part);
}

static inline int64_t group_of(const dso_quant *q, int64_t k) { return q->group ? q->group : k; }

static inline __attribute__((always_inline)) void f8_tile(int mr, int nr, int64_t k, const float *a,
                                                          int64_t lda, const uint8_t *w,
                                                          int64_t ldw, const dso_quant *q, float *c,
                                                          int64_t ldc) {
  vf acc[DOT_MR][DOT_NR_WIDE], part[DOT_MR][DOT_NR_WIDE];
  v_bytes most[DOT_NR_WIDE];
  _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) most[j] = v_bytes_zero();
  _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
      _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) acc[i][j] = v_set1(0.0f);
  for (int64_t g = 0, x = 0; x < k; g++) {
    int64_t end = dso_min(x + group_of(q, k), k);
    _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
        _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) part[i][j] = v_set1(0.0f);
    for (; x + F8_STEP <= end; x += F8_STEP) f8_step(mr, nr, a + x, lda, w + x, ldw, most, part);
    if (x < end) f8_tail(mr, nr, end - x, a + x, lda, w + x, ldw, most, part);
    x = end;
    _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++)
        _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++) acc[i][j] =
            v_fma(part[i][j], v_set1(256.0f * q->scale[j * q->groups + g]), acc[i][j]);
  }
  _Pragma("GCC unroll 8") for (int j = 0; j < nr; j++)
      _Pragma("GCC unroll 8") for (int i = 0; i < mr; i++) c[i * ldc + j] =
          v_bytes_nan(most[j]) ? NAN : v_hsum(acc[i][j]);
}

static inline __attribute__((always_inline)) void f8_group(int nr, int64_t m, int64_t k,
                                                           const float *a, int64_t lda,
                                                           const uint8_t *w, int64_t ldw,
                                                           const dso_quant *q, float *c,
                                                           int64_t ldc) {
  int64_t i = 0;
  for (; i + DOT_MR <= m; i += DOT_MR)
    f8_tile(DOT_MR, nr, k, a + i * lda, lda, w, ldw, q, c + i * ldc, ldc);
  for (; i + 2 <= m; i += 2) f8_tile(2, nr, k, a + i * lda, lda, w, ldw, q, c + i * ldc, ldc);
  for (; i < m; i++) f8_tile(1, nr, k, a + i * lda, lda, w, ldw, q, c + i * ldc, ldc);
}

static void dot_f8(int64_t m, int64_t n, int64_t k, const float *a, int64_t lda, const uint8_t *w,
                   int64_t ldw, const dso_quant *q, float *c, int64_t ldc) {
  int64_t j = 0;
  for (; j + DOT_NR_QUANT <= n; j += DOT_NR_QUANT) {
    dso_quant at = dso_quant_at(q, j, 0);
    f8_group(DOT_NR_QUANT, m, k, a, lda, w + j * ldw, ldw, &at, c + j, ldc);
  }
  for (; j < n; j++) {
    dso_quant at = dso_quant_at(q, j, 0);
    f8_group(1, m, k, a, lda, w + j * ldw, ldw, &at, c + j, ldc);
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
      dot_i4(m, n, k, x, lda, (const uint8_t *)w, ldw, q, c, ldc);
      return;
    case DSO_F8:
      dot_f8(m, n, k, x, lda, (const uint8_t *)w, ldw, q, c, ldc);
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
  for (int64_t g = 0, x = 0; x < k; g++, x += group_of(q, k)) {
    int64_t n = dso_min(group_of(q, k), k - x);
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
  for (int64_t x = 0; x < k; x += I4_STEP) {
    vf out[I4_VECS];
    v4_unpack(out, codes + I4_BYTES(x), i4_table(q, x / q->group));
    if (x + I4_STEP <= k) {
      for (int v = 0; v < I4_VECS; v++) v_store(dst + x + v * VL, out[v]);
    } else {
      _Alignas(64) float whole[I4_STEP];
      for (int v = 0; v < I4_VECS; v++) v_store(whole + v * VL, out[v]);
      memcpy(dst + x, whole, (size_t)(k - x) * 4);
    }
  }
}
