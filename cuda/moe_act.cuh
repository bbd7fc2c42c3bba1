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

__device__ inline bool clips(dso_act_kind kind) {
  return kind == DSO_CLIPPED || kind == DSO_CLIPPED_SILU;
}

// gate、up（is_up）以 dtype 存下的值：截断与否仍按 fp32 的值，所以舍入越过了 limit 就退回（或进到）相邻的数；
// gate 只截上面。
__device__ __forceinline__ float kept_value(const dso_act &act, bool is_up, dso_dtype dtype,
                                            float x) {
  if (!clips(act.kind) || dtype == DSO_F32 || (!is_up && x < 0.0f)) return x;
  float rounded = round_to(dtype, x);
  bool over = fabsf(x) > act.limit;
  if ((fabsf(rounded) > act.limit) == over) return rounded;
  unsigned short bits = dtype == DSO_BF16 ? to_bf16_bits(rounded) : to_half_bits(rounded);
  bits = static_cast<unsigned short>(over ? bits + 1 : bits - 1);
  return dtype == DSO_BF16 ? bf16_bits(bits) : half_bits(bits);
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
  if (!clips(act.kind)) return plain_act<FAST>(act.kind, gate) * (gated ? up : 1.0f);
  bool shifted = act.kind == DSO_CLIPPED;
  float g = gate > act.limit ? act.limit : gate;
  float u = up < -act.limit ? -act.limit : up > act.limit ? act.limit : up;
  return g * sigmoid_of<FAST>((shifted ? act.alpha : 1.0f) * g) * (u + (shifted ? 1.0f : 0.0f));
}

// 8 个一起，得到的 h 写回 gate；结果随后舍入到 16 位。最常见的一种只分一次支，8 个的计算可以交错。
__device__ __forceinline__ void activate_all(const dso_act &act, bool gated, Vec<8> &gate,
                                             const Vec<8> &up) {
  if (act.kind == DSO_SILU) {
#pragma unroll
    for (int j = 0; j < 8; j++)
      gate.v[j] = plain_act<true>(DSO_SILU, gate.v[j]) * (gated ? up.v[j] : 1.0f);
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++) gate.v[j] = activate<true>(act, gated, gate.v[j], up.v[j]);
  }
}

// a(x) 与 a'(x)，没有截断的激活。
template <bool FAST>
__device__ __forceinline__ float plain_act_slope(dso_act_kind kind, float x, float *slope) {
  float s;
  switch (kind) {
    case DSO_GELU:
      s = 0.5f * erfcf(-x * 0.70710678f);
      *slope = s + x * 0.39894228f * expf(-0.5f * x * x);
      return x * s;
    case DSO_GELU_TANH:
      s = sigmoid_of<FAST>(1.5957691f * x * (1.0f + 0.044715f * x * x));
      *slope = s + x * s * (1.0f - s) * 1.5957691f * (1.0f + 3 * 0.044715f * x * x);
      return x * s;
    case DSO_RELU:
      *slope = x > 0.0f ? 1.0f : 0.0f;
      return x < 0.0f ? 0.0f : x;
    case DSO_RELU2:
      s = x < 0.0f ? 0.0f : x;
      *slope = 2.0f * s;
      return s * s;
    default:
      s = sigmoid_of<FAST>(x);
      *slope = s + x * s * (1.0f - s);
      return x * s;
  }
}

struct Activated {
  float h, gate, up;  // h 与 gate、up 的梯度
};

// grad 是 h 的梯度；没有门时不看 up。NaN 不算没有截断：同 torch 的 clamp，它的梯度为 0。
template <bool FAST>
__device__ __forceinline__ Activated activate_backward(const dso_act &act, bool gated, float gate,
                                                       float up, float grad) {
  float u = gated ? up : 1.0f, slope, a;
  if (!clips(act.kind)) {
    a = plain_act_slope<FAST>(act.kind, gate, &slope);
    return {a * u, grad * u * slope, grad * a};
  }
  bool shifted = act.kind == DSO_CLIPPED, gate_free = gate <= act.limit,
       up_free = up <= act.limit && up >= -act.limit;
  float alpha = shifted ? act.alpha : 1.0f, g = gate > act.limit ? act.limit : gate;
  u = (up < -act.limit ? -act.limit : up > act.limit ? act.limit : up) + (shifted ? 1.0f : 0.0f);
  float s = sigmoid_of<FAST>(alpha * g);
  a = g * s, slope = s + alpha * a * (1.0f - s);
  return {a * u, gate_free ? grad * u * slope : 0.0f, up_free ? grad * a : 0.0f};
}

}  // namespace dso
