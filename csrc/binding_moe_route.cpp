// moe_route 及其反向的 CPU 绑定。
#include "binding_moe_route.h"

namespace dso {
namespace {

using Routing = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Routing moe_route(const Tensor &x, const std::optional<Tensor> &weight,
                  const std::optional<Tensor> &logit_bias, const std::optional<Tensor> &choice_bias,
                  int64_t top_k, std::string score, bool normalize, bool softmax_after,
                  int64_t n_group, int64_t topk_group, std::string group_score, double scaling,
                  double eps) {
  Route r;
  fill_route(
      "moe_route", r, x, weight, logit_bias, choice_bias,
      {top_k, score, normalize, softmax_after, n_group, topk_group, group_score, scaling, eps});
  execute(dso_moe_route, &r.p);
  return {r.logits, r.weights, r.indices, r.counts};
}

Tensor float_grad(const char *name, const std::optional<Tensor> &t, int64_t tokens, int64_t width) {
  if (!t) return Tensor();
  expect_shape("moe_route_backward", name, *t, {tokens, width});
  expect_type("moe_route_backward", name, *t, ScalarType::Float);
  return torch::stable::contiguous(*t);
}

Tensor moe_route_backward(const std::optional<Tensor> &d_logits,
                          const std::optional<Tensor> &d_weights, const Tensor &logits,
                          const Tensor &indices, std::string score, bool normalize,
                          bool softmax_after, double scaling, double eps) {
  const char *op = "moe_route_backward";
  expect_shape(op, "logits", logits, {-1, -1});
  expect_type(op, "logits", logits, ScalarType::Float);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  expect_shape(op, "indices", indices, {tokens, -1});
  expect_type(op, "indices", indices, ScalarType::Long);
  const int64_t top_k = indices.size(1);
  dso_route_rule rule{
      score_kind(op, score),  normalize, softmax_after, 0, top_k, 1, 1, static_cast<float>(scaling),
      static_cast<float>(eps)};
  check_rule(op, rule, eps, scaling);
  Tensor z = torch::stable::contiguous(logits), index = torch::stable::contiguous(indices);
  Tensor dl = float_grad("d_logits", d_logits, tokens, experts),
         dw = float_grad("d_weights", d_weights, tokens, top_k);
  const auto *chosen = static_cast<const int64_t *>(index.const_data_ptr());
  for (int64_t i = 0; i < tokens * top_k; i++)
    expect(chosen[i] >= 0 && chosen[i] < experts, op, "：indices[", i / top_k, ", ", i % top_k,
           "] 应在 [0, ", experts, ") 内，实际是 ", chosen[i], "。");
  Tensor out = torch::stable::new_empty(logits, {tokens, experts});
  dso_moe_route_backward_params p{tokens,
                                  experts,
                                  rule,
                                  static_cast<const float *>(z.const_data_ptr()),
                                  chosen,
                                  floats(d_logits, dl),
                                  floats(d_weights, dw),
                                  static_cast<float *>(out.mutable_data_ptr())};
  if (experts > 0) execute(dso_moe_route_backward, &p);
  return out;
}
}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&dso::moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&dso::moe_route_backward));
}
