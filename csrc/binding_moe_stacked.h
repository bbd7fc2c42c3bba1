// moe_experts 的参数：成叠的权重，各种布局；CPU 与 CUDA 的绑定共用。
#pragma once

#include "binding_moe.h"

namespace dso {

// gate_up、down 的布局：[E, 2I, K]、[E, N, I]；transposed 时 [E, K, 2I]、[E, I, N]；没有门时 2I 换成 I。
struct Layout {
  bool transposed, interleaved, gated;
};

inline const char *at(const Tensor &t, dso_dtype type, int64_t index) {
  const int64_t size = type == DSO_F32 ? 4 : 2;
  return static_cast<const char *>(t.const_data_ptr()) + index * size;
}

// 第三维步长为 1、行距任意的 [E, R, C]。
inline Tensor stacked(const Tensor &t) {
  return t.stride(2) == 1 || t.size(2) <= 1 ? t : torch::stable::contiguous(t);
}

inline void check_stacked(const char *op, Experts &m, const Tensor &gate_up,
                          const std::optional<Tensor> &gate_up_bias, const Tensor &down,
                          const std::optional<Tensor> &down_bias, const Layout &layout) {
  const int64_t k = m.x.size(1), times = layout.gated ? 2 : 1;
  expect_shape(op, "gate_up", gate_up,
               layout.transposed ? std::initializer_list<int64_t>{-1, k, -1}
                                 : std::initializer_list<int64_t>{-1, -1, k});
  const int64_t width = gate_up.size(layout.transposed ? 2 : 1);
  expect(width % times == 0, op, "：gate_up 应由等宽的 gate 与 up 组成，实际宽 ", width, "。");
  m.routed = gate_up.size(0), m.inner = width / times;
  expect_shape(op, "down", down,
               layout.transposed ? std::initializer_list<int64_t>{m.routed, m.inner, -1}
                                 : std::initializer_list<int64_t>{m.routed, -1, m.inner});
  expect_type(op, "down", down, gate_up.scalar_type());
  m.gate_up = stacked(gate_up), m.down = stacked(down);
  m.in.n = down.size(layout.transposed ? 2 : 1);
  if (gate_up_bias) {
    expect_shape(op, "gate_up_bias", *gate_up_bias, {m.routed, width});
    expect_type(op, "gate_up_bias", *gate_up_bias, gate_up.scalar_type());
    m.gate_up_bias = torch::stable::contiguous(*gate_up_bias);
  }
  if (down_bias) {
    expect_shape(op, "down_bias", *down_bias, {m.routed, m.in.n});
    expect_type(op, "down_bias", *down_bias, gate_up.scalar_type());
    m.down_bias = torch::stable::contiguous(*down_bias);
  }
}

// 交错且未转置时 gate、up 是隔行的，行距加倍即可；转置时成对处理（paired）。
inline dso_expert expert_at(const Experts &m, const Layout &layout, bool has_bias,
                            bool has_down_bias, int64_t e) {
  const dso_dtype type = float_dtype("moe_experts", "gate_up", m.gate_up);
  const Tensor &g = m.gate_up, &d = m.down;
  const int64_t base = e * g.stride(0), rs = g.stride(1), inner = m.inner;
  const bool alternate = layout.gated && layout.interleaved,
             paired = alternate && layout.transposed;
  const int64_t width = layout.gated ? 2 * inner : inner;
  const int64_t step = alternate ? 2 : 1;
  const int64_t up = layout.transposed ? (alternate ? 1 : inner) : (alternate ? rs : inner * rs);
  dso_expert out{};
  out.inner = inner;
  out.gate = {at(g, type, base), layout.transposed ? rs : rs * step, type};
  if (layout.gated && !paired)
    out.up = {at(g, type, base + up), out.gate.rs, type};
  else
    out.up = {nullptr, 0, type};
  out.down = {at(d, type, e * d.stride(0)), d.stride(1), type};
  out.bias_dtype = type, out.bias_step = paired ? 1 : step;
  if (has_bias) {
    out.gate_bias = at(m.gate_up_bias, type, e * width);
    if (layout.gated && !paired)
      out.up_bias = at(m.gate_up_bias, type, e * width + (alternate ? 1 : inner));
  }
  if (has_down_bias) out.down_bias = at(m.down_bias, type, e * m.in.n);
  return out;
}

struct StackedOptions {
  std::string activation;
  double alpha, limit;
  Layout layout;
};

// x、权重、偏置：检查并存进 m，填 in 的 n 与布局；返回激活。
inline dso_act check_experts(const char *op, Experts &m, const Tensor &x, const Tensor &gate_up,
                             const std::optional<Tensor> &gate_up_bias, const Tensor &down,
                             const std::optional<Tensor> &down_bias,
                             const std::vector<Tensor> &shared, const StackedOptions &options) {
  expect_shape(op, "x", x, {-1, -1});
  float_dtype(op, "gate_up", gate_up);
  const Layout &layout = options.layout;
  const dso_act act = act_of(op, options.activation, options.alpha, options.limit, layout.gated);
  expect(shared.empty() || (!layout.transposed && layout.gated), op,
         "：有 shared 时 gate_up 不能转置、必须有门。");
  m.x = row_major(x);
  check_stacked(op, m, gate_up, gate_up_bias, down, down_bias, layout);
  m.in.transposed = layout.transposed, m.in.gated = layout.gated;
  m.in.paired = layout.transposed && layout.interleaved && layout.gated;
  return act;
}

// 加进已有的梯度：布局要与权重一致，才能用同样的位置。
inline void expect_grad(const char *op, const char *name, const Tensor &grad,
                        const Tensor &weight) {
  expect_shape(op, name, grad, {weight.size(0), weight.size(1), weight.size(2)});
  expect_type(op, name, grad, weight.scalar_type());
  expect(grad.is_contiguous() && weight.is_contiguous(), op, "：", name,
         " 与它的权重都应是连续的。");
}

}  // namespace dso
