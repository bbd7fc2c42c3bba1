// moe_experts 的各条路径：各有算 h、算 o 两步（dso_cuda_moe_experts 选择），参数、结果的布局都相同。
#pragma once

#include "moe_common.cuh"

namespace dso {

// 任意类型、任意维度，fp32 计算。
cudaError_t moe_general(const dso_cuda_moe_experts_params &p, bool hidden, cudaStream_t stream);

// dso_cuda_moe_fits 的形状，sm_80 起。
cudaError_t moe_mma(const dso_cuda_moe_experts_params &p, bool hidden, cudaStream_t stream);

// Hopper 上成叠、不转置、没有量化的权重；一块 MOE_ROWS 行。
bool moe_sm90_fits(const dso_cuda_moe_experts_params &p, const Device &device);
cudaError_t moe_sm90(const dso_cuda_moe_experts_params &p, bool hidden, cudaStream_t stream);

// 词元少、不转置时：受限于读权重的带宽。
cudaError_t moe_small(const dso_cuda_moe_experts_params &p, bool hidden, cudaStream_t stream);
// 词元极少：不排序（tile_rows 为 0），算 o 的一步直接得到 y。
bool moe_direct_fits(const dso_cuda_moe_experts_params &p);

// y = 各词元的行之和：weights、shared_scale 为 NULL 时系数是 1。
cudaError_t moe_combine(const dso_cuda_moe_experts_params &p, cudaStream_t stream);

// 一次启动做哪些块：共享专家的权重与路由的存法不同时分两次。
enum Part { ALL, ROUTED, SHARED };

// 这次启动不管这一块。
__device__ inline bool skips(const dso_cuda_moe_experts_params &p, const dso_cuda_moe_tile &tile,
                             Part part) {
  bool shared = tile.expert >= p.routing.experts;
  return tile.rows == 0 || (part != ALL && shared != (part == SHARED));
}

}  // namespace dso
