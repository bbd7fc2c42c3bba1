// moe_route 及其反向的 CPU 绑定。
#include <cmath>
#include <limits>
#include <tuple>

#include "binding.h"

namespace dso {
namespace {

dso_score score_kind(const char *op, const std::string &name) {
  static const std::pair<const char *, dso_score> known[] = {
      {"sigmoid", DSO_SCORE_SIGMOID},
      {"softmax", DSO_SCORE_SOFTMAX},
      {"sqrtsoftplus", DSO_SCORE_SQRTSOFTPLUS}};
  for (const auto &entry : known)
    if (name == entry.first) return entry.second;
  expect(false, op, "：score 应为 sigmoid、softmax、sqrtsoftplus 之一，实际是 ", name, "。");
  return DSO_SCORE_SIGMOID;
}

void check_rule(const char *op, const dso_route_rule &r, double eps, double scaling) {
  expect(!r.softmax_after || r.score == DSO_SCORE_SOFTMAX, op,
         "：softmax_after 为 True 时 score 应为 softmax。");
  expect(std::isfinite(scaling), op, "：scaling 应为有限的数，实际是 ", scaling, "。");
  expect(std::isfinite(eps) && eps >= 0, op, "：eps 应为非负的有限数，实际是 ", eps, "。");
}

void check_choice(const char *op, const dso_route_rule &r, int64_t experts) {
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
Tensor float_row(const char *op, const char *name, const std::optional<Tensor> &t,
                 int64_t experts) {
  if (!t) return Tensor();
  expect_shape(op, name, *t, {experts});
  float_dtype(op, name, *t);
  return torch::stable::contiguous(
      t->scalar_type() == ScalarType::Float ? *t : torch::stable::to(*t, ScalarType::Float));
}

const float *floats(const std::optional<Tensor> &given, const Tensor &t) {
  return given ? static_cast<const float *>(t.const_data_ptr()) : nullptr;
}

using Routing = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Routing moe_route(const Tensor &x, const std::optional<Tensor> &weight,
                  const std::optional<Tensor> &logit_bias, const std::optional<Tensor> &choice_bias,
                  int64_t top_k, std::string score, bool normalize, bool softmax_after,
                  int64_t n_group, int64_t topk_group, std::string group_score, double scaling,
                  double eps) {
  const char *op = "moe_route";
  expect_shape(op, "x", x, {-1, -1});
  const dso_dtype type = float_dtype(op, "x", x);
  const int64_t tokens = x.size(0), k = x.size(1);
  if (weight) expect_shape(op, "weight", *weight, {-1, k});
  const int64_t experts = weight ? weight->size(0) : k;
  const dso_dtype w_type = weight ? float_dtype(op, "weight", *weight) : DSO_F32;
  expect(group_score == "top2" || group_score == "max", op,
         "：group_score 应为 top2、max 之一，实际是 ", group_score, "。");
  dso_route_rule rule{score_kind(op, score),
                      normalize,
                      softmax_after,
                      group_score == "max",
                      top_k,
                      n_group,
                      topk_group,
                      static_cast<float>(scaling),
                      static_cast<float>(eps)};
  check_rule(op, rule, eps, scaling);
  check_choice(op, rule, experts);
  Tensor bias = float_row(op, "logit_bias", logit_bias, experts),
         choice = float_row(op, "choice_bias", choice_bias, experts);
  Tensor rows = row_major(x), w = weight ? row_major(*weight) : rows;
  Tensor logits = torch::stable::new_empty(x, {tokens, experts}, ScalarType::Float),
         weights = torch::stable::new_empty(x, {tokens, top_k}, ScalarType::Float),
         indices = torch::stable::new_empty(x, {tokens, top_k}, ScalarType::Long),
         counts = torch::stable::new_empty(x, {experts}, ScalarType::Long);
  dso_moe_route_params p{tokens,
                         k,
                         experts,
                         weight.has_value(),
                         mat_of(rows, type),
                         mat_of(w, w_type),
                         floats(logit_bias, bias),
                         floats(choice_bias, choice),
                         rule,
                         static_cast<float *>(logits.mutable_data_ptr()),
                         static_cast<float *>(weights.mutable_data_ptr()),
                         static_cast<int64_t *>(indices.mutable_data_ptr()),
                         static_cast<int64_t *>(counts.mutable_data_ptr())};
  execute(dso_moe_route, &p);
  return {logits, weights, indices, counts};
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
