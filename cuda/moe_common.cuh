// MoE 各核共用：一块行与它的专家、各行的位置。
#pragma once

#include <ptx.cuh>

#include "dso_cuda.h"
#include "vec.cuh"

namespace dso {

__device__ __forceinline__ const void *after(const void *p, int64_t bytes) {
  return p ? static_cast<const char *>(p) + bytes : nullptr;
}

__device__ __forceinline__ dso_quant quant_after(dso_quant q, int64_t scale, int64_t zero) {
  q.scale = static_cast<const float *>(after(q.scale, scale));
  q.zero = static_cast<const uint8_t *>(after(q.zero, zero));
  return q;
}

// 专家 e 的权重；e 等于路由专家数时是共享专家。
__device__ __forceinline__ dso_expert expert_at(const dso_cuda_moe_weights &w, int64_t experts,
                                                int64_t e) {
  if (e >= experts) return w.shared;
  if (w.list) return w.list[e];
  dso_expert x = w.first;
  x.gate.data = after(x.gate.data, e * w.gate_step);
  x.up.data = after(x.up.data, e * w.gate_step);
  x.down.data = after(x.down.data, e * w.down_step);
  x.gate_bias = after(x.gate_bias, e * w.gate_bias_step);
  x.up_bias = after(x.up_bias, e * w.gate_bias_step);
  x.down_bias = after(x.down_bias, e * w.down_bias_step);
  x.gate_quant = quant_after(x.gate_quant, e * w.gate_scale_step, e * w.gate_zero_step);
  x.up_quant = quant_after(x.up_quant, e * w.gate_scale_step, e * w.gate_zero_step);
  x.down_quant = quant_after(x.down_quant, e * w.down_scale_step, e * w.down_zero_step);
  return x;
}

// 第 row 行的 h 在第几个元素，见 dso_cuda_moe_experts_params。
__device__ inline int64_t hidden_at(const dso_cuda_moe_experts_params &p, int64_t row) {
  int64_t slots = p.routing.tokens * p.routing.top_k;
  if (row < slots) return row * p.h_rs;
  return slots * p.h_rs + (row - slots) * p.w.shared.inner;
}

// 第 row 行留给反向的 gate 在 saved 的第几个元素，隔 up 是 up：见 dso_moe_saved。
struct SavedRow {
  int64_t at;
  int up;
};

__device__ __forceinline__ SavedRow saved_row(const dso_cuda_moe_experts_params &p, int64_t row) {
  int64_t slots = p.routing.tokens * p.routing.top_k, times = p.w.gated ? 2 : 1;
  if (row < slots) return {row * times * p.h_rs, static_cast<int>(p.h_rs)};
  int64_t inner = p.w.shared.inner;
  return {slots * times * p.h_rs + (row - slots) * times * inner, static_cast<int>(inner)};
}

// 第 i 个偏置；没有为 0。
__device__ inline float bias_at(const void *bias, dso_dtype dtype, int64_t i) {
  return bias ? load_one(bias, dtype, i) : 0.0f;
}

// 量化的权重第 row 行第 k 个：布局见 dso_quant，公式同 csrc/isa/scalar.c 的 quantized。
__device__ inline float quantized_at(const dso_mat &w, const dso_quant &q, int64_t row, int64_t k) {
  int64_t at = k % 32, group = row * q.groups + (q.group ? k / q.group : 0);
  if (w.dtype != DSO_I4) return q.scale[group] * load_one(w.data, w.dtype, row * w.rs + k);
  int byte = static_cast<const uint8_t *>(w.data)[row * w.rs + k / 32 * 16 + at % 16];
  int zero = q.zero ? q.zero[group] : 8;
  return q.scale[group] * static_cast<float>((at < 16 ? byte & 15 : byte >> 4) - zero);
}

__host__ __device__ inline bool is_quantized(dso_dtype dtype) {
  return dtype == DSO_I8 || dtype == DSO_I4 || dtype == DSO_F8;
}

// h 至多多少列（连同共享专家）。
__host__ __device__ inline int64_t hidden_columns(const dso_cuda_moe_experts_params &p) {
  int64_t shared = p.routing.shared ? p.w.shared.inner : 0;
  return shared > p.widest ? shared : p.widest;
}

// 一块要算多少列：h 是中间宽，o 是 n。
__device__ inline int columns_of(const dso_cuda_moe_experts_params &p, const dso_expert &e,
                                 bool hidden) {
  return static_cast<int>(hidden ? e.inner : p.n);
}

}  // namespace dso
