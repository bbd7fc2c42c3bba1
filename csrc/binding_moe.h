// moe_experts 各算子的绑定共用：检查（CUDA 的绑定也用）、路由、共享专家、激活。
#pragma once

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

// 与 t 同形状、未初始化的梯度；不要时是空张量。
Tensor grad_like(const Tensor &t, bool wanted);

struct CommonGrads {
  Tensor x, weights;
  std::vector<Tensor> shared;
};

// 执行反向：grads 与 list 等长，路由专家的已填好，共享专家的在这里分配。
CommonGrads run_backward(const char *op, Experts &m, const Tensor &grad, const Tensor &x,
                         const Tensor &weights, const std::vector<Tensor> &shared,
                         std::vector<dso_expert_grad> &grads, bool need_x, bool need_shared);

}  // namespace dso
