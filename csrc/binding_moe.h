// moe_experts 各算子的绑定共用：检查（CUDA 的绑定也用）、路由、共享专家、激活。
#pragma once

#include <algorithm>
#include <tuple>

#include "binding.h"

namespace dso {

// 全部张量要活到执行结束。
struct Experts {
  Tensor x, gate_up, down, gate_up_bias, down_bias;
  std::vector<Tensor> shared;
  Tensor index, mix;  // 下标、混合权重（fp32），连续
  std::vector<dso_expert> list;
  std::vector<int64_t> begin, token, slot, at;
  std::vector<float> weight;
  int64_t routed = 0, inner = 0, rows = 0;
  dso_moe_inputs in{};
};

// 名字换成激活；截断的两种要有门、limit 要为正。
inline dso_act act_of(const char *op, const std::string &name, double alpha, double limit,
                      bool gated) {
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

// 下标、混合权重的形状与类型，连续的存进 m。先填好 x。
inline void check_routing(const char *op, Experts &m, const Tensor &indices,
                          const Tensor &weights) {
  const int64_t tokens = m.x.size(0);
  expect_shape(op, "indices", indices, {tokens, -1});
  expect_type(op, "indices", indices, ScalarType::Long);
  expect_shape(op, "weights", weights, {tokens, indices.size(1)});
  float_dtype(op, "weights", weights);
  m.index = torch::stable::contiguous(indices),
  m.mix = torch::stable::contiguous(weights.scalar_type() == ScalarType::Float
                                        ? weights
                                        : torch::stable::to(weights, ScalarType::Float));
}

// 下标在主机上时看内容：没有负的。先填好 routed。
inline void expect_not_negative(const char *op, const Experts &m) {
  const auto *chosen = static_cast<const int64_t *>(m.index.const_data_ptr());
  const int64_t tokens = m.index.size(0), top_k = m.index.size(1);
  for (int64_t i = 0; i < tokens * top_k; i++)
    if (chosen[i] < 0)
      expect(false, op, "：indices[", i / top_k, ", ", i % top_k, "] 应不小于 0（等于或大于专家数 ",
             m.routed, " 的是哨兵，不计算），实际是 ", chosen[i], "。");
}

// shared 里张量的个数。
inline void check_shared_count(const char *op, const std::vector<Tensor> &shared) {
  expect(shared.size() == 3 || shared.size() == 4, op,
         "：shared 应为空，或 [gate, up, down]，或再加逐词元的系数，实际有 ", shared.size(),
         " 个。");
}

// 没有量化的共享专家：检查，接在 list 之后。
inline void add_shared(const char *op, Experts &m, const std::vector<Tensor> &shared) {
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
}

// 共享专家的逐词元系数（fp32）；没有为空。
inline const float *add_shared_scale(const char *op, Experts &m,
                                     const std::vector<Tensor> &shared) {
  if (shared.size() != 4) return nullptr;
  expect_shape(op, "shared[3]", shared[3], {m.x.size(0)});
  float_dtype(op, "shared[3]", shared[3]);
  m.shared.push_back(
      torch::stable::contiguous(shared[3].scalar_type() == ScalarType::Float
                                    ? shared[3]
                                    : torch::stable::to(shared[3], ScalarType::Float)));
  return static_cast<const float *>(m.shared.back().const_data_ptr());
}

// 路由：按专家排序，混合权重转 fp32。先填好 x、routed；shared 为共享专家的个数（0 或 1）。
void fill_routing(const char *op, Experts &m, const Tensor &indices, const Tensor &weights,
                  int64_t shared);

// 共享专家 [gate, up, down]（可再带一个逐词元的系数 [T]）：行是全部词元。接在 list 的路由专家之后。
void fill_shared(const char *op, Experts &m, const std::vector<Tensor> &shared);

// （list 里已有共享专家时）它的行与系数。
void fill_shared_rows(const char *op, Experts &m, const std::vector<Tensor> &shared);

// list、路由填好之后：填 in 的其余部分，dso_moe_prepare。
void prepare(const char *op, Experts &m, const dso_act &act, bool backward);

// 前向留给反向的 gate、up 的位置；返回它有多少个元素。list、routed、x 已填好。
inline int64_t place_saved(const Experts &m, int64_t top_k, dso_moe_saved *saved) {
  const int64_t tokens = m.x.size(0), times = m.in.gated ? 2 : 1;
  int64_t widest = 0, shared = 0;
  for (size_t e = 0; e < m.list.size(); e++) {
    int64_t &width = static_cast<int64_t>(e) < m.routed ? widest : shared;
    width = std::max(width, m.list[e].inner);
  }
  saved->rs = (widest + 7) / 8 * 8, saved->routed = m.routed;
  saved->shared_at = times * tokens * top_k * saved->rs;
  return saved->shared_at + times * tokens * shared;
}

// 前向：分配；不要时是空的。没有输出要算时也不写，所以先清零。
inline Tensor new_saved(const Experts &m, int64_t top_k, bool wanted, dso_moe_saved *saved) {
  const int64_t count = place_saved(m, top_k, saved);
  if (!wanted) return torch::stable::new_empty(m.x, {0});
  Tensor out =
      m.in.n > 0 ? torch::stable::new_empty(m.x, {count}) : torch::stable::new_zeros(m.x, {count});
  saved->data = out.mutable_data_ptr();
  return out;
}

// 反向：前向留下的（没有时 data 为空）。
inline void use_saved(const char *op, const Experts &m, int64_t top_k,
                      const std::optional<Tensor> &tensor, dso_moe_saved *saved) {
  const int64_t count = place_saved(m, top_k, saved);
  if (!tensor) return;
  expect_shape(op, "saved", *tensor, {count});
  expect_type(op, "saved", *tensor, m.x.scalar_type());
  expect(tensor->is_contiguous(), op, "：saved 应是连续的。");
  saved->data = const_cast<void *>(tensor->const_data_ptr());
}

// 与 t 同形状、未初始化的梯度；不要时是空张量。
Tensor grad_like(const Tensor &t, bool wanted);

struct CommonGrads {
  Tensor x, weights;
  std::vector<Tensor> shared;
};

// 执行反向：grads 与 list 等长，路由专家的已填好，共享专家的在这里分配。
CommonGrads run_backward(const char *op, Experts &m, const Tensor &grad, const Tensor &x,
                         const Tensor &weights, const std::vector<Tensor> &shared,
                         std::vector<dso_expert_grad> &grads, bool need_x, bool need_shared,
                         const std::optional<Tensor> &saved);

// 执行前向；save：另外留下 gate、up。
std::tuple<Tensor, Tensor> run_forward(const Experts &m, bool save);

}  // namespace dso
