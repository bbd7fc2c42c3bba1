// moe_experts 词元少的各核怎样收尾：一列的和变成 h 或 o 的一个数。
#pragma once

#include "moe_act.cuh"
#include "moe_small_codes.cuh"

namespace dso::small {

// x：第 n 列的和，有门时另有 up 的 u；o 加偏置，h 激活。
template <class E, Kind K>
__device__ __forceinline__ float finished(const dso_cuda_moe_experts_params &p,
                                          const dso_expert &expert, bool hidden, int n, float x,
                                          float u) {
  bool paired = hidden && p.w.gated;
  if (Step<K>::shrunk) x *= E::CODES, u *= E::CODES;
  if (Step<K>::row_scale) x *= (hidden ? expert.gate_quant : expert.down_quant).scale[n];
  if (!hidden) return x + bias_at(expert.down_bias, expert.bias_dtype, n);
  x += bias_at(expert.gate_bias, expert.bias_dtype, n * expert.bias_step);
  if (paired) {
    if (Step<K>::row_scale) u *= expert.up_quant.scale[n];
    u += bias_at(expert.up_bias, expert.bias_dtype, n * expert.bias_step);
  }
  return activate<true>(p.act, paired, x, u);
}

}  // namespace dso::small
