// moe_route 及其反向的 CUDA 绑定：logits 由矩阵乘得到（词元少时用自己的核），其余是一个核。
#include "binding_cuda.h"
#include "binding_moe_route.h"

namespace dso {
namespace {

// logits = x weightᵀ，fp32 累加与输出；16 位的同一种类型不先转成 fp32。
void logits_into(const Route &r) {
  const Tensor transposed = torch::stable::transpose(r.weight, 0, 1);
  if (r.p.x.dtype == r.p.weight.dtype && r.p.x.dtype != DSO_F32 && HAS_WIDE_MM) {
    mm_wide_into(r.logits, r.x, transposed);
    return;
  }
  const Tensor x = to_type(r.x, ScalarType::Float),
               w = torch::stable::transpose(to_type(r.weight, ScalarType::Float), 0, 1);
  mm_into(r.logits, x, w);
}

using Routing = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Routing moe_route(const Tensor &x, const std::optional<Tensor> &weight,
                  const std::optional<Tensor> &logit_bias, const std::optional<Tensor> &choice_bias,
                  int64_t top_k, std::string score, bool normalize, bool softmax_after,
                  int64_t n_group, int64_t topk_group, std::string group_score, double scaling,
                  double eps) {
  const char *op = "moe_route";
  Route r;
  if (weight) expect_device(op, "weight", *weight, x);
  if (logit_bias) expect_device(op, "logit_bias", *logit_bias, x);
  if (choice_bias) expect_device(op, "choice_bias", *choice_bias, x);
  const NoGrad off;
  fill_route(
      op, r, x, weight, logit_bias, choice_bias,
      {top_k, score, normalize, softmax_after, n_group, topk_group, group_score, scaling, eps});
  const Launch launch(x);
  const int64_t parts = dso_cuda_moe_logits_parts(&r.p);
  Tensor sums;
  float *at = nullptr;
  if (parts > 1) {
    sums = scratch_of(r.x, static_cast<size_t>(parts * r.p.tokens * r.p.experts) * sizeof(float));
    at = static_cast<float *>(sums.mutable_data_ptr());
  }
  if (parts > 0)
    check(op, dso_cuda_moe_logits(&r.p, at, launch.stream()));
  else if (weight)
    logits_into(r);
  check(op, dso_cuda_moe_route(&r.p, at, launch.stream()));
  return {r.logits, r.weights, r.indices, r.counts};
}

Tensor moe_route_backward(const std::optional<Tensor> &d_logits,
                          const std::optional<Tensor> &d_weights, const Tensor &logits,
                          const Tensor &indices, std::string score, bool normalize,
                          bool softmax_after, double scaling, double eps) {
  const char *op = kRouteBackward;
  expect_device(op, "indices", indices, logits);
  if (d_logits) expect_device(op, "d_logits", *d_logits, logits);
  if (d_weights) expect_device(op, "d_weights", *d_weights, logits);
  const NoGrad off;
  RouteBackward r;
  fill_route_backward(r, d_logits, d_weights, logits, indices,
                      {score, normalize, softmax_after, scaling, eps});
  if (on_host(r.indices)) expect_indices(r);
  check(op, dso_cuda_moe_route_backward(&r.p, Launch(logits).stream()));
  return r.out;
}

}  // namespace
}  // namespace dso

DSO_DEVICE_LIBRARY(m) {
  m.impl("moe_route", TORCH_BOX(&dso::moe_route));
  m.impl("moe_route_backward", TORCH_BOX(&dso::moe_route_backward));
}
