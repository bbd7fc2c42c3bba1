// moe_experts_list 及其反向的 CPU 绑定：每个专家是几个单独的张量（例如各自的 nn.Linear），原地读取。
#include "binding_moe_list.h"

namespace dso {
namespace {

void fill(const char *op, Experts &m, Lists &w, const Tensor &x, const Tensor &indices,
          const Tensor &weights, const Tensors &shared, const ListOptions &options, bool backward) {
  const dso_act act = check_experts(op, m, w, x, shared, options);
  fill_routing(op, m, indices, weights, shared.empty() ? 0 : 1);
  fill_shared(op, m, shared);
  prepare(op, m, act, backward);
}

std::tuple<Tensor, Tensor> moe_experts_list(const Tensor &x, const Tensor &indices,
                                            const Tensor &weights, Tensors gate, Tensors up,
                                            Tensors down, Tensors gate_bias, Tensors up_bias,
                                            Tensors down_bias, Tensors shared,
                                            std::string activation, double alpha, double limit,
                                            bool gated, bool save) {
  Experts m;
  Lists w{gate, up, down, gate_bias, up_bias, down_bias};
  fill("moe_experts_list", m, w, x, indices, weights, shared, {activation, alpha, limit, gated},
       false);
  return run_forward(m, save);
}

Tensors grads_like(const Tensors &list, bool wanted) {
  Tensors out;
  for (const Tensor &t : list) out.push_back(grad_like(t, wanted));
  return out;
}

void *grad_at(Tensors &list, size_t e, int64_t skip, dso_dtype type) {
  if (list.empty()) return nullptr;
  return static_cast<char *>(list[e].mutable_data_ptr()) + skip * (type == DSO_F32 ? 4 : 2);
}

// 梯度张量是连续的：行距就是宽。
dso_expert_grad grad_of(Lists &d, const Experts &m, size_t e, bool gated) {
  const bool joint = d.is_joint(gated);
  const int64_t inner = m.list[e].inner, k = m.in.k;
  const dso_dtype type = m.list[e].gate.dtype;
  dso_expert_grad g{};
  g.gate = grad_at(d.gate, e, 0, type), g.down = grad_at(d.down, e, 0, type);
  g.up = joint ? grad_at(d.gate, e, inner * k, type) : grad_at(d.up, e, 0, type);
  g.gate_rs = g.up_rs = k, g.down_rs = inner;
  g.gate_bias = grad_at(d.gate_bias, e, 0, type), g.down_bias = grad_at(d.down_bias, e, 0, type);
  g.up_bias = joint ? grad_at(d.gate_bias, e, inner, type) : grad_at(d.up_bias, e, 0, type);
  return g;
}

using Grads =
    std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors>;

Grads moe_experts_list_backward(const Tensor &grad, const Tensor &x, const Tensor &indices,
                                const Tensor &weights, Tensors gate, Tensors up, Tensors down,
                                Tensors gate_bias, Tensors up_bias, Tensors down_bias,
                                Tensors shared, std::string activation, double alpha, double limit,
                                bool gated, bool need_x, bool need_experts, bool need_shared,
                                std::optional<Tensor> saved) {
  const char *op = "moe_experts_list_backward";
  Experts m;
  Lists w{gate, up, down, gate_bias, up_bias, down_bias};
  fill(op, m, w, x, indices, weights, shared, {activation, alpha, limit, gated}, true);
  const bool wanted = need_experts;
  Lists d{grads_like(gate, wanted),    grads_like(up, wanted),
          grads_like(down, wanted),    grads_like(gate_bias, wanted),
          grads_like(up_bias, wanted), grads_like(down_bias, wanted)};
  std::vector<dso_expert_grad> grads(m.list.size());
  for (size_t e = 0; wanted && e < gate.size(); e++) grads[e] = grad_of(d, m, e, gated);
  CommonGrads common =
      run_backward(op, m, grad, x, weights, shared, grads, need_x, need_shared, saved);
  return {common.x,    common.weights, d.gate,      d.up,         d.down,
          d.gate_bias, d.up_bias,      d.down_bias, common.shared};
}

}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("moe_experts_list", TORCH_BOX(&dso::moe_experts_list));
  m.impl("moe_experts_list_backward", TORCH_BOX(&dso::moe_experts_list_backward));
}
