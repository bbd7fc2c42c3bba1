// moe_experts_backward 的各条路径共用：中间量的位置、步骤。
#pragma once

#include "moe_experts.cuh"

namespace dso {

using BackwardParams = dso_cuda_moe_experts_backward_params;

// 按行的三步，各是一个分组的矩阵乘：gu = x [gate, up]；A = dY down，写出时得 gu 的梯度、w h、dw 的部分和；
// 各行的 dx = gu 的梯度 [gate, up]ᵀ。
enum BackwardStep { GATE_UP, HIDDEN_GRAD, INPUT_GRAD };
// 权重的梯度，各一步。
enum WeightStep { GATE_UP_WEIGHT, DOWN_WEIGHT };

__host__ __device__ inline int64_t ceil_of(int64_t a, int64_t b) { return (a + b - 1) / b; }

// gu 的一行：第 i 个 gate、up 在 at + i * step、at + up + i * step。
struct GradientRow {
  int64_t at, stride;
  int up, step;
};

__device__ __forceinline__ GradientRow gradient_row(const BackwardParams &p, int64_t row) {
  const dso_cuda_moe_experts_params &in = p.in;
  SavedRow split = saved_row(in, row);
  int64_t stride = (in.w.gated ? 2 : 1) * split.up;
  bool paired = in.w.paired && in.dtype != DSO_F32 && row < in.routing.tokens * in.routing.top_k;
  return {split.at, stride, paired ? 1 : split.up, paired ? 2 : 1};
}

// 一行的混合权重。
__device__ __forceinline__ float row_weight(const dso_cuda_moe_experts_params &p, int64_t row) {
  int64_t slots = p.routing.tokens * p.routing.top_k;
  if (row < slots) return p.weights[p.routing.slot[row]];
  return p.w.shared_scale ? p.w.shared_scale[row - slots] : 1.0f;
}

// 专家 e 的行 [begin, begin + rows)；e 等于路由专家数时是共享专家。
struct ExpertRows {
  int64_t begin;
  int rows;
};

__device__ __forceinline__ ExpertRows rows_of(const dso_cuda_moe_routing &r, int64_t e) {
  if (e >= r.experts) return {r.tokens * r.top_k, static_cast<int>(r.tokens)};
  return {r.begin[e], r.begin[e + 1] - r.begin[e]};
}

// 专家 e 的权重的梯度加到原有的值上；共享专家的总是写：它们另外返回，不在 .grad 里。
__device__ __forceinline__ bool adds(const BackwardParams &p, int64_t e) {
  return p.add && e < p.in.routing.experts;
}

// 主机侧：专家数（连同共享的）；gate 与 up 合起来至多几列。
inline int64_t experts_of(const dso_cuda_moe_routing &r) { return r.experts + (r.shared ? 1 : 0); }
inline int64_t gate_up_columns(const dso_cuda_moe_experts_params &p) {
  return hidden_columns(p) * (p.w.gated ? 2 : 1);
}
// 按行的一步有几列。
inline int64_t row_step_columns(const dso_cuda_moe_experts_params &p, BackwardStep step) {
  return step == GATE_UP ? gate_up_columns(p) : step == HIDDEN_GRAD ? hidden_columns(p) : p.k;
}
// 这一步的权重按 [k][列] 存：nn.Linear 的权重乘 x 时是 [列][k]，另两步反过来。转置的没有共享专家，所以都相同。
inline bool is_wide(const dso_cuda_moe_experts_params &p, BackwardStep step) {
  return (step == GATE_UP) == static_cast<bool>(p.w.transposed);
}
// 权重的梯度至多几行几列，如存放的那样。
struct WeightShape {
  int64_t rows, columns;
};
inline WeightShape weight_shape(const dso_cuda_moe_experts_params &p, WeightStep step) {
  WeightShape s = {gate_up_columns(p), p.k};
  if (step == DOWN_WEIGHT) s = {p.n, hidden_columns(p)};
  return p.w.transposed ? WeightShape{s.columns, s.rows} : s;
}

cudaError_t moe_backward_rows_general(const BackwardParams &p, BackwardStep step,
                                      cudaStream_t stream);
cudaError_t moe_backward_weights_general(const BackwardParams &p, WeightStep step,
                                         cudaStream_t stream);
// 16 位，sm_80 起。
cudaError_t moe_backward_rows_mma(const BackwardParams &p, BackwardStep step, cudaStream_t stream);
cudaError_t moe_backward_weights_mma(const BackwardParams &p, WeightStep step, cudaStream_t stream);

// 同上，Hopper 上。
bool moe_backward_sm90_fits(const dso_cuda_moe_experts_params &p);
cudaError_t moe_backward_rows_sm90(const BackwardParams &p, BackwardStep step, cudaStream_t stream);
cudaError_t moe_backward_weights_sm90(const BackwardParams &p, WeightStep step,
                                      cudaStream_t stream);

}  // namespace dso
