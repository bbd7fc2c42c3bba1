// moe_route 及其反向的参数检查；CPU 与 CUDA 的绑定共用。
#pragma once

#include <cmath>
#include <tuple>

#include "binding.h"

namespace dso {

inline dso_score score_kind(const char *op, const std::string &name) {
  static const std::pair<const char *, dso_score> known[] = {
      {"sigmoid", DSO_SCORE_SIGMOID},
      {"softmax", DSO_SCORE_SOFTMAX},
      {"sqrtsoftplus", DSO_SCORE_SQRTSOFTPLUS}};
  for (const auto &entry : known)
    if (name == entry.first) return entry.second;
  expect(false, op, "：score 应为 sigmoid、softmax、sqrtsoftplus 之一，实际是 ", name, "。");
  return DSO_SCORE_SIGMOID;
}

inline void check_rule(const char *op, const dso_route_rule &r, double eps, double scaling) {
  expect(!r.softmax_after || r.score == DSO_SCORE_SOFTMAX, op,
         "：softmax_after 为 True 时 score 应为 softmax。");
  expect(std::isfinite(scaling), op, "：scaling 应为有限的数，实际是 ", scaling, "。");
  expect(std::isfinite(eps) && eps >= 0, op, "：eps 应为非负的有限数，实际是 ", eps, "。");
}

inline void check_choice(const char *op, const dso_route_rule &r, int64_t experts) {
  expect(r.top_k >= 1 && r.top_k <= experts, op, "：top_k 应在 1 与专家数 ", experts,
         " 之间，实际是 ", r.top_k, "。");
  expect(r.n_group >= 1 && experts % r.n_group == 0, op, "：n_group 应整除专家数 ", experts,
         "，实际是 ", r.n_group, "。");
  expect(r.topk_group >= 1 && r.topk_group <= r.n_group, op,
         "：topk_group 应在 1 与 n_group = ", r.n_group, " 之间，实际是 ", r.topk_group, "。");
  const int64_t reachable = experts / r.n_group * r.topk_group;
  expect(r.top_k <= reachable, op, "：top_k 应不大于可选的专家数 ", reachable, "（", r.topk_group,
         " 组，每组 ", experts / r.n_group, " 个），实际是 ", r.top_k, "。");
}

// [E] 的偏置转成 fp32；没有则返回空。
inline Tensor float_row(const char *op, const char *name, const std::optional<Tensor> &t,
                        int64_t experts) {
  if (!t) return Tensor();
  expect_shape(op, name, *t, {experts});
  float_dtype(op, name, *t);
  return torch::stable::contiguous(
      t->scalar_type() == ScalarType::Float ? *t : torch::stable::to(*t, ScalarType::Float));
}

inline const float *floats(const std::optional<Tensor> &given, const Tensor &t) {
  return given ? static_cast<const float *>(t.const_data_ptr()) : nullptr;
}

// 一次调用的参数与输出；张量要活到执行结束。
struct Route {
  Tensor x, weight, logit_bias, choice_bias, logits, weights, indices, counts;
  dso_moe_route_params p{};
};

struct RouteOptions {
  int64_t top_k;
  std::string score;
  bool normalize, softmax_after;
  int64_t n_group, topk_group;
  std::string group_score;
  double scaling, eps;
};

// 检查，分配输出，填参数。
inline void fill_route(const char *op, Route &r, const Tensor &x,
                       const std::optional<Tensor> &weight, const std::optional<Tensor> &logit_bias,
                       const std::optional<Tensor> &choice_bias, const RouteOptions &o) {
  expect_shape(op, "x", x, {-1, -1});
  const dso_dtype type = float_dtype(op, "x", x);
  const int64_t tokens = x.size(0), k = x.size(1);
  if (weight) expect_shape(op, "weight", *weight, {-1, k});
  const int64_t experts = weight ? weight->size(0) : k;
  const dso_dtype w_type = weight ? float_dtype(op, "weight", *weight) : DSO_F32;
  expect(o.group_score == "top2" || o.group_score == "max", op,
         "：group_score 应为 top2、max 之一，实际是 ", o.group_score, "。");
  const dso_route_rule rule{score_kind(op, o.score),
                            o.normalize,
                            o.softmax_after,
                            o.group_score == "max",
                            o.top_k,
                            o.n_group,
                            o.topk_group,
                            static_cast<float>(o.scaling),
                            static_cast<float>(o.eps)};
  check_rule(op, rule, o.eps, o.scaling);
  check_choice(op, rule, experts);
  r.logit_bias = float_row(op, "logit_bias", logit_bias, experts);
  r.choice_bias = float_row(op, "choice_bias", choice_bias, experts);
  r.x = row_major(x), r.weight = weight ? row_major(*weight) : r.x;
  r.logits = torch::stable::new_empty(x, {tokens, experts}, ScalarType::Float);
  r.weights = torch::stable::new_empty(x, {tokens, o.top_k}, ScalarType::Float);
  r.indices = torch::stable::new_empty(x, {tokens, o.top_k}, ScalarType::Long);
  r.counts = torch::stable::new_empty(x, {experts}, ScalarType::Long);
  r.p = {tokens,
         k,
         experts,
         weight.has_value(),
         mat_of(r.x, type),
         mat_of(r.weight, w_type),
         floats(logit_bias, r.logit_bias),
         floats(choice_bias, r.choice_bias),
         rule,
         static_cast<float *>(r.logits.mutable_data_ptr()),
         static_cast<float *>(r.weights.mutable_data_ptr()),
         static_cast<int64_t *>(r.indices.mutable_data_ptr()),
         static_cast<int64_t *>(r.counts.mutable_data_ptr())};
}

// 反向的一次调用；张量要活到执行结束。
struct RouteBackward {
  Tensor logits, indices, d_logits, d_weights, out;
  dso_moe_route_backward_params p{};
};

struct RouteBackwardOptions {
  std::string score;
  bool normalize, softmax_after;
  double scaling, eps;
};

constexpr const char *kRouteBackward = "moe_route_backward";

inline Tensor float_grad(const char *name, const std::optional<Tensor> &t, int64_t tokens,
                         int64_t width) {
  if (!t) return Tensor();
  expect_shape(kRouteBackward, name, *t, {tokens, width});
  expect_type(kRouteBackward, name, *t, ScalarType::Float);
  return torch::stable::contiguous(*t);
}

// 检查（下标的内容除外），分配输出，填参数。
inline void fill_route_backward(RouteBackward &r, const std::optional<Tensor> &d_logits,
                                const std::optional<Tensor> &d_weights, const Tensor &logits,
                                const Tensor &indices, const RouteBackwardOptions &o) {
  const char *op = kRouteBackward;
  expect_shape(op, "logits", logits, {-1, -1});
  expect_type(op, "logits", logits, ScalarType::Float);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  expect_shape(op, "indices", indices, {tokens, -1});
  expect_type(op, "indices", indices, ScalarType::Long);
  const int64_t top_k = indices.size(1);
  const dso_route_rule rule{score_kind(op, o.score),
                            o.normalize,
                            o.softmax_after,
                            0,
                            top_k,
                            1,
                            1,
                            static_cast<float>(o.scaling),
                            static_cast<float>(o.eps)};
  check_rule(op, rule, o.eps, o.scaling);
  r.logits = torch::stable::contiguous(logits), r.indices = torch::stable::contiguous(indices);
  r.d_logits = float_grad("d_logits", d_logits, tokens, experts),
  r.d_weights = float_grad("d_weights", d_weights, tokens, top_k);
  r.out = torch::stable::new_empty(logits, {tokens, experts});
  r.p = {tokens,
         experts,
         rule,
         static_cast<const float *>(r.logits.const_data_ptr()),
         static_cast<const int64_t *>(r.indices.const_data_ptr()),
         floats(d_logits, r.d_logits),
         floats(d_weights, r.d_weights),
         static_cast<float *>(r.out.mutable_data_ptr())};
}

// 下标在主机上时看内容：都在 [0, experts)。
inline void expect_indices(const RouteBackward &r) {
  const int64_t top_k = r.p.rule.top_k, experts = r.p.experts;
  for (int64_t i = 0; i < r.p.tokens * top_k; i++)
    expect(r.p.indices[i] >= 0 && r.p.indices[i] < experts, kRouteBackward, "：indices[", i / top_k,
           ", ", i % top_k, "] 应在 [0, ", experts, ") 内，实际是 ", r.p.indices[i], "。");
}

}  // namespace dso
