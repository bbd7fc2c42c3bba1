// 激活：公式同 csrc/isa/scalar.c 的 activate。
#pragma once

#include <ptx.cuh>

#include "vec.cuh"

namespace dso {

// FAST：结果随后舍入到 16 位时用，误差几个 fp32 的 ulp。
template <bool FAST>
__device__ inline float sigmoid_of(float x) {
  if (FAST) return __fdividef(1.0f, 1.0f + fast_exp2(-1.4426950408889634f * x));
  return 1.0f / (1.0f + expf(-x));
}

// 没有截断的激活。
template <bool FAST>
__device__ __forceinline__ float plain_act(dso_act_kind kind, float x) {
  switch (kind) {
    case DSO_GELU:
      return x * 0.5f * erfcf(-x * 0.70710678f);
    case DSO_GELU_TANH:
      return x * sigmoid_of<FAST>(1.5957691f * x * (1.0f + 0.044715f * x * x));
    case DSO_RELU:
      return x < 0.0f ? 0.0f : x;  // NaN 留下
    case DSO_RELU2:
      return x < 0.0f ? 0.0f : x * x;
    default:
      return x * sigmoid_of<FAST>(x);
  }
}

// h；没有门时不看 up。
template <bool FAST>
__device__ __forceinline__ float activate(const dso_act &act, bool gated, float gate, float up) {
  if (act.kind != DSO_CLIPPED && act.kind != DSO_CLIPPED_SILU)
    return plain_act<FAST>(act.kind, gate) * (gated ? up : 1.0f);
  bool shifted = act.kind == DSO_CLIPPED;
  float g = gate > act.limit ? act.limit : gate;
  float u = up < -act.limit ? -act.limit : up > act.limit ? act.limit : up;
  return g * sigmoid_of<FAST>((shifted ? act.alpha : 1.0f) * g) * (u + (shifted ? 1.0f : 0.0f));
}

}  // namespace dso
