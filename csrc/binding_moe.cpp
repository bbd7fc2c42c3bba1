// moe_experts 及其反向的 CPU 绑定：把各种权重布局换成逐专家的结构体。
#include <limits>

#include "binding_buffers.h"
#include "binding_moe_stacked.h"

namespace dso {
void fill_routing(const char *op, Experts &m, const Tensor &indices, const Tensor &weights,
                  int64_t shared) {
  check_routing(op, m, indices, weights);
  const int64_t tokens = m.x.size(0), top_k = indices.size(1);
  expect_not_negative(op, m);
  const auto *chosen = static_cast<const int64_t *>(m.index.const_data_ptr());
  const auto *factor = static_cast<const float *>(m.mix.const_data_ptr());
  const auto most = static_cast<size_t>(tokens * (top_k + shared));
  m.begin.resize(static_cast<size_t>(m.routed + shared + 1));
  m.token.resize(most), m.slot.resize(most);
  dso_moe_sort(chosen, tokens, top_k, m.routed, m.begin.data(), m.token.data(), m.slot.data());
  m.rows = m.begin[static_cast<size_t>(m.routed)];
  m.weight.resize(most);
  for (int64_t i = 0; i < m.rows; i++)
    m.weight[static_cast<size_t>(i)] = factor[m.slot[static_cast<size_t>(i)]];
}

void fill_shared(const char *op, Experts &m, const std::vector<Tensor> &shared) {
  if (shared.empty()) return;
  add_shared(op, m, shared);
  fill_shared_rows(op, m, shared);
}

void fill_shared_rows(const char *op, Experts &m, const std::vector<Tensor> &shared) {
  const int64_t tokens = m.x.size(0);
  const float *scale = add_shared_scale(op, m, shared);
  for (int64_t t = 0; t < tokens; t++) {
    const auto i = static_cast<size_t>(m.rows + t);
    m.token[i] = t, m.weight[i] = scale ? scale[t] : 1.0f;
  }
  m.begin[static_cast<size_t>(m.routed + 1)] = m.rows + tokens;
}

void prepare(const char *op, Experts &m, const dso_act &act, bool backward) {
  m.in.tokens = m.x.size(0), m.in.k = m.x.size(1);
  m.in.x = {m.x.const_data_ptr(), m.x.stride(0), float_dtype(op, "x", m.x)};
  m.in.experts = static_cast<int64_t>(m.list.size()), m.in.expert = m.list.data();
  m.in.begin = m.begin.data(), m.in.token = m.token.data(), m.in.weight = m.weight.data();
  m.in.act = act;
  m.at.resize(3 * (m.list.size() + 1));
  dso_moe_prepare(&m.in, backward, m.at.data());
}

std::tuple<Tensor, Tensor> run_forward(const Experts &m, bool save) {
  Tensor y = torch::stable::new_empty(m.x, {m.in.tokens, m.in.n});
  dso_moe_params p{m.in, y.mutable_data_ptr(), {}};
  Tensor saved = new_saved(m, m.index.size(1), save, &p.saved);
  if (m.in.tokens > 0 && m.in.n > 0) execute(dso_moe_experts, &p);
  return {y, saved};
}

namespace {
void fill(const char *op, Experts &m, const Tensor &x, const Tensor &indices, const Tensor &weights,
          const Tensor &gate_up, const std::optional<Tensor> &gate_up_bias, const Tensor &down,
          const std::optional<Tensor> &down_bias, const std::vector<Tensor> &shared,
          const StackedOptions &options, bool backward) {
  const dso_act act =
      check_experts(op, m, x, gate_up, gate_up_bias, down, down_bias, shared, options);
  fill_routing(op, m, indices, weights, shared.empty() ? 0 : 1);
  m.list.reserve(static_cast<size_t>(m.routed + 1));
  for (int64_t e = 0; e < m.routed; e++)
    m.list.push_back(
        expert_at(m, options.layout, gate_up_bias.has_value(), down_bias.has_value(), e));
  fill_shared(op, m, shared);
  prepare(op, m, act, backward);
}

std::tuple<Tensor, Tensor> moe_experts(const Tensor &x, const Tensor &indices,
                                       const Tensor &weights, const Tensor &gate_up,
                                       const std::optional<Tensor> &gate_up_bias,
                                       const Tensor &down, const std::optional<Tensor> &down_bias,
                                       std::vector<Tensor> shared, std::string activation,
                                       double alpha, double limit, bool transposed,
                                       bool interleaved, bool gated, bool save) {
  Experts m;
  fill("moe_experts", m, x, indices, weights, gate_up, gate_up_bias, down, down_bias, shared,
       {activation, alpha, limit, {transposed, interleaved, gated}}, false);
  return run_forward(m, save);
}

// 梯度的指针：与 expert_at 同样的位置，换到梯度张量上。
dso_expert_grad grad_at(const dso_expert &e, const Experts &m, const Tensor &gate_up,
                        const Tensor &down, const Tensor &gate_up_bias, const Tensor &down_bias) {
  auto shift = [](const void *p, const Tensor &from, const Tensor &to) -> void * {
    if (!p) return nullptr;
    auto *base = static_cast<char *>(to.mutable_data_ptr());
    return base + (static_cast<const char *>(p) - static_cast<const char *>(from.const_data_ptr()));
  };
  dso_expert_grad g{};
  g.gate = shift(e.gate.data, m.gate_up, gate_up), g.gate_rs = e.gate.rs;
  g.up = shift(e.up.data, m.gate_up, gate_up), g.up_rs = e.up.rs;
  g.down = shift(e.down.data, m.down, down), g.down_rs = e.down.rs;
  g.gate_bias = shift(e.gate_bias, m.gate_up_bias, gate_up_bias);
  g.up_bias = shift(e.up_bias, m.gate_up_bias, gate_up_bias);
  g.down_bias = shift(e.down_bias, m.down_bias, down_bias);
  return g;
}

Tensor nothing(const Tensor &like) { return torch::stable::new_empty(like, {0}); }
}  // namespace

Tensor grad_like(const Tensor &t, bool wanted) {
  if (!wanted) return nothing(t);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); i++) sizes.push_back(t.size(i));
  return pooled_empty(t, sizes);
}

namespace {
Tensor optional_grad(const std::optional<Tensor> &t, const Tensor &other, bool wanted) {
  return t ? grad_like(*t, wanted) : nothing(other);
}

// dw [行] 放回 [T, top_k]；没有计算的（哨兵）为 0。
Tensor scatter_weights(const Experts &m, const Tensor &weights, const std::vector<float> &dw) {
  Tensor out =
      torch::stable::new_zeros(weights, {weights.size(0), weights.size(1)}, ScalarType::Float);
  auto *to = static_cast<float *>(out.mutable_data_ptr());
  for (int64_t i = 0; i < m.rows; i++)
    to[m.slot[static_cast<size_t>(i)]] = dw[static_cast<size_t>(i)];
  return weights.scalar_type() == ScalarType::Float ? out
                                                    : torch::stable::to(out, weights.scalar_type());
}

// 共享专家的梯度张量，并填好它的指针（grads 的最后一个）。
std::vector<Tensor> shared_grads(const Experts &m, const std::vector<Tensor> &shared, bool wanted,
                                 std::vector<dso_expert_grad> &grads) {
  std::vector<Tensor> out;
  for (const Tensor &t : shared) out.push_back(grad_like(t, wanted));
  if (!shared.empty() && wanted) {
    const int64_t inner = m.list.back().inner;
    dso_expert_grad &g = grads.back();
    g.gate = out[0].mutable_data_ptr(), g.up = out[1].mutable_data_ptr(),
    g.down = out[2].mutable_data_ptr();
    g.gate_rs = g.up_rs = m.in.k, g.down_rs = inner;
  }
  return out;
}

// 共享专家逐词元系数的梯度。
Tensor scale_grad(const Experts &m, const Tensor &scale, const std::vector<float> &dw) {
  Tensor out = torch::stable::new_empty(scale, {m.in.tokens}, ScalarType::Float);
  auto *to = static_cast<float *>(out.mutable_data_ptr());
  for (int64_t t = 0; t < m.in.tokens; t++) to[t] = dw[static_cast<size_t>(m.rows + t)];
  return scale.scalar_type() == ScalarType::Float ? out
                                                  : torch::stable::to(out, scale.scalar_type());
}
}  // namespace

CommonGrads run_backward(const char *op, Experts &m, const Tensor &grad, const Tensor &x,
                         const Tensor &weights, const std::vector<Tensor> &shared,
                         std::vector<dso_expert_grad> &grads, bool need_x, bool need_shared,
                         const std::optional<Tensor> &saved) {
  expect_shape(op, "grad", grad, {m.in.tokens, m.in.n});
  Tensor dy = row_major(grad);
  CommonGrads out{grad_like(x, need_x), {}, shared_grads(m, shared, need_shared, grads)};
  std::vector<float> dw(m.weight.size() + 1);
  dso_moe_backward_params p{
      m.in,
      {dy.const_data_ptr(), dy.stride(0), float_dtype(op, "grad", grad)},
      need_x && x.size(0) * x.size(1) > 0 ? out.x.mutable_data_ptr() : nullptr,
      dw.data(),
      grads.data(),
      static_cast<int64_t>(torch::stable::get_num_threads()),
      nullptr,
      {}};
  use_saved(op, m, m.index.size(1), saved, &p.saved);
  std::vector<int64_t> task_at(3 * m.list.size() + 1);
  dso_moe_backward_prepare(&p, task_at.data());
  execute(dso_moe_experts_backward, &p);
  out.weights = scatter_weights(m, weights, dw);
  if (shared.size() == 4 && need_shared) out.shared[3] = scale_grad(m, shared[3], dw);
  return out;
}

namespace {
using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

Grads moe_experts_backward(const Tensor &grad, const Tensor &x, const Tensor &indices,
                           const Tensor &weights, const Tensor &gate_up,
                           const std::optional<Tensor> &gate_up_bias, const Tensor &down,
                           const std::optional<Tensor> &down_bias, std::vector<Tensor> shared,
                           std::string activation, double alpha, double limit, bool transposed,
                           bool interleaved, bool gated, bool need_x, bool need_experts,
                           bool need_shared, std::optional<Tensor> saved) {
  const char *op = "moe_experts_backward";
  Experts m;
  Tensor gu = torch::stable::contiguous(gate_up), dn = torch::stable::contiguous(down);
  fill(op, m, x, indices, weights, gu, gate_up_bias, dn, down_bias, shared,
       {activation, alpha, limit, {transposed, interleaved, gated}}, true);
  Tensor d_gate_up = grad_like(gu, need_experts), d_down = grad_like(dn, need_experts);
  Tensor d_bias = optional_grad(gate_up_bias, x, need_experts),
         d_down_bias = optional_grad(down_bias, x, need_experts);
  std::vector<dso_expert_grad> grads(m.list.size());
  for (int64_t e = 0; need_experts && e < m.routed; e++)
    grads[static_cast<size_t>(e)] =
        grad_at(m.list[static_cast<size_t>(e)], m, d_gate_up, d_down, d_bias, d_down_bias);
  CommonGrads common =
      run_backward(op, m, grad, x, weights, shared, grads, need_x, need_shared, saved);
  return {common.x, common.weights, d_gate_up, d_down, d_bias, d_down_bias, common.shared};
}

// 改写输入的算子不能返回列表，所以共享专家的四个逐个给出，没有的为空。
using OtherGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

OtherGrads moe_experts_backward_into(const Tensor &grad, const Tensor &x, const Tensor &indices,
                                     const Tensor &weights, const Tensor &gate_up,
                                     const std::optional<Tensor> &gate_up_bias, const Tensor &down,
                                     const std::optional<Tensor> &down_bias,
                                     std::vector<Tensor> shared, std::string activation,
                                     double alpha, double limit, bool transposed, bool interleaved,
                                     bool gated, bool need_x, bool need_shared,
                                     const Tensor &gate_up_grad, const Tensor &down_grad,
                                     std::optional<Tensor> saved) {
  const char *op = "moe_experts_backward_into";
  Experts m;
  fill(op, m, x, indices, weights, gate_up, gate_up_bias, down, down_bias, shared,
       {activation, alpha, limit, {transposed, interleaved, gated}}, true);
  expect_grad(op, "gate_up_grad", gate_up_grad, gate_up);
  expect_grad(op, "down_grad", down_grad, down);
  Tensor d_bias = optional_grad(gate_up_bias, x, true),
         d_down_bias = optional_grad(down_bias, x, true);
  std::vector<dso_expert_grad> grads(m.list.size());
  for (int64_t e = 0; e < m.routed; e++) {
    dso_expert_grad &one = grads[static_cast<size_t>(e)];
    one = grad_at(m.list[static_cast<size_t>(e)], m, gate_up_grad, down_grad, d_bias, d_down_bias);
    one.add = 1;
  }
  CommonGrads common =
      run_backward(op, m, grad, x, weights, shared, grads, need_x, need_shared, saved);
  std::vector<Tensor> &s = common.shared;
  while (s.size() < 4) s.push_back(nothing(x));
  return {common.x, common.weights, d_bias, d_down_bias, s[0], s[1], s[2], s[3]};
}
}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&dso::moe_experts));
  m.impl("moe_experts_backward", TORCH_BOX(&dso::moe_experts_backward));
  m.impl("moe_experts_backward_into", TORCH_BOX(&dso::moe_experts_backward_into));
}
