/* rms_norm、rope、mla_cache_write、mla_qkv_a：与 double 的直白写法比较。 */
#include <stdio.h>
#include <string.h>

#include "harness.h"
#include "isa/convert.h"

static const dso_dtype FLOATS[] = {DSO_F32, DSO_BF16, DSO_F16};

static void norm_case(const dso_isa *isa, dso_dtype type, dso_dtype w_type, int64_t rows,
                      int64_t dim, int residual) {
  char label[96];
  snprintf(label, sizeof label, "%s rms_norm %s/%s [%lld, %lld]", isa->name, dtype_name(type),
           dtype_name(w_type), (long long)rows, (long long)dim);
  int64_t rs = dim + random_below(4);
  buf x = new_random(type, (rows - 1) * rs + dim, 2.0), r = new_random(type, rows * dim, 1.0),
      w = new_random(w_type, dim, 1.0);
  buf y = new_buf(type, rows * dim), total = new_buf(type, rows * dim), *outs[] = {&y, &total};
  dso_rms_norm_params p = {rows,
                           dim,
                           {x.data, rs, type},
                           {residual ? r.data : NULL, dim, type},
                           w.data,
                           w_type,
                           y.data,
                           residual ? total.data : NULL,
                           1e-5f};
  execute(label, &dso_rms_norm, &p, isa, outs, 2);
  buf g = new_random(type, rows * dim, 1.0), dx = new_buf(type, rows * dim),
      dw = new_buf(w_type, dim), *grads[] = {&dx, &dw};
  dso_rms_norm_backward_params q = {
      rows, dim, {g.data, dim, type}, {x.data, rs, type}, w.data, w_type, dx.data, dw.data, 1e-5f};
  execute(label, &dso_rms_norm_backward, &q, isa, grads, 2);
  double *want = doubles(rows * dim), *sum = doubles(rows * dim), *rdx = doubles(rows * dim),
         *rdw = doubles(dim);
  for (int64_t i = 0; i < rows; i++) {
    double square = 0.0, clean = 0.0, dot = 0.0;
    for (int64_t j = 0; j < dim; j++) {
      double v = get(&x, i * rs + j), t = residual ? get(&total, i * dim + j) : v;
      sum[i * dim + j] = v + get(&r, i * dim + j);
      square += t * t, clean += v * v;
    }
    double s = 1.0 / sqrt(square / (double)dim + 1e-5), c = 1.0 / sqrt(clean / (double)dim + 1e-5);
    for (int64_t j = 0; j < dim; j++) {
      double hat = get(&x, i * rs + j) * c, grad = get(&g, i * dim + j);
      want[i * dim + j] =
          (residual ? get(&total, i * dim + j) : get(&x, i * rs + j)) * s * get(&w, j);
      rdw[j] += grad * hat;
      dot += grad * get(&w, j) * hat / (double)dim;
    }
    for (int64_t j = 0; j < dim; j++)
      rdx[i * dim + j] = c * (get(&g, i * dim + j) * get(&w, j) - get(&x, i * rs + j) * c * dot);
  }
  double wide = fmax(tolerance(type), tolerance(w_type));
  check_close(label, &y, want, tolerance(type), 1.0);
  if (residual) check_close(label, &total, sum, tolerance(type), 1.0);
  check_close(label, &dx, rdx, tolerance(type), 1.0);
  check_close(label, &dw, rdw, wide, sqrt((double)rows));
  free_all();
}

/* in [d] 旋转成 out；inverse 为转置。keep：成对的输入，输出也成对。 */
static void rotate(const double *in, double *out, const float *cos, const float *sin, int64_t half,
                   int interleaved, int inverse, int keep) {
  for (int64_t i = 0; i < half; i++) {
    int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + half;
    int64_t c = keep ? a : i, d = keep ? b : i + half;
    if (inverse) {
      out[a] = in[c] * cos[i] + in[d] * sin[i];
      out[b] = in[d] * cos[i] - in[c] * sin[i];
    } else {
      out[c] = in[a] * cos[i] - in[b] * sin[i];
      out[d] = in[b] * cos[i] + in[a] * sin[i];
    }
  }
}

static void rope_case(const dso_isa *isa, dso_dtype type, int64_t b, int64_t t, int64_t h,
                      int64_t half, int mode) {
  char label[96];
  int64_t d = 2 * half, hs = d + random_below(4), ts = h * hs + random_below(3), bs = t * ts;
  int interleaved = mode & 1, inverse = mode >> 1 & 1, shared = mode >> 2 & 1,
      in_place = mode >> 3 & 1, keep = interleaved && mode >> 4 & 1;
  snprintf(label, sizeof label, "%s rope %s 模式 %d", isa->name, dtype_name(type), mode);
  int64_t last = (b - 1) * bs + (t - 1) * ts + (h - 1) * hs + d;
  buf x = new_random(type, last, 1.0), y = new_buf(type, b * t * h * d),
      *outs[] = {in_place ? &x : &y};
  buf cos = new_random(DSO_F32, (shared ? 1 : b) * t * half, 1.0),
      sin = new_random(DSO_F32, cos.n, 1.0);
  double *want = doubles(b * t * h * d), *in = doubles(d);
  for (int64_t i = 0; i < b * t * h; i++) {
    int64_t row = i / (t * h), step = i / h % t;
    const float *c = cos.data, *s = sin.data;
    int64_t at = ((shared ? 0 : row) * t + step) * half;
    for (int64_t j = 0; j < d; j++) in[j] = get(&x, row * bs + step * ts + i % h * hs + j);
    rotate(in, want + i * d, c + at, s + at, half, interleaved, inverse, keep);
  }
  dso_rope_params p = {b,
                       t,
                       h,
                       d,
                       x.data,
                       bs,
                       ts,
                       hs,
                       type,
                       cos.data,
                       sin.data,
                       shared ? 0 : t * half,
                       half,
                       in_place ? x.data : y.data,
                       in_place ? bs : t * h * d,
                       in_place ? ts : h * d,
                       in_place ? hs : d,
                       interleaved,
                       inverse,
                       keep};
  execute(label, &dso_rope, &p, isa, outs, 1);
  for (int64_t i = 0; in_place && i < y.n; i++) {
    int64_t token = i / (h * d), row = token / t, step = token % t;
    put(&y, i, get(&x, row * bs + step * ts + i / d % h * hs + i % d));
  }
  check_close(label, &y, want, tolerance(type), 1.0);
  free_all();
}

/* 量化之后的码，读回来的值。 */
static double code_of(dso_dtype to, float x) {
  return to == DSO_I8 ? rint(x) : dso_f8_to_f32(dso_f32_to_f8(x));
}

static void write_case(const dso_isa *isa, dso_dtype from, dso_dtype to, int64_t t, int64_t rank,
                       int64_t dr) {
  enum { B = 3, EXTRA = 5 };
  char label[96];
  snprintf(label, sizeof label, "%s mla_cache_write %s 到 %s t=%lld r=%lld", isa->name,
           dtype_name(from), dtype_name(to), (long long)t, (long long)rank);
  int64_t slots = t + EXTRA, rs = rank + 1;
  int quantized = dso_quantized_latent(to);
  dso_dtype rope_to = quantized ? DSO_BF16 : to;
  buf latent = new_random(from, B * t * rank, 1.0), rope = new_random(from, B * t * dr, 1.0);
  buf cache = new_random(to, B * slots * rs - 1, 1.0),
      keys = new_random(rope_to, B * slots * dr, 1.0);
  buf scale = new_random(DSO_F32, B * slots, 1.0), *outs[] = {&cache, &keys, &scale};
  for (int64_t j = 0; j < rank; j++) put(&latent, j, 0.0); /* 全零的词元：尺度为 0 */
  int64_t offsets[B] = {0, EXTRA, random_below(EXTRA)};
  double *want = doubles(cache.n), *want_keys = doubles(keys.n), *want_scale = doubles(scale.n);
  for (int64_t i = 0; i < cache.n; i++) want[i] = get(&cache, i);
  for (int64_t i = 0; i < keys.n; i++) want_keys[i] = get(&keys, i);
  for (int64_t i = 0; i < scale.n; i++) want_scale[i] = get(&scale, i);
  for (int64_t i = 0; i < B * t; i++) {
    int64_t at = i / t * slots + offsets[i / t] + i % t;
    double top = 0.0;
    for (int64_t j = 0; j < rank; j++) top = fmax(top, fabs(get(&latent, i * rank + j)));
    float unit = (float)top / (to == DSO_I8 ? DSO_I8_MOST : DSO_F8_MOST);
    for (int64_t j = 0; j < rank; j++) {
      double v = get(&latent, i * rank + j);
      want[at * rs + j] = quantized ? code_of(to, top > 0 ? (float)v / unit : 0.0f) : v;
    }
    want_scale[at] = quantized ? (double)unit : want_scale[at];
    for (int64_t j = 0; j < dr; j++) want_keys[at * dr + j] = get(&rope, i * dr + j);
  }
  dso_mla_cache_write_params p = {
      B,          t,      rank,       dr,   latent.data, rope.data,  t * rank,
      rank,       t * dr, dr,         from, from,        cache.data, keys.data,
      slots * rs, rs,     slots * dr, dr,   to,          rope_to,    quantized ? scale.data : NULL,
      slots,      offsets};
  execute(label, &dso_mla_cache_write, &p, isa, outs, 3);
  check_close(label, &cache, want, quantized || from == to ? 0.0 : tolerance(to), 1.0);
  check_close(label, &keys, want_keys, from == rope_to ? 0.0 : tolerance(rope_to), 1.0);
  check_close(label, &scale, want_scale, 1e-7, 0.0);
  free_all();
}

/* row [n] += 偏置，归一化乘权重。 */
static void norm_double(double *row, int64_t n, const buf *bias, int64_t bias_at,
                        const buf *weight) {
  double square = 0.0;
  for (int64_t j = 0; j < n; j++) {
    row[j] += bias ? get(bias, bias_at + j) : 0.0;
    square += row[j] * row[j];
  }
  double s = 1.0 / sqrt(square / (double)n + 1e-6);
  for (int64_t j = 0; weight && j < n; j++) row[j] *= s * get(weight, j);
}

static void qkv_case(const dso_isa *isa, dso_dtype type, int64_t m, int64_t k, int64_t q_rank,
                     int64_t rank, int64_t half, int bias) {
  char label[96];
  snprintf(label, sizeof label, "%s mla_qkv_a %s m=%lld k=%lld qr=%lld", isa->name,
           dtype_name(type), (long long)m, (long long)k, (long long)q_rank);
  int64_t dr = 2 * half, width = rank + dr;
  double spread = 1.0 / sqrt((double)k);
  buf x = new_random(type, m * k, 1.0), qa = new_random(type, q_rank * k, spread),
      kva = new_random(type, width * k, spread);
  buf qb = new_random(type, q_rank, 1.0), kvb = new_random(type, width, 1.0),
      qn = new_random(type, q_rank, 1.0);
  buf kvn = new_random(type, rank, 1.0), cos = new_random(DSO_F32, m * half, 1.0),
      sin = new_random(DSO_F32, m * half, 1.0);
  buf q = new_buf(type, m * q_rank), latent = new_buf(type, m * rank), rope = new_buf(type, m * dr),
      *outs[] = {&q, &latent, &rope};
  dso_mla_qkv_a_params p = {.m = m, .k = k, .q_rank = q_rank, .rank = rank, .rope_dim = dr};
  p.x = (dso_mat){x.data, k, type}, p.q_a = (dso_mat){qa.data, k, type},
  p.kv_a = (dso_mat){kva.data, k, type};
  p.q_bias = bias ? qb.data : NULL, p.kv_bias = bias ? kvb.data : NULL, p.q_norm = qn.data,
  p.kv_norm = kvn.data;
  p.norm_dtype = type, p.q_eps = p.kv_eps = 1e-6f, p.cos = cos.data, p.sin = sin.data,
  p.cs_rs = half, p.interleaved = bias, p.keep_pairs = bias && m % 2;
  p.q_latent = q.data, p.latent = latent.data, p.rope = rope.data;
  execute(label, &dso_mla_qkv_a, &p, isa, outs, 3);
  double *wq = doubles(q.n), *wl = doubles(latent.n), *wr = doubles(rope.n),
         *row = doubles(q_rank + width);
  for (int64_t i = 0; i < m; i++) {
    for (int64_t j = 0; j < q_rank + width; j++) {
      const buf *w = j < q_rank ? &qa : &kva;
      row[j] = 0.0;
      for (int64_t c = 0; c < k; c++)
        row[j] += get(&x, i * k + c) * get(w, (j < q_rank ? j : j - q_rank) * k + c);
    }
    norm_double(row, q_rank, bias ? &qb : NULL, 0, &qn);
    norm_double(row + q_rank, rank, bias ? &kvb : NULL, 0, &kvn);
    norm_double(row + q_rank + rank, dr, bias ? &kvb : NULL, rank, NULL);
    memcpy(wq + i * q_rank, row, (size_t)q_rank * sizeof *row);
    memcpy(wl + i * rank, row + q_rank, (size_t)rank * sizeof *row);
    rotate(row + q_rank + rank, wr + i * dr, (float *)cos.data + i * half,
           (float *)sin.data + i * half, half, bias, 0, bias && m % 2);
  }
  check_close(label, &q, wq, tolerance(type), 1.0);
  check_close(label, &latent, wl, tolerance(type), 1.0);
  check_close(label, &rope, wr, tolerance(type), 1.0);
  free_all();
}

void test_rows(void) {
  const dso_isa *isas[8];
  int n = list_isas(isas, 8);
  for (int i = 0; i < n; i++) {
    for (int t = 0; t < 3; t++) {
      dso_dtype type = FLOATS[t];
      static const int64_t dims[] = {1, 2, 7, 16, 33, 100};
      for (int d = 0; d < 6; d++)
        norm_case(isas[i], type, d % 2 ? DSO_F32 : type, 1 + d * d * 7, dims[d], d % 3 == 1);
      for (int mode = 0; mode < 28; mode++)
        if ((!(mode & 8) || !(mode & 2)) && (!(mode & 16) || mode & 1))
          rope_case(isas[i], type, 2, 9, 3, 1 + random_below(20), mode);
      static const dso_dtype caches[] = {DSO_F32, DSO_BF16, DSO_F16, DSO_I8, DSO_F8};
      for (int to = 0; to < 5; to++)
        write_case(isas[i], type, caches[to], 1 + 9 * t, 1 + random_below(40), 2 * random_below(9));
      qkv_case(isas[i], type, 1, 17, 0, 9, 2, 0);
      qkv_case(isas[i], type, 3, 64, 50, 33, 4, 1);
      qkv_case(isas[i], type, 4, 40, 6, 9, 3, 1);
      qkv_case(isas[i], type, 7, 33, 5, 1, 0, 1);
    }
  }
}
