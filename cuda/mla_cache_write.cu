// 把新词元的潜变量与旋转键写进缓存；约定同 csrc/mla_cache_write.c。一个 warp 写一个词元。
#include <assert.h>

#include "mla_cache_row.cuh"

namespace {

using namespace dso;

constexpr int WARPS = 4;  // 每块 4 个词元：块小，少量新词元（解码）也能分到多个 SM

template <int V, int W>
__global__ void mla_cache_write_kernel(dso_mla_cache_write_params p, int64_t capacity) {
  grid_release();
  grid_wait();
  int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.y;
  if (token >= p.b * p.t) return;  // 整个 warp 一起退出
  int64_t b = token / p.t, t = token % p.t, slot = p.offsets[b] + t;
  assert(slot >= 0 && slot < capacity);
  StoredRow<V> latent{p.latent, p.latent_dtype, b * p.latent_bs + t * p.latent_ts};
  StoredRow<W> rope{p.rope, p.rope_dtype, b * p.rope_bs + t * p.rope_ts};
  write_latent<V>(p, b, slot, latent);
  copy_row<W>(p.rope_cache, p.rope_cache_dtype, b * p.rope_cache_bs + slot * p.rope_cache_ts, rope,
              p.rope_dim);
}

}  // namespace

cudaError_t dso_cuda_mla_cache_write(const dso_mla_cache_write_params *p, int64_t capacity,
                                     cudaStream_t stream) {
  if (p->b * p->t == 0) return cudaSuccess;
  bool latent = wide_latent(*p);
  bool rope = p->rope_dim % 8 == 0 && rows_ok(p->rope, p->rope_dtype, p->rope_bs, p->rope_ts) &&
              rows_ok(p->rope_cache, p->rope_cache_dtype, p->rope_cache_bs, p->rope_cache_ts);
  dim3 grid(static_cast<unsigned>(ceil_div(p->b * p->t, WARPS))), block(WARP, WARPS);
  if (latent && rope) {
    return launch((mla_cache_write_kernel<8, 8>), grid, block, 0, stream, *p, capacity);
  }
  if (latent) return launch((mla_cache_write_kernel<8, 1>), grid, block, 0, stream, *p, capacity);
  return launch((mla_cache_write_kernel<1, 1>), grid, block, 0, stream, *p, capacity);
}
