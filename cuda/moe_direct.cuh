// 词元极少时的 o 与求和，见 moe_direct.cu。
#pragma once

#include "moe_small_codes.cuh"

namespace dso {

// y = 各词元的 Σ_j weights[t, j] h down（+ 共享）；kind 是全部专家的存法，不排序。
cudaError_t moe_direct(const dso_cuda_moe_experts_params &p, small::Kind kind, cudaStream_t stream);

}  // namespace dso
