// sample_filter、sample_tokens 的 CPU 绑定。
#include <cmath>

#include "binding_positions.h"

namespace dso {
namespace {

// 各位置看前几个已有的词元 [R, P]；没有给出时是全部。
Tensor token_lengths(const char *op, const Tensor &tokens, const std::optional<Tensor> &given,
                     int64_t rows, int64_t positions) {
  const int64_t most = tokens.size(1);
  if (!given) {
    Tensor all = torch::stable::new_empty(tokens, {rows, positions});
    torch::stable::fill_(all, static_cast<double>(most));
    return all;
  }
  expect_shape(op, "token_len", *given, {rows, positions});
  expect_type(op, "token_len", *given, ScalarType::Long);
  Tensor length = torch::stable::contiguous(*given);
  for (int64_t i = 0; i < rows * positions; i++)
    expect(integers(length)[i] >= 0 && integers(length)[i] <= most, op, "：token_len[",
           i / positions, ", ", i % positions, "] 应在 0 与 token_ids 的宽 ", most,
           " 之间，实际是 ", integers(length)[i], "。");
  return length;
}

void check_options(const char *op, double temperature, int64_t top_k, double top_p, double min_p,
                   double penalty) {
  expect(std::isfinite(temperature) && static_cast<float>(temperature) > 0, op,
         "：temperature 应为正的有限数，实际是 ", temperature, "。");
  expect(top_k >= 0, op, "：top_k 应不小于 0（0 为不用），实际是 ", top_k, "。");
  expect(top_p >= 0 && top_p <= 1, op, "：top_p 应在 0 与 1 之间，实际是 ", top_p, "。");
  expect(min_p >= 0 && min_p <= 1, op, "：min_p 应在 0 与 1 之间，实际是 ", min_p, "。");
  expect(std::isfinite(penalty) && static_cast<float>(penalty) > 0, op,
         "：repetition_penalty 应为正的有限数，实际是 ", penalty, "。");
}

Tensor sample_filter(const Tensor &logits, const std::optional<Tensor> &token_ids,
                     const std::optional<Tensor> &token_len, double temperature, int64_t top_k,
                     double top_p, double min_p, double repetition_penalty) {
  const char *op = "sample_filter";
  expect_shape(op, "logits", logits, {-1, -1, -1});
  const dso_dtype type = float_dtype(op, "logits", logits);
  expect_vocab(op, "logits", logits);
  check_options(op, temperature, top_k, top_p, min_p, repetition_penalty);
  const int64_t rows = logits.size(0), positions = logits.size(1), vocab = logits.size(2);
  Tensor tokens, length;
  if (token_ids) {
    expect_shape(op, "token_ids", *token_ids, {rows, -1});
    expect_type(op, "token_ids", *token_ids, ScalarType::Long);
    tokens = row_major(*token_ids);
    length = token_lengths(op, tokens, token_len, rows, positions);
  }
  expect(token_ids || repetition_penalty == 1.0, op,
         "：repetition_penalty 不为 1 时应给出 token_ids。");
  Tensor x = row_major(logits);
  Tensor probs = torch::stable::new_empty(logits, {rows, positions, vocab}, ScalarType::Float);
  std::vector<int64_t> fault(static_cast<size_t>(rows * positions));
  dso_sample_filter_params p{rows,
                             positions,
                             vocab,
                             positions_of(x, type),
                             token_ids ? integers(tokens) : nullptr,
                             token_ids ? tokens.stride(0) : 0,
                             token_ids ? integers(length) : nullptr,
                             static_cast<float>(repetition_penalty),
                             static_cast<float>(temperature),
                             static_cast<float>(min_p),
                             top_k,
                             top_p,
                             static_cast<float *>(probs.mutable_data_ptr()),
                             fault.data()};
  if (rows * positions > 0) execute(dso_sample_filter, &p);
  for (int64_t i = 0; i < rows * positions; i++)
    expect(fault[static_cast<size_t>(i)] == 0, op, "：第 ", i / positions, " 行第 ", i % positions,
           " 个位置的 logits（惩罚、除以温度之后）含 NaN 或 +inf，或者全是 -inf。");
  return probs;
}

Tensor sample_tokens(const Tensor &probs, const Tensor &uniform) {
  const char *op = "sample_tokens";
  expect_shape(op, "probs", probs, {-1, -1});
  const dso_dtype type = float_dtype(op, "probs", probs);
  expect_vocab(op, "probs", probs);
  const int64_t rows = probs.size(0);
  expect_shape(op, "uniform", uniform, {rows});
  Tensor u = uniform_doubles(op, uniform), x = row_major(probs),
         token = torch::stable::new_empty(probs, {rows}, ScalarType::Long);
  dso_sample_tokens_params p{rows, probs.size(1), mat_of(x, type),
                             static_cast<const double *>(u.const_data_ptr()),
                             static_cast<int64_t *>(token.mutable_data_ptr())};
  if (rows > 0) execute(dso_sample_tokens, &p);
  for (int64_t r = 0; r < rows; r++)
    expect(p.token[r] >= 0, op, "：probs 的第 ", r, " 行应为非负的有限数且不全是 0。");
  return token;
}
}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("sample_filter", TORCH_BOX(&dso::sample_filter));
  m.impl("sample_tokens", TORCH_BOX(&dso::sample_tokens));
}
