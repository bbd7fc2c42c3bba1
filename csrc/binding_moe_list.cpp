// moe_experts_list 及其反向的 CPU 绑定：每个专家是几个单独的张量（例如各自的 nn.Linear），原地读取。
#include <tuple>

#include "binding_moe.h"

namespace dso {
namespace {

using Tensors = std::vector<Tensor>;

// 逐专家的权重与偏置；up 为空而有门时，gate 是上下相接的 [2 I, K]。张量要活到执行结束。
struct Lists {
  Tensors gate, up, down, gate_bias, up_bias, down_bias;

  bool is_joint(bool gated) const { return gated && up.empty(); }
};

std::string nth(const char *name, size_t e) {
  return std::string(name) + "[" + std::to_string(e) + "]";
}

void check_count(const char *op, const char *name, const Tensors &list, size_t want,
                 bool optional) {
  expect(list.size() == want || (optional && list.empty()), op, "：", name, " 应有 ", want,
         " 个张量（每个专家一个）", optional ? "或为空" : "", "，实际有 ", list.size(), " 个。");
}

// 每个张量的最后一维步长为 1（否则复制），类型都与 gate[0] 相同。
void check_list(const char *op, const char *name, Tensors &list, ScalarType type) {
  for (size_t e = 0; e < list.size(); e++) {
    expect_type(op, nth(name, e).c_str(), list[e], type);
    list[e] = row_major(list[e]);
  }
}

void check_counts(const char *op, const Lists &w, bool gated) {
  const size_t experts = w.gate.size();
  expect(experts > 0, op, "：gate 应至少有一个专家，实际为空。");
  check_count(op, "up", w.up, experts, true);
  expect(gated || w.up.empty(), op, "：gated 为 False 时 up 应为空，实际有 ", w.up.size(), " 个。");
  check_count(op, "down", w.down, experts, false);
  check_count(op, "gate_bias", w.gate_bias, experts, true);
  check_count(op, "up_bias", w.up_bias, w.up.size(), true);
  check_count(op, "down_bias", w.down_bias, experts, true);
}

// 一个专家的形状；返回中间宽。
int64_t check_expert(const char *op, const Lists &w, size_t e, int64_t k, int64_t n, bool gated) {
  expect_shape(op, nth("gate", e).c_str(), w.gate[e], {-1, k});
  const int64_t rows = w.gate[e].size(0), times = w.is_joint(gated) ? 2 : 1;
  expect(rows % times == 0, op, "：", nth("gate", e), " 应由等宽的 gate 与 up 组成，实际宽 ", rows,
         "。");
  if (!w.up.empty()) expect_shape(op, nth("up", e).c_str(), w.up[e], {rows, k});
  expect_shape(op, nth("down", e).c_str(), w.down[e], {n, rows / times});
  if (!w.gate_bias.empty()) expect_shape(op, nth("gate_bias", e).c_str(), w.gate_bias[e], {rows});
  if (!w.up_bias.empty()) expect_shape(op, nth("up_bias", e).c_str(), w.up_bias[e], {rows});
  if (!w.down_bias.empty()) expect_shape(op, nth("down_bias", e).c_str(), w.down_bias[e], {n});
  return rows / times;
}

const void *at(const Tensors &list, size_t e, int64_t skip, dso_dtype type) {
  if (list.empty()) return nullptr;
  return static_cast<const char *>(list[e].const_data_ptr()) + skip * (type == DSO_F32 ? 4 : 2);
}

dso_expert expert_of(const Lists &w, size_t e, int64_t inner, dso_dtype type, bool gated) {
  const bool joint = w.is_joint(gated);
  dso_expert out{};
  out.inner = inner, out.bias_dtype = type, out.bias_step = 1;
  out.gate = mat_of(w.gate[e], type), out.down = mat_of(w.down[e], type);
  out.up = {nullptr, 0, type};
  if (joint) out.up = {at(w.gate, e, inner * out.gate.rs, type), out.gate.rs, type};
  if (!w.up.empty()) out.up = mat_of(w.up[e], type);
  out.gate_bias = at(w.gate_bias, e, 0, type);
  out.up_bias = joint ? at(w.gate_bias, e, inner, type) : at(w.up_bias, e, 0, type);
  out.down_bias = at(w.down_bias, e, 0, type);
  return out;
}

struct Options {
  std::string activation;
  double alpha, limit;
  bool gated, backward;
};

void fill(const char *op, Experts &m, Lists &w, const Tensor &x, const Tensor &indices,
          const Tensor &weights, const Tensors &shared, const Options &options) {
  expect_shape(op, "x", x, {-1, -1});
  check_counts(op, w, options.gated);
  const dso_dtype type = float_dtype(op, "gate[0]", w.gate[0]);
  const ScalarType scalar = w.gate[0].scalar_type();
  const dso_act act = act_of(op, options.activation, options.alpha, options.limit, options.gated);
  expect(shared.empty() || options.gated, op, "：有 shared 时必须有门。");
  check_list(op, "gate", w.gate, scalar), check_list(op, "up", w.up, scalar);
  check_list(op, "down", w.down, scalar), check_list(op, "gate_bias", w.gate_bias, scalar);
  check_list(op, "up_bias", w.up_bias, scalar), check_list(op, "down_bias", w.down_bias, scalar);
  expect_shape(op, "down[0]", w.down[0], {-1, -1});
  m.x = row_major(x), m.routed = static_cast<int64_t>(w.gate.size()), m.in.n = w.down[0].size(0);
  m.list.reserve(w.gate.size() + 1);
  for (size_t e = 0; e < w.gate.size(); e++) {
    const int64_t inner = check_expert(op, w, e, m.x.size(1), m.in.n, options.gated);
    m.list.push_back(expert_of(w, e, inner, type, options.gated));
  }
  m.in.gated = options.gated;
  fill_routing(op, m, indices, weights, shared.empty() ? 0 : 1);
  fill_shared(op, m, shared);
  prepare(op, m, act, options.backward);
}

Tensor moe_experts_list(const Tensor &x, const Tensor &indices, const Tensor &weights, Tensors gate,
                        Tensors up, Tensors down, Tensors gate_bias, Tensors up_bias,
                        Tensors down_bias, Tensors shared, std::string activation, double alpha,
                        double limit, bool gated) {
  Experts m;
  Lists w{gate, up, down, gate_bias, up_bias, down_bias};
  fill("moe_experts_list", m, w, x, indices, weights, shared,
       {activation, alpha, limit, gated, false});
  Tensor y = torch::stable::new_empty(x, {m.in.tokens, m.in.n});
  dso_moe_params p{m.in, y.mutable_data_ptr()};
  if (m.in.tokens > 0 && m.in.n > 0) execute(dso_moe_experts, &p);
  return y;
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
                                bool gated, bool need_x, bool need_experts, bool need_shared) {
  const char *op = "moe_experts_list_backward";
  Experts m;
  Lists w{gate, up, down, gate_bias, up_bias, down_bias};
  fill(op, m, w, x, indices, weights, shared, {activation, alpha, limit, gated, true});
  const bool wanted = need_experts;
  Lists d{grads_like(gate, wanted),    grads_like(up, wanted),
          grads_like(down, wanted),    grads_like(gate_bias, wanted),
          grads_like(up_bias, wanted), grads_like(down_bias, wanted)};
  std::vector<dso_expert_grad> grads(m.list.size());
  for (size_t e = 0; wanted && e < gate.size(); e++) grads[e] = grad_of(d, m, e, gated);
  CommonGrads common = run_backward(op, m, grad, x, weights, shared, grads, need_x, need_shared);
  return {common.x,    common.weights, d.gate,      d.up,         d.down,
          d.gate_bias, d.up_bias,      d.down_bias, common.shared};
}

}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("moe_experts_list", TORCH_BOX(&dso::moe_experts_list));
  m.impl("moe_experts_list_backward", TORCH_BOX(&dso::moe_experts_list_backward));
}
