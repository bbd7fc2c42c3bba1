// 没有键可看的查询（不在任何 span 里，或那个 span 的键是空的）：结果是 0，lse 是 -inf。spans 在设备上时主机不知道有没有
// 这样的查询；逐个词元看一遍，比把整个输出清零省下一遍写。
#include "dso_cuda.h"
#include "mla_common.cuh"

namespace {

using namespace dso;

constexpr int WARPS = 8;

// 一个 warp 一个词元。
__global__ __launch_bounds__(WARPS *WARP) void mla_clear_unseen(dso_cuda_mla_unseen_params p) {
  grid_wait();
  int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
  if (!clear_unseen(p.in, token, p.rows, p.dtype, p.width)) return;
  int64_t lane = threadIdx.x % WARP;
  for (int64_t i = lane; p.lse && i < p.in.heads; i += WARP)
    p.lse[token * p.in.heads + i] = -INFINITY;
}

}  // namespace

cudaError_t dso_cuda_mla_clear_unseen(const dso_cuda_mla_unseen_params *p, cudaStream_t stream) {
  int64_t tokens = p->in.b * p->in.t;
  if (tokens * p->width == 0) return cudaSuccess;
  return launch(mla_clear_unseen, dim3(static_cast<unsigned>(ceil_div(tokens, WARPS))),
                dim3(WARPS * WARP), 0, stream, *p);
}
