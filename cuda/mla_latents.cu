// 干净的潜变量：转成计算用的类型（量化的还原），没有任何 span 看得见的、被 kv_mask 遮住的槽位为 0
// （那里可能是没有初始化的 NaN，而 0 * NaN 会混进权重的梯度）。
#include "dso_cuda.h"
#include "mla_common.cuh"

namespace {

using namespace dso;

constexpr int WARPS = 8;

// 块 (32, WARPS)：一个 warp 一个槽位；y 是各 span，span 重叠的槽位写的是同样的值。
__global__ void mla_latents_kernel(dso_mla_inputs in, void *to, dso_dtype dtype) {
  grid_wait();
  for (int64_t i = blockIdx.y; i < in.n_spans; i += gridDim.y) {
    Place at = locate(in, i);
    int step = static_cast<int>(gridDim.x) * WARPS;
    for (int key = static_cast<int>(blockIdx.x * WARPS + threadIdx.y); key < at.kv_len;
         key += step) {
      int slot = at.slot + key;
      if (at.q_len == 0 || !slot_seen(in, at, slot)) continue;
      int64_t from = slot_at(in, at.row, slot, in.latent_bs, in.latent_ts);
      float scale = in.scale ? in.scale[slot_at(in, at.row, slot, in.scale_bs, 1)] : 1.0f;
      for (int64_t c = threadIdx.x; c < in.rank; c += WARP)
        store_one(to, dtype, (at.row * in.s + slot) * in.rank + c,
                  load_one(in.latent, in.latent_dtype, from + c) * scale);
    }
  }
}

}  // namespace

cudaError_t dso_cuda_mla_latents(const dso_mla_inputs *in, void *to, dso_dtype dtype,
                                 cudaStream_t stream) {
  if (in->n_spans == 0 || in->s == 0) return cudaSuccess;
  int64_t blocks = ceil_div(in->s, WARPS), spans = in->n_spans;
  dim3 grid(static_cast<unsigned>(blocks < 1024 ? blocks : 1024),
            static_cast<unsigned>(spans < 1024 ? spans : 1024));
  return launch(mla_latents_kernel, grid, dim3(WARP, WARPS), 0, stream, *in, to, dtype);
}
