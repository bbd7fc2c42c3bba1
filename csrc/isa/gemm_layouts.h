/* 两种左操作数布局都归结为 gemm_strided；由各指令集文件在定义它之后包含。
 * gemm_strided：A 的元素 (i, x) 在 a[i * lda + x * ks]；BF16 时 x 以相邻的一对计。 */
static void gemm(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, const void *a, int64_t lda,
                 const void *b, int64_t ps, float *c, int64_t ldc, int accumulate) {
  gemm_strided(fmt, m, panels, k, a, lda, fmt == DSO_BF16 ? 2 : 1, b, ps, c, ldc, accumulate);
}

/* 每个 16 行的面板：相邻两行差一个（对），相邻两个 k 差一整排。 */
static void gemm_t(dso_dtype fmt, int64_t m, int64_t panels, int64_t k, const void *a,
                   int64_t a_stride, const void *b, int64_t ps, float *c, int64_t ldc,
                   int accumulate) {
  int64_t unit = fmt == DSO_BF16 ? 2 : 1;
  for (int64_t i = 0; i < m; i += DSO_PANEL)
    gemm_strided(fmt, dso_min(DSO_PANEL, m - i), panels, k,
                 dso_at(a, fmt, i / DSO_PANEL * a_stride), unit, unit * DSO_PANEL, b, ps,
                 c + i * ldc, ldc, accumulate);
}
