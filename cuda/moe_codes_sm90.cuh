// int4 的专家、一块至多 8 个词元时的 Hopper 路径，见 moe_codes_sm90.cu；moe_small.cu 选择。
#pragma once

#include "moe_experts.cuh"
#include "moe_small_codes.cuh"

namespace dso {

// 这一步、这一部分能不能用它：成叠的 int4，行、间隔 TMA 能走，共享内存放得下。
bool moe_codes_sm90_fits(const dso_cuda_moe_experts_params &p, bool hidden, Part part,
                         small::Kind kind);
cudaError_t moe_codes_sm90(const dso_cuda_moe_experts_params &p, bool hidden, Part part,
                           small::Kind kind, cudaStream_t stream);

}  // namespace dso
