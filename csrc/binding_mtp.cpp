// mtp_draft_head、mtp_verify_greedy、mtp_verify_sample、mtp_input 的 CPU 绑定。
#include "binding_mtp.h"

#include <tuple>

namespace dso {
namespace {

using Verified = std::tuple<Tensor, Tensor>;

Verified mtp_verify_greedy(const Tensor &logits, const Tensor &drafts,
                           const std::optional<Tensor> &draft_len) {
  const char *op = "mtp_verify_greedy";
  const dso_dtype type = float_dtype(op, "logits", logits);
  Verification v = verification(op, "logits", logits, drafts, draft_len);
  expect_drafts_content(op, v.rows);
  Tensor rows = row_major(logits);
  dso_mtp_verify_greedy_params p{v.rows, positions_of(rows, type)};
  if (p.in.rows > 0) execute(dso_mtp_verify_greedy, &p);
  expect_greedy_verified(op, p.in);
  return {v.accepted, v.next};
}

Verified mtp_verify_sample(const Tensor &probs, const Tensor &drafts,
                           const std::optional<Tensor> &draft_len,
                           const std::optional<Tensor> &draft_probs, const Tensor &uniform) {
  const char *op = "mtp_verify_sample";
  const dso_dtype type = float_dtype(op, "probs", probs);
  Verification v = verification(op, "probs", probs, drafts, draft_len);
  expect_drafts_content(op, v.rows);
  const int64_t rows = v.rows.rows, width = v.rows.drafts;
  Tensor target = row_major(probs), proposal = target;
  dso_dtype proposal_type = type;
  if (draft_probs) {
    expect_shape(op, "draft_probs", *draft_probs, {rows, width, v.rows.vocab});
    proposal_type = float_dtype(op, "draft_probs", *draft_probs);
    proposal = row_major(*draft_probs);
  }
  expect_shape(op, "uniform", uniform, {rows, width + 1});
  Tensor u = uniform_doubles(op, uniform);
  expect_uniform_content(op, u);
  dso_mtp_verify_sample_params p{v.rows, !draft_probs.has_value(), positions_of(target, type),
                                 positions_of(proposal, proposal_type),
                                 static_cast<const double *>(u.const_data_ptr())};
  if (rows > 0) execute(dso_mtp_verify_sample, &p);
  expect_sample_verified(op, p.in);
  return {v.accepted, v.next};
}

Tensor mtp_input(const Tensor &embedding, const Tensor &hidden, const Tensor &embedding_norm,
                 const Tensor &hidden_norm, const Tensor &weight, double eps) {
  const char *op = "mtp_input";
  check_mtp_input(embedding, hidden, embedding_norm, hidden_norm, weight);
  const dso_dtype type = float_dtype(op, "embedding", embedding),
                  w_type = float_dtype(op, "weight", weight);
  const int64_t k = embedding.size(embedding.dim() - 1), n = weight.size(0);
  Tensor e = as_rows(embedding), h = as_rows(hidden), w = row_major(weight),
         e_norm = torch::stable::contiguous(embedding_norm),
         h_norm = torch::stable::contiguous(hidden_norm);
  Tensor y = torch::stable::new_empty(embedding, sizes_with_last(embedding, n));
  dso_mtp_input_params p{rows_of(embedding),
                         n,
                         k,
                         mat_of(e, type),
                         mat_of(h, type),
                         mat_of(w, w_type),
                         e_norm.const_data_ptr(),
                         h_norm.const_data_ptr(),
                         float_dtype(op, "embedding_norm", embedding_norm),
                         float_dtype(op, "hidden_norm", hidden_norm),
                         static_cast<float>(eps),
                         y.mutable_data_ptr()};
  if (p.m > 0 && n > 0) execute(dso_mtp_input, &p);
  return y;
}

Tensor mtp_draft_head(const Tensor &hidden, const Tensor &weight, const std::optional<Tensor> &bias,
                      const std::optional<Tensor> &vocabulary) {
  const char *op = "mtp_draft_head";
  check_draft_head(hidden, weight, bias, vocabulary);
  const int64_t rows = hidden.size(0), vocab = weight.size(0);
  Tensor x = row_major(hidden), w = row_major(weight),
         b = bias ? torch::stable::contiguous(*bias) : w;
  std::optional<Tensor> ids;
  if (vocabulary) {
    ids = torch::stable::contiguous(*vocabulary);
    expect_vocabulary_content(*ids, vocab);
  }
  Tensor token = torch::stable::new_empty(hidden, {rows}, ScalarType::Long);
  dso_mtp_draft_head_params p{rows,
                              hidden.size(1),
                              vocab,
                              ids ? ids->size(0) : vocab,
                              mat_of(x, float_dtype(op, "hidden", hidden)),
                              mat_of(w, float_dtype(op, "weight", weight)),
                              bias ? b.const_data_ptr() : nullptr,
                              ids ? integers(*ids) : nullptr,
                              mutable_integers(token)};
  if (rows > 0) execute(dso_mtp_draft_head, &p);
  expect_drafted(token);
  return token;
}
}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("mtp_draft_head", TORCH_BOX(&dso::mtp_draft_head));
  m.impl("mtp_verify_greedy", TORCH_BOX(&dso::mtp_verify_greedy));
  m.impl("mtp_verify_sample", TORCH_BOX(&dso::mtp_verify_sample));
  m.impl("mtp_input", TORCH_BOX(&dso::mtp_input));
}
