// 写缓存的一行（一个 warp 写一个词元）：mla_cache_write 与解码的 mla_kv_write 共用。
// 一行的来源是可调用的：row(i) 给出第 i 个起的 V 个数。
#pragma once

#include "dso_cuda.h"
#include "vec.cuh"

namespace dso {

template <int V>
struct StoredRow {
  const void *data;
  dso_dtype dtype;
  int64_t at;
  __device__ Vec<V> operator()(int64_t i) const { return load<V>(data, dtype, at + i); }
};

template <int V, class Row>
__device__ void copy_row(void *to, dso_dtype to_dtype, int64_t to_at, const Row &row, int64_t dim) {
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * V; i < dim; i += WARP * V)
    store<V>(to, to_dtype, to_at + i, row(i));
}

template <int V>
__device__ float most_of(float amax, const Vec<V> &x) {
#pragma unroll
  for (int j = 0; j < V; j++) amax = max_nan(amax, fabsf(x.v[j]));
  return amax;
}

// 对称量化：scale = amax / 最大的码；全零行的 scale 为 0。NaN 传到 scale，读出时仍是 NaN。各线程的 amax 在这里归约。
__device__ inline float start_codes(const dso_mla_cache_write_params &p, float amax,
                                    float *scale_to) {
  float scale = warp_max(amax) / (p.latent_cache_dtype == DSO_F8 ? DSO_F8_MOST : DSO_I8_MOST);
  if (threadIdx.x == 0) *scale_to = scale;
  return scale;
}

template <int V>
__device__ void store_codes(const dso_mla_cache_write_params &p, int64_t to, Vec<V> x,
                            float scale) {
#pragma unroll
  for (int j = 0; j < V; j++) {
    float q = scale > 0 ? x.v[j] / scale : 0.0f;
    x.v[j] = p.latent_cache_dtype == DSO_F8 ? q : fminf(fmaxf(rintf(q), -127.0f), 127.0f);
  }
  store<V>(p.latent_cache, p.latent_cache_dtype, to, x);
}

template <int V, class Row>
__device__ void quantize_row(const dso_mla_cache_write_params &p, int64_t to_at, const Row &row,
                             float *scale_to) {
  float amax = 0;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * V; i < p.rank; i += WARP * V)
    amax = most_of(amax, row(i));
  float scale = start_codes(p, amax, scale_to);
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * V; i < p.rank; i += WARP * V)
    store_codes(p, to_at + i, row(i), scale);
}

// 一个词元的潜变量写到第 b 行的槽位 slot。
template <int V, class Row>
__device__ void write_latent(const dso_mla_cache_write_params &p, int64_t b, int64_t slot,
                             const Row &row) {
  int64_t to = b * p.latent_cache_bs + slot * p.latent_cache_ts;
  if (quantized(p.latent_cache_dtype))
    quantize_row<V>(p, to, row, p.scale_cache + b * p.scale_cache_bs + slot);
  else
    copy_row<V>(p.latent_cache, p.latent_cache_dtype, to, row, p.rank);
}

// 主机侧：各行能否用宽访存。
inline bool rows_ok(const void *data, dso_dtype dtype, int64_t bs, int64_t ts) {
  return wide_ok(data, dtype, bs) && ts % 8 == 0;
}

inline bool wide_latent(const dso_mla_cache_write_params &p) {
  return p.rank % 8 == 0 && rows_ok(p.latent, p.latent_dtype, p.latent_bs, p.latent_ts) &&
         rows_ok(p.latent_cache, p.latent_cache_dtype, p.latent_cache_bs, p.latent_cache_ts);
}

}  // namespace dso
