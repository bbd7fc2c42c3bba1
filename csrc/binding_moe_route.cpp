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

Tensor moe_route_backward(const std::optional<Tensor> &d_logits,
                          const std::optional<Tensor> &d_weights, const Tensor &logits,
                          const Tensor &indices, std::string score, bool normalize,
                          bool softmax_after, double scaling, double eps) {
  RouteBackward r;
  fill_route_backward(r, d_logits, d_weights, logits, indices,
                      {score, normalize, softmax_after, scaling, eps});
  expect_indices(r);
  if (r.p.experts > 0) execute(dso_moe_route_backward, &r.p);
  return r.out;
}
}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("moe_route", TORCH_BOX(&dso::moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&dso::moe_route_backward));
}
