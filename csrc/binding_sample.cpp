// sample_filter、sample_tokens 的 CPU 绑定。
#include "binding_mtp.h"

namespace dso {
namespace {

Tensor sample_filter(const Tensor &logits, const std::optional<Tensor> &token_ids,
                     const std::optional<Tensor> &token_len, double temperature, int64_t top_k,
                     double top_p, double min_p, double repetition_penalty) {
  Filtering f = filtering(logits, token_ids, token_len,
                          {temperature, top_k, top_p, min_p, repetition_penalty});
  dso_sample_filter_params &p = f.p;
  expect_token_len_content(p);
  Tensor probs =
      torch::stable::new_empty(logits, {p.rows, p.positions, p.vocab}, ScalarType::Float);
  std::vector<int64_t> fault(static_cast<size_t>(p.rows * p.positions));
  p.probs = static_cast<float *>(probs.mutable_data_ptr()), p.fault = fault.data();
  if (p.rows * p.positions > 0) execute(dso_sample_filter, &p);
  expect_filtered(p);
  return probs;
}

Tensor sample_tokens(const Tensor &probs, const Tensor &uniform) {
  const char *op = "sample_tokens";
  check_sample_tokens(probs, uniform);
  const int64_t rows = probs.size(0);
  Tensor u = uniform_doubles(op, uniform), x = row_major(probs),
         token = torch::stable::new_empty(probs, {rows}, ScalarType::Long);
  expect_uniform_content(op, u);
  dso_sample_tokens_params p{rows, probs.size(1), mat_of(x, float_dtype(op, "probs", probs)),
                             static_cast<const double *>(u.const_data_ptr()),
                             mutable_integers(token)};
  if (rows > 0) execute(dso_sample_tokens, &p);
  expect_sampled(token);
  return token;
}
}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("sample_filter", TORCH_BOX(&dso::sample_filter));
  m.impl("sample_tokens", TORCH_BOX(&dso::sample_tokens));
}
