// moe_experts、moe_experts_list 的反向的 CUDA 绑定。
#include <tuple>

#include "binding_cuda_moe_fill.h"

namespace dso {
namespace {

Tensor nothing(const Tensor &like) { return torch::stable::new_empty(like, {0}); }

Tensor grad_like(const Tensor &t, bool wanted) {
  if (!wanted) return nothing(t);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); i++) sizes.push_back(t.size(i));
  return torch::stable::new_empty(t, sizes);
}

Tensor optional_grad(const std::optional<Tensor> &t, const Tensor &other, bool wanted) {
  return t ? grad_like(*t, wanted) : nothing(other);
}

Tensors grads_like(const Tensors &list, bool wanted) {
  Tensors out;
  for (const Tensor &t : list) out.push_back(grad_like(t, wanted));
  return out;
}

struct CommonGrads {
  Tensor x, weights;
  Tensors shared;
};

struct Wanted {
  bool x, experts, shared;
};

// 共享专家的梯度，接在 d.list 之后。
void place_shared(DeviceExperts &d, const Tensors &grads, const DeviceExperts &m) {
  dso_expert e = m.list.back();
  e.gate = mat_of(grads[0], e.gate.dtype), e.up = mat_of(grads[1], e.up.dtype);
  e.down = mat_of(grads[2], e.down.dtype);
  d.p.w.shared = e;
  d.list.push_back(e);
}

// d：路由专家的梯度的位置已填好（不要时为空）；add：加进原有的值。
CommonGrads run_backward(const char *op, DeviceExperts &m, DeviceExperts &d, const Tensor &grad,
                         const Tensor &x, const Tensor &weights, const Tensors &shared, bool add,
                         const Wanted &want, const std::optional<Tensor> &saved,
                         cudaStream_t stream) {
  expect_device(op, "grad", grad, x);
  expect_shape(op, "grad", grad, {m.p.routing.tokens, m.p.n});
  const Tensor dy = row_major(grad);
  CommonGrads out{grad_like(x, want.x), Tensor(), grads_like(shared, want.shared)};
  if (!shared.empty() && want.shared) place_shared(d, out.shared, m);
  dso_cuda_moe_experts_backward_params p{};
  dso_moe_saved kept{};
  if (saved) expect_device(op, "saved", *saved, x);
  use_saved(op, m, m.p.routing.top_k, saved, &kept);
  p.in = m.p, p.in.saved = kept.data, p.dy = mat_of(dy, float_dtype(op, "grad", grad)), p.add = add;
  p.dy.rs = dy.stride(0);
  p.grad = d.p.w;
  p.grad.transposed = m.p.w.transposed, p.grad.paired = m.p.w.paired, p.grad.gated = m.p.w.gated;
  if (p.in.dtype != DSO_F32 &&
      !dso_cuda_moe_backward_fits(&p, d.list.data(), static_cast<int64_t>(d.list.size())))
    p.in.dtype = DSO_F32;
  sort_rows(op, m, dso_cuda_moe_backward_tile_rows(&p), stream);
  p.in.routing = m.p.routing;

  const dso_cuda_moe_routing &r = p.in.routing;
  const ScalarType type = p.in.dtype == DSO_F32 ? ScalarType::Float : m.x.scalar_type();
  const int64_t slots = r.tokens * r.top_k, common = r.shared ? r.tokens : 0, rows = slots + common;
  const int64_t hidden = slots * p.in.h_rs + common * p.in.w.shared.inner;
  // w h 用完才写各行的 dx：同一块。
  const int64_t most = want.x ? std::max(hidden, rows * p.in.k) : hidden;
  const Tensor scratch = torch::stable::new_empty(m.x, {most}, type),
               gu = torch::stable::new_empty(m.x, {(p.in.w.gated ? 2 : 1) * hidden}, type),
               partial = scratch_of(
                   m.x, static_cast<size_t>(rows * dso_cuda_moe_backward_blocks(&p)) * 4),
               dw = torch::stable::new_empty(m.x, {r.tokens, r.top_k}, ScalarType::Float);
  p.in.h = p.in.o = scratch.mutable_data_ptr();
  p.gu = gu.mutable_data_ptr(), p.partial = static_cast<float *>(partial.mutable_data_ptr());
  p.in.y = want.x && x.size(0) * x.size(1) > 0 ? out.x.mutable_data_ptr() : nullptr;
  p.dweights = static_cast<float *>(dw.mutable_data_ptr());
  const bool scaled = shared.size() == 4 && want.shared;
  Tensor dscale;
  if (scaled) {
    dscale = torch::stable::new_empty(m.x, {r.tokens}, ScalarType::Float);
    p.dscale = static_cast<float *>(dscale.mutable_data_ptr());
  }
  check(op, dso_cuda_moe_experts_backward(&p, stream));
  out.weights = to_type(dw, weights.scalar_type());
  if (scaled) out.shared[3] = to_type(dscale, shared[3].scalar_type());
  return out;
}

// 成叠的权重的梯度：位置同权重。
struct StackedGrads {
  Tensor gate_up, down, gate_up_bias, down_bias;
};

void use_grads(DeviceExperts &d, const DeviceExperts &m, const StackedGrads &g,
               const Layout &layout, bool has_bias, bool has_down_bias) {
  d.x = m.x, d.gate_up = g.gate_up, d.down = g.down;
  d.gate_up_bias = g.gate_up_bias, d.down_bias = g.down_bias;
  d.routed = m.routed, d.inner = m.inner, d.in.n = m.in.n;
  for (int64_t e = 0; e < d.routed; e++)
    d.list.push_back(expert_at(d, layout, has_bias, has_down_bias, e));
  use_stack(d);
  if (m.p.w.paired && d.routed > 0) place_pairs(d);
}

using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensors>;

Grads moe_experts_backward(const Tensor &grad, const Tensor &x, const Tensor &indices,
                           const Tensor &weights, const Tensor &gate_up,
                           const std::optional<Tensor> &gate_up_bias, const Tensor &down,
                           const std::optional<Tensor> &down_bias, Tensors shared,
                           std::string activation, double alpha, double limit, bool transposed,
                           bool interleaved, bool gated, bool need_x, bool need_experts,
                           bool need_shared, std::optional<Tensor> saved) {
  const char *op = "moe_experts_backward";
  expect_on_device(op, x);
  const NoGrad off;
  const Launch launch(x);
  const Layout layout{transposed, interleaved, gated};
  DeviceExperts m, d;
  fill_stacked(op, m, x, indices, weights, gate_up, gate_up_bias, down, down_bias, shared,
               {activation, alpha, limit, layout});
  const StackedGrads g{grad_like(gate_up, need_experts), grad_like(down, need_experts),
                       optional_grad(gate_up_bias, x, need_experts),
                       optional_grad(down_bias, x, need_experts)};
  if (need_experts) use_grads(d, m, g, layout, gate_up_bias.has_value(), down_bias.has_value());
  CommonGrads common = run_backward(op, m, d, grad, x, weights, shared, false,
                                    {need_x, need_experts, need_shared}, saved, launch.stream());
  return {common.x, common.weights, g.gate_up, g.down, g.gate_up_bias, g.down_bias, common.shared};
}

// 改写输入的算子不能返回列表，所以共享专家的四个逐个给出，没有的为空。
using OtherGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

OtherGrads moe_experts_backward_into(const Tensor &grad, const Tensor &x, const Tensor &indices,
                                     const Tensor &weights, const Tensor &gate_up,
                                     const std::optional<Tensor> &gate_up_bias, const Tensor &down,
                                     const std::optional<Tensor> &down_bias, Tensors shared,
                                     std::string activation, double alpha, double limit,
                                     bool transposed, bool interleaved, bool gated, bool need_x,
                                     bool need_shared, const Tensor &gate_up_grad,
                                     const Tensor &down_grad, std::optional<Tensor> saved) {
  const char *op = "moe_experts_backward_into";
  expect_on_device(op, x);
  const NoGrad off;
  const Launch launch(x);
  const Layout layout{transposed, interleaved, gated};
  DeviceExperts m, d;
  fill_stacked(op, m, x, indices, weights, gate_up, gate_up_bias, down, down_bias, shared,
               {activation, alpha, limit, layout});
  expect_device(op, "gate_up_grad", gate_up_grad, x);
  expect_device(op, "down_grad", down_grad, x);
  expect_grad(op, "gate_up_grad", gate_up_grad, gate_up);
  expect_grad(op, "down_grad", down_grad, down);
  const StackedGrads g{gate_up_grad, down_grad, optional_grad(gate_up_bias, x, true),
                       optional_grad(down_bias, x, true)};
  use_grads(d, m, g, layout, gate_up_bias.has_value(), down_bias.has_value());
  CommonGrads common = run_backward(op, m, d, grad, x, weights, shared, true,
                                    {need_x, true, need_shared}, saved, launch.stream());
  Tensors &s = common.shared;
  while (s.size() < 4) s.push_back(nothing(x));
  return {common.x, common.weights, g.gate_up_bias, g.down_bias, s[0], s[1], s[2], s[3]};
}

using ListGrads =
    std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors>;

ListGrads moe_experts_list_backward(const Tensor &grad, const Tensor &x, const Tensor &indices,
                                    const Tensor &weights, Tensors gate, Tensors up, Tensors down,
                                    Tensors gate_bias, Tensors up_bias, Tensors down_bias,
                                    Tensors shared, std::string activation, double alpha,
                                    double limit, bool gated, bool need_x, bool need_experts,
                                    bool need_shared, std::optional<Tensor> saved) {
  const char *op = "moe_experts_list_backward";
  expect_on_device(op, x);
  const NoGrad off;
  const Launch launch(x);
  DeviceExperts m, d;
  Lists w{gate, up, down, gate_bias, up_bias, down_bias};
  fill_list(op, m, w, x, indices, weights, shared, {activation, alpha, limit, gated},
            launch.stream());
  const Lists g{grads_like(gate, need_experts),    grads_like(up, need_experts),
                grads_like(down, need_experts),    grads_like(gate_bias, need_experts),
                grads_like(up_bias, need_experts), grads_like(down_bias, need_experts)};
  if (need_experts) {
    d.x = m.x, d.routed = m.routed;
    for (size_t e = 0; e < gate.size(); e++)
      d.list.push_back(expert_of(g, e, m.list[e].inner, m.list[e].gate.dtype, gated));
    use_list(op, d, launch.stream());
  }
  CommonGrads common = run_backward(op, m, d, grad, x, weights, shared, false,
                                    {need_x, need_experts, need_shared}, saved, launch.stream());
  return {common.x,    common.weights, g.gate,      g.up,         g.down,
          g.gate_bias, g.up_bias,      g.down_bias, common.shared};
}

}  // namespace
}  // namespace dso

DSO_DEVICE_LIBRARY(m) {
  m.impl("moe_experts_backward", TORCH_BOX(&dso::moe_experts_backward));
  m.impl("moe_experts_backward_into", TORCH_BOX(&dso::moe_experts_backward_into));
  m.impl("moe_experts_list_backward", TORCH_BOX(&dso::moe_experts_list_backward));
}
