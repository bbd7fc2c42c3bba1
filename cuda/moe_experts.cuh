// moe_experts 的各条路径：各有算 h、算 o 两步（dso_cuda_moe_experts 选择），参数、结果的布局都相同。
#pragma once

#include "moe_common.cuh"

namespace dso {

// 任意类型、任意维度，fp32 计算。
cudaError_t moe_general(const dso_cuda_moe_experts_params &p, bool hidden, cudaStream_t stream);

// dso_cuda_moe_fits 的形状，sm_80 起。
cudaError_t moe_mma(const dso_cuda_moe_experts_params &p, bool hidden, cudaStream_t stream);

}  // namespace dso
