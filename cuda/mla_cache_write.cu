// 把新词元的潜变量与旋转键写进缓存；约定同 csrc/mla_cache_write.c。一个 warp 写一个词元。
#include <assert.h>

#include "dso_cuda.h"
#include "vec.cuh"

namespace {

using namespace dso;

constexpr int WARPS = 4;  // 每块 4 个词元：块小，少量新词元（解码）也能分到多个 SM

template <int V>
__device__ void copy_row(void *to, dso_dtype to_dtype, int64_t to_at, const void *from,
                         dso_dtype from_dtype, int64_t from_at, int64_t dim) {
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * V; i < dim; i += WARP * V)
    store<V>(to, to_dtype, to_at + i, load<V>(from, from_dtype, from_at + i));
}

// 对称量化：scale = amax / 127；全零行的 scale 为 0。NaN 传到 scale，读出时仍是 NaN。
template <int V>
__device__ void quantize_row(const dso_mla_cache_write_params &p, int64_t to_at, int64_t from_at,
                             float *scale_to) {
  float amax = 0;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * V; i < p.rank; i += WARP * V) {
    Vec<V> x = load<V>(p.latent, p.latent_dtype, from_at + i);
#pragma unroll
    for (int j = 0; j < V; j++) amax = max_nan(amax, fabsf(x.v[j]));
  }
  float scale = warp_max(amax) / 127.0f;
  if (threadIdx.x == 0) *scale_to = scale;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * V; i < p.rank; i += WARP * V) {
    Vec<V> x = load<V>(p.latent, p.latent_dtype, from_at + i);
#pragma unroll
    for (int j = 0; j < V; j++) {
      float q = scale > 0 ? rintf(x.v[j] / scale) : 0.0f;
      x.v[j] = fminf(fmaxf(q, -127.0f), 127.0f);
    }
    store<V>(p.latent_cache, DSO_I8, to_at + i, x);
  }
}

template <int V, int W>
__global__ void mla_cache_write_kernel(dso_mla_cache_write_params p, int64_t capacity) {
  int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.y;
  if (token >= p.b * p.t) return;  // 整个 warp 一起退出
  int64_t b = token / p.t, t = token % p.t, slot = p.offsets[b] + t;
  assert(slot >= 0 && slot < capacity);
  int64_t to = b * p.latent_cache_bs + slot * p.latent_cache_ts;
  int64_t from = b * p.latent_bs + t * p.latent_ts;
  if (p.latent_cache_dtype == DSO_I8) {
    quantize_row<V>(p, to, from, p.scale_cache + b * p.scale_cache_bs + slot);
  } else {
    copy_row<V>(p.latent_cache, p.latent_cache_dtype, to, p.latent, p.latent_dtype, from, p.rank);
  }
  copy_row<W>(p.rope_cache, p.rope_cache_dtype, b * p.rope_cache_bs + slot * p.rope_cache_ts,
              p.rope, p.rope_dtype, b * p.rope_bs + t * p.rope_ts, p.rope_dim);
}

bool rows_ok(const void *data, dso_dtype dtype, int64_t bs, int64_t ts) {
  return wide_ok(data, dtype, bs) && ts % 8 == 0;
}

}  // namespace

cudaError_t dso_cuda_mla_cache_write(const dso_mla_cache_write_params *p, int64_t capacity,
                                     cudaStream_t stream) {
  if (p->b * p->t == 0) return cudaSuccess;
  bool latent =
      p->rank % 8 == 0 && rows_ok(p->latent, p->latent_dtype, p->latent_bs, p->latent_ts) &&
      rows_ok(p->latent_cache, p->latent_cache_dtype, p->latent_cache_bs, p->latent_cache_ts);
  bool rope = p->rope_dim % 8 == 0 && rows_ok(p->rope, p->rope_dtype, p->rope_bs, p->rope_ts) &&
              rows_ok(p->rope_cache, p->rope_cache_dtype, p->rope_cache_bs, p->rope_cache_ts);
  dim3 grid(static_cast<unsigned>(ceil_div(p->b * p->t, WARPS))), block(WARP, WARPS);
  if (latent && rope) {
    return launch((mla_cache_write_kernel<8, 8>), grid, block, 0, stream, *p, capacity);
  }
  if (latent) return launch((mla_cache_write_kernel<8, 1>), grid, block, 0, stream, *p, capacity);
  return launch((mla_cache_write_kernel<1, 1>), grid, block, 0, stream, *p, capacity);
}
