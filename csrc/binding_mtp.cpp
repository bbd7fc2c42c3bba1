// mtp_draft_head、mtp_verify_greedy、mtp_verify_sample、mtp_input 的 CPU 绑定。
#include <tuple>

#include "binding_positions.h"

namespace dso {
namespace {

// 一次核对的公共部分：检查草稿，分配输出；各张量要活到执行结束。
struct Verification {
  Tensor draft, length, accepted, next;
  dso_mtp_rows rows;
};

// 每行有效的草稿个数；没有给出时都是 drafts。
Tensor draft_lengths(const char *op, const Tensor &draft, const std::optional<Tensor> &given) {
  const int64_t rows = draft.size(0), drafts = draft.size(1);
  if (!given) {
    Tensor all = torch::stable::new_empty(draft, {rows});
    torch::stable::fill_(all, static_cast<double>(drafts));
    return all;
  }
  expect_shape(op, "draft_len", *given, {rows});
  expect_type(op, "draft_len", *given, ScalarType::Long);
  Tensor length = torch::stable::contiguous(*given);
  for (int64_t r = 0; r < rows; r++)
    expect(integers(length)[r] >= 0 && integers(length)[r] <= drafts, op, "：draft_len[", r,
           "] 应在 0 与草稿个数 ", drafts, " 之间，实际是 ", integers(length)[r], "。");
  return length;
}

Verification verification(const char *op, const char *name, const Tensor &target,
                          const Tensor &drafts, const std::optional<Tensor> &draft_len) {
  expect_shape(op, "drafts", drafts, {-1, -1});
  expect_type(op, "drafts", drafts, ScalarType::Long);
  const int64_t rows = drafts.size(0), width = drafts.size(1);
  expect_shape(op, name, target, {rows, width + 1, -1});
  expect_vocab(op, name, target);
  const int64_t vocab = target.size(2);
  Tensor length = draft_lengths(op, drafts, draft_len), draft = torch::stable::contiguous(drafts);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < integers(length)[r]; i++) {
      const int64_t token = integers(draft)[r * width + i];
      expect(token >= 0 && token < vocab, op, "：drafts[", r, ", ", i, "] 应在 [0, ", vocab,
             ") 内，实际是 ", token, "。");
    }
  Tensor accepted = torch::stable::new_empty(draft, {rows}),
         next = torch::stable::new_empty(draft, {rows});
  dso_mtp_rows in{rows,
                  width,
                  vocab,
                  integers(draft),
                  integers(length),
                  static_cast<int64_t *>(accepted.mutable_data_ptr()),
                  static_cast<int64_t *>(next.mutable_data_ptr())};
  return {draft, length, accepted, next, in};
}

using Verified = std::tuple<Tensor, Tensor>;

Verified mtp_verify_greedy(const Tensor &logits, const Tensor &drafts,
                           const std::optional<Tensor> &draft_len) {
  const char *op = "mtp_verify_greedy";
  const dso_dtype type = float_dtype(op, "logits", logits);
  Verification v = verification(op, "logits", logits, drafts, draft_len);
  Tensor rows = row_major(logits);
  dso_mtp_verify_greedy_params p{v.rows, positions_of(rows, type)};
  if (p.in.rows > 0) execute(dso_mtp_verify_greedy, &p);
  for (int64_t r = 0; r < p.in.rows; r++)
    expect(p.in.next[r] >= 0, op, "：第 ", r, " 行第 ", -1 - p.in.next[r],
           " 个位置的 logits 含 NaN。");
  return {v.accepted, v.next};
}

Verified mtp_verify_sample(const Tensor &probs, const Tensor &drafts,
                           const std::optional<Tensor> &draft_len,
                           const std::optional<Tensor> &draft_probs, const Tensor &uniform) {
  const char *op = "mtp_verify_sample";
  const dso_dtype type = float_dtype(op, "probs", probs);
  Verification v = verification(op, "probs", probs, drafts, draft_len);
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
  dso_mtp_verify_sample_params p{v.rows, !draft_probs.has_value(), positions_of(target, type),
                                 positions_of(proposal, proposal_type),
                                 static_cast<const double *>(u.const_data_ptr())};
  if (rows > 0) execute(dso_mtp_verify_sample, &p);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = -1 - p.in.next[r];
    if (at < 0) continue;
    expect(p.in.accepted[r] != DSO_MTP_BAD_TARGET, op, "：第 ", r, " 行第 ", at,
           " 个位置的分布不对：probs 应为非负的有限数且不全是 0（draft_probs 应为有限数）。");
    expect(false, op, "：第 ", r, " 行第 ", at,
           " 个草稿的 draft_probs 应为正的有限数：草稿应是按 draft_probs 抽出的。");
  }
  return {v.accepted, v.next};
}

Tensor mtp_input(const Tensor &embedding, const Tensor &hidden, const Tensor &embedding_norm,
                 const Tensor &hidden_norm, const Tensor &weight, double eps) {
  const char *op = "mtp_input";
  expect(embedding.dim() >= 1, op, "：embedding 至少要有 1 维。");
  const dso_dtype type = float_dtype(op, "embedding", embedding),
                  w_type = float_dtype(op, "weight", weight);
  expect(shape_of(hidden) == shape_of(embedding), op, "：hidden 的形状应与 embedding ",
         shape_of(embedding), " 相同，实际是 ", shape_of(hidden), "。");
  expect_type(op, "hidden", hidden, embedding.scalar_type());
  const int64_t k = embedding.size(embedding.dim() - 1);
  expect_shape(op, "embedding_norm", embedding_norm, {k});
  expect_shape(op, "hidden_norm", hidden_norm, {k});
  expect_shape(op, "weight", weight, {-1, 2 * k});
  const int64_t n = weight.size(0);
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

// 候选的词元：检查范围，返回连续的副本。
Tensor candidates(const char *op, const Tensor &given, int64_t vocab) {
  expect_shape(op, "vocabulary", given, {-1});
  expect_type(op, "vocabulary", given, ScalarType::Long);
  expect(given.size(0) > 0, op, "：vocabulary 至少要有一个词元。");
  Tensor ids = torch::stable::contiguous(given);
  for (int64_t i = 0; i < ids.size(0); i++)
    expect(integers(ids)[i] >= 0 && integers(ids)[i] < vocab, op, "：vocabulary[", i, "] 应在 [0, ",
           vocab, ") 内，实际是 ", integers(ids)[i], "。");
  return ids;
}

Tensor mtp_draft_head(const Tensor &hidden, const Tensor &weight, const std::optional<Tensor> &bias,
                      const std::optional<Tensor> &vocabulary) {
  const char *op = "mtp_draft_head";
  expect_shape(op, "hidden", hidden, {-1, -1});
  const int64_t rows = hidden.size(0), k = hidden.size(1);
  expect_shape(op, "weight", weight, {-1, k});
  const int64_t vocab = weight.size(0);
  expect(vocab > 0, op, "：weight 至少要有一行。");
  const dso_dtype type = float_dtype(op, "hidden", hidden),
                  w_type = float_dtype(op, "weight", weight);
  if (bias) {
    expect_shape(op, "bias", *bias, {vocab});
    expect_type(op, "bias", *bias, weight.scalar_type());
  }
  Tensor x = row_major(hidden), w = row_major(weight),
         b = bias ? torch::stable::contiguous(*bias) : w;
  std::optional<Tensor> ids;
  if (vocabulary) ids = candidates(op, *vocabulary, vocab);
  Tensor token = torch::stable::new_empty(hidden, {rows}, ScalarType::Long);
  dso_mtp_draft_head_params p{rows,
                              k,
                              ids ? ids->size(0) : vocab,
                              mat_of(x, type),
                              mat_of(w, w_type),
                              bias ? b.const_data_ptr() : nullptr,
                              ids ? integers(*ids) : nullptr,
                              static_cast<int64_t *>(token.mutable_data_ptr())};
  if (rows > 0) execute(dso_mtp_draft_head, &p);
  for (int64_t r = 0; r < rows; r++) expect(p.token[r] >= 0, op, "：第 ", r, " 行的分数含 NaN。");
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
