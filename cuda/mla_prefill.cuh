// mla_prefill 与其反向共用：展开的 K、V 在哪里，一块查询、一块键怎样读进共享内存。
#pragma once

#include "config.cuh"
#include "dso_cuda.h"
#include "mla_common.cuh"
#include "mma.cuh"

namespace dso {

// 展开的 K（不含旋转部分）：第 row 行槽位 slot、组内第 head 个头；V 在它之后 dn 个元素。
__device__ inline int64_t expanded_at(const dso_cuda_mla_prefill_params &p, int row, int slot,
                                      int head) {
  return ((row * p.in.s + slot) * p.heads + head) * (p.in.nope_dim + p.in.v_dim);
}

// 第 tile 块查询在哪个 span；没有就返回 false。整个 warp 一起调用。
__device__ inline bool find_tile(const dso_mla_inputs &in, int rows, int64_t tile, Place *at,
                                 int *first) {
  auto tiles = [&](int64_t i) {
    return (in.spans[i].q_end - in.spans[i].q_begin + rows - 1) / rows;
  };
  Found found = find_span_by(
      in, tiles, [&](int64_t, int64_t before, int64_t own) { return tile < before + own; });
  if (found.index >= in.n_spans) return false;
  *at = locate(in, found.index);
  *first = static_cast<int>(tile - found.before) * rows;
  return true;
}

// Hopper 的前向（mla_prefill_sm90.cu）：形状、设备合适才能用；tiles 是 PREFILL_ROWS 个查询一块时块数的上界。
bool prefill_sm90_fits(const dso_mla_inputs &in, const Device &device);
cudaError_t run_prefill_sm90(const dso_cuda_mla_prefill_params *p, int tiles, int sms,
                             cudaStream_t stream);

// 反向的 dkv、dq 两个核的网格。
struct BackwardLaunch {
  dim3 dkv, dq;
  cudaStream_t stream;
  int *bytes;  // 不为空时只算至少要多少共享内存，不启动（只有 run_backward_mma）
  int shared_limit;
};
cudaError_t run_backward_mma(const dso_cuda_mla_prefill_backward_params &p,
                             const BackwardLaunch &to);
cudaError_t run_backward_general(const dso_cuda_mla_prefill_backward_params &p,
                                 const BackwardLaunch &to);
int backward_general_bytes(const dso_mla_inputs &in);

// Hopper 的反向（mla_prefill_backward_{dkv,dq}_sm90.cu）：形状、设备的要求同前向。
cudaError_t run_backward_dkv_sm90(const dso_cuda_mla_prefill_backward_params &p,
                                  cudaStream_t stream);
cudaError_t run_backward_dq_sm90(const dso_cuda_mla_prefill_backward_params &p,
                                 cudaStream_t stream);

}  // namespace dso
