// moe_experts 及其反向的 CPU 绑定：把各种权重布局换成逐专家的结构体。
#include <limits>
#include <tuple>

#include "binding_buffers.h"
#include "binding_moe.h"

namespace dso {
dso_act act_of(const char *op, const std::string &name, double alpha, double limit, bool gated) {
  static const std::pair<const char *, dso_act_kind> known[] = {{"silu", DSO_SILU},
                                                                {"gelu", DSO_GELU},
                                                                {"gelu_tanh", DSO_GELU_TANH},
                                                                {"relu", DSO_RELU},
                                                                {"relu2", DSO_RELU2},
                                                                {"clipped", DSO_CLIPPED},
                                                                {"clipped_silu", DSO_CLIPPED_SILU}};
  const std::pair<const char *, dso_act_kind> *found = nullptr;
  for (const auto &entry : known)
    if (name == entry.first) found = &entry;
  expect(
      found, op,
      "：activation 应为 silu、gelu、gelu_tanh、relu、relu2、clipped、clipped_silu 之一，实际是 ",
      name, "。");
  expect(!dso_act_clips(found->second) || (gated && limit > 0), op, "：activation 为 ", name,
         " 时应有门，limit 应大于 0，实际是 ", limit, "。");
  return {found->second, static_cast<float>(alpha), static_cast<float>(limit)};
}

namespace {

// gate_up、down 的布局：[E, 2I, K]、[E, N, I]；transposed 时 [E, K, 2I]、[E, I, N]；没有门时 2I 换成 I。
struct Layout {
  bool transposed, interleaved, gated;
};

const char *at(const Tensor &t, dso_dtype type, int64_t index) {
  const int64_t size = type == DSO_F32 ? 4 : 2;
  return static_cast<const char *>(t.const_data_ptr()) + index * size;
}

// 第三维步长为 1、行距任意的 [E, R, C]。
Tensor stacked(const Tensor &t) {
  return t.stride(2) == 1 || t.size(2) <= 1 ? t : torch::stable::contiguous(t);
}

void check_stacked(const char *op, Experts &m, const Tensor &gate_up,
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
dso_expert expert_at(const Experts &m, const Layout &layout, dso_dtype type, bool has_bias,
                     bool has_down_bias, int64_t e) {
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

}  // namespace

void fill_routing(const char *op, Experts &m, const Tensor &indices, const Tensor &weights,
                  int64_t shared) {
  const int64_t tokens = m.x.size(0);
  expect_shape(op, "indices", indices, {tokens, -1});
  expect_type(op, "indices", indices, ScalarType::Long);
  expect_shape(op, "weights", weights, {tokens, indices.size(1)});
  float_dtype(op, "weights", weights);
  const int64_t top_k = indices.size(1);
  Tensor index = torch::stable::contiguous(indices),
         mix = torch::stable::contiguous(weights.scalar_type() == ScalarType::Float
                                             ? weights
                                             : torch::stable::to(weights, ScalarType::Float));
  const auto *chosen = static_cast<const int64_t *>(index.const_data_ptr());
  const auto *factor = static_cast<const float *>(mix.const_data_ptr());
  for (int64_t i = 0; i < tokens * top_k; i++)
    if (chosen[i] < 0)
      expect(false, op, "：indices[", i / top_k, ", ", i % top_k, "] 应不小于 0（等于或大于专家数 ",
             m.routed, " 的是哨兵，不计算），实际是 ", chosen[i], "。");
  const auto most = static_cast<size_t>(tokens * (top_k + shared));
  m.begin.resize(static_cast<size_t>(m.routed + shared + 1));
  m.token.resize(most), m.slot.resize(most);
  dso_moe_sort(chosen, tokens, top_k, m.routed, m.begin.data(), m.token.data(), m.slot.data());
  m.rows = m.begin[static_cast<size_t>(m.routed)];
  m.weight.resize(most);
  for (int64_t i = 0; i < m.rows; i++)
    m.weight[static_cast<size_t>(i)] = factor[m.slot[static_cast<size_t>(i)]];
}

void check_shared_count(const char *op, const std::vector<Tensor> &shared) {
  expect(shared.size() == 3 || shared.size() == 4, op,
         "：shared 应为空，或 [gate, up, down]，或再加逐词元的系数，实际有 ", shared.size(),
         " 个。");
}

void fill_shared(const char *op, Experts &m, const std::vector<Tensor> &shared) {
  if (shared.empty()) return;
  check_shared_count(op, shared);
  const int64_t k = m.x.size(1);
  const Tensor &gate = shared[0], &up = shared[1], &down = shared[2];
  expect_shape(op, "shared[0]", gate, {-1, k});
  expect_shape(op, "shared[1]", up, {gate.size(0), k});
  expect_shape(op, "shared[2]", down, {m.in.n, gate.size(0)});
  const dso_dtype type = float_dtype(op, "shared[0]", gate);
  expect_type(op, "shared[1]", up, gate.scalar_type());
  expect_type(op, "shared[2]", down, gate.scalar_type());
  m.shared = {row_major(gate), row_major(up), row_major(down)};
  dso_expert e{};
  e.inner = gate.size(0), e.bias_step = 1;
  e.gate = mat_of(m.shared[0], type), e.up = mat_of(m.shared[1], type),
  e.down = mat_of(m.shared[2], type);
  m.list.push_back(e);
  fill_shared_rows(op, m, shared);
}

void fill_shared_rows(const char *op, Experts &m, const std::vector<Tensor> &shared) {
  const int64_t tokens = m.x.size(0);
  const float *scale = nullptr;
  if (shared.size() == 4) {
    expect_shape(op, "shared[3]", shared[3], {tokens});
    float_dtype(op, "shared[3]", shared[3]);
    m.shared.push_back(
        torch::stable::contiguous(shared[3].scalar_type() == ScalarType::Float
                                      ? shared[3]
                                      : torch::stable::to(shared[3], ScalarType::Float)));
    scale = static_cast<const float *>(m.shared.back().const_data_ptr());
  }
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

namespace {
struct Options {
  std::string activation;
  double alpha, limit;
  Layout layout;
  bool backward;
};

void fill(const char *op, Experts &m, const Tensor &x, const Tensor &indices, const Tensor &weights,
          const Tensor &gate_up, const std::optional<Tensor> &gate_up_bias, const Tensor &down,
          const std::optional<Tensor> &down_bias, const std::vector<Tensor> &shared,
          const Options &options) {
  expect_shape(op, "x", x, {-1, -1});
  const dso_dtype type = float_dtype(op, "gate_up", gate_up);
  const dso_act act =
      act_of(op, options.activation, options.alpha, options.limit, options.layout.gated);
  expect(shared.empty() || (!options.layout.transposed && options.layout.gated), op,
         "：有 shared 时 gate_up 不能转置、必须有门。");
  m.x = row_major(x);
  check_stacked(op, m, gate_up, gate_up_bias, down, down_bias, options.layout);
  fill_routing(op, m, indices, weights, shared.empty() ? 0 : 1);
  m.list.reserve(static_cast<size_t>(m.routed + 1));
  for (int64_t e = 0; e < m.routed; e++)
    m.list.push_back(
        expert_at(m, options.layout, type, gate_up_bias.has_value(), down_bias.has_value(), e));
  fill_shared(op, m, shared);
  m.in.transposed = options.layout.transposed, m.in.gated = options.layout.gated;
  m.in.paired = options.layout.transposed && options.layout.interleaved && options.layout.gated;
  prepare(op, m, act, options.backward);
}

Tensor moe_experts(const Tensor &x, const Tensor &indices, const Tensor &weights,
                   const Tensor &gate_up, const std::optional<Tensor> &gate_up_bias,
                   const Tensor &down, const std::optional<Tensor> &down_bias,
                   std::vector<Tensor> shared, std::string activation, double alpha, double limit,
                   bool transposed, bool interleaved, bool gated) {
  Experts m;
  fill("moe_experts", m, x, indices, weights, gate_up, gate_up_bias, down, down_bias, shared,
       {activation, alpha, limit, {transposed, interleaved, gated}, false});
  Tensor y = torch::stable::new_empty(x, {m.in.tokens, m.in.n});
  dso_moe_params p{m.in, y.mutable_data_ptr()};
  if (m.in.tokens > 0 && m.in.n > 0) execute(dso_moe_experts, &p);
  return y;
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
                         std::vector<dso_expert_grad> &grads, bool need_x, bool need_shared) {
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
      nullptr};
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
                           bool need_shared) {
  const char *op = "moe_experts_backward";
  Experts m;
  Tensor gu = torch::stable::contiguous(gate_up), dn = torch::stable::contiguous(down);
  fill(op, m, x, indices, weights, gu, gate_up_bias, dn, down_bias, shared,
       {activation, alpha, limit, {transposed, interleaved, gated}, true});
  Tensor d_gate_up = grad_like(gu, need_experts), d_down = grad_like(dn, need_experts);
  Tensor d_bias = optional_grad(gate_up_bias, x, need_experts),
         d_down_bias = optional_grad(down_bias, x, need_experts);
  std::vector<dso_expert_grad> grads(m.list.size());
  for (int64_t e = 0; need_experts && e < m.routed; e++)
    grads[static_cast<size_t>(e)] =
        grad_at(m.list[static_cast<size_t>(e)], m, d_gate_up, d_down, d_bias, d_down_bias);
  CommonGrads common = run_backward(op, m, grad, x, weights, shared, grads, need_x, need_shared);
  return {common.x, common.weights, d_gate_up, d_down, d_bias, d_down_bias, common.shared};
}

// 加进已有的梯度：布局要与权重一致，才能用同样的位置。
void expect_grad(const char *op, const char *name, const Tensor &grad, const Tensor &weight) {
  expect_shape(op, name, grad, {weight.size(0), weight.size(1), weight.size(2)});
  expect_type(op, name, grad, weight.scalar_type());
  expect(grad.is_contiguous() && weight.is_contiguous(), op, "：", name,
         " 与它的权重都应是连续的。");
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
                                     const Tensor &gate_up_grad, const Tensor &down_grad) {
  const char *op = "moe_experts_backward_into";
  Experts m;
  fill(op, m, x, indices, weights, gate_up, gate_up_bias, down, down_bias, shared,
       {activation, alpha, limit, {transposed, interleaved, gated}, true});
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
  CommonGrads common = run_backward(op, m, grad, x, weights, shared, grads, need_x, need_shared);
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
