// mtp_*、sample_* 的参数检查（CPU 与 CUDA 的绑定共用）：形状与类型总能查；内容只在主机读得到时查（名字以
// _content 结尾的，以及 expect_verified 等看结果的）。
#pragma once

#include <cmath>

#include "binding.h"

namespace dso {

// 三维 [R, P, V] 的视图；最后一维步长应为 1（先 row_major）。
inline dso_positions positions_of(const Tensor &t, dso_dtype dtype) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), dtype};
}

inline const int64_t *integers(const Tensor &t) {
  return static_cast<const int64_t *>(t.const_data_ptr());
}

inline int64_t *mutable_integers(const Tensor &t) {
  return static_cast<int64_t *>(t.mutable_data_ptr());
}

inline void expect_vocab(const char *op, const char *name, const Tensor &t) {
  const int64_t vocab = t.size(t.dim() - 1);
  expect(vocab > 0 && vocab <= INT32_MAX, op, "：", name, " 的最后一维（词表大小）应在 1 与 ",
         INT32_MAX, " 之间，实际是 ", vocab, "。");
}

// ---- 均匀随机数 ----

// 换成连续的 fp64。
inline Tensor uniform_doubles(const char *op, const Tensor &t) {
  expect(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op,
         "：uniform 的类型应为 float32 或 float64，实际是 ", dtype_name(t.scalar_type()), "。");
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Double));
}

inline void expect_uniform_content(const char *op, const Tensor &wide) {
  const auto *u = static_cast<const double *>(wide.const_data_ptr());
  for (int64_t i = 0; i < wide.numel(); i++)
    expect(u[i] >= 0.0 && u[i] < 1.0, op, "：uniform 应在 [0, 1) 内，第 ", i, " 个是 ", u[i], "。");
}

// ---- mtp_verify_* ----

// 一次核对的公共部分；各张量要活到执行结束。length 没有给出时是空的。
struct Verification {
  Tensor draft;
  std::optional<Tensor> length;
  Tensor accepted, next;
  dso_mtp_rows rows;
};

// target 是 logits 或 probs，名字为 name；rows.draft_len 在没有给出 draft_len 时是 NULL。
inline Verification verification(const char *op, const char *name, const Tensor &target,
                                 const Tensor &drafts, const std::optional<Tensor> &draft_len) {
  expect_shape(op, "drafts", drafts, {-1, -1});
  expect_type(op, "drafts", drafts, ScalarType::Long);
  const int64_t rows = drafts.size(0), width = drafts.size(1);
  expect_shape(op, name, target, {rows, width + 1, -1});
  expect_vocab(op, name, target);
  Verification v;
  if (draft_len) {
    expect_shape(op, "draft_len", *draft_len, {rows});
    expect_type(op, "draft_len", *draft_len, ScalarType::Long);
    v.length = torch::stable::contiguous(*draft_len);
  }
  v.draft = torch::stable::contiguous(drafts);
  v.accepted = torch::stable::new_empty(v.draft, {rows});
  v.next = torch::stable::new_empty(v.draft, {rows});
  v.rows = {rows,
            width,
            target.size(2),
            integers(v.draft),
            v.length ? integers(*v.length) : nullptr,
            mutable_integers(v.accepted),
            mutable_integers(v.next)};
  return v;
}

inline void expect_drafts_content(const char *op, const dso_mtp_rows &in) {
  for (int64_t r = 0; r < in.rows; r++) {
    const int64_t length = in.draft_len ? in.draft_len[r] : in.drafts;
    expect(length >= 0 && length <= in.drafts, op, "：draft_len[", r, "] 应在 0 与草稿个数 ",
           in.drafts, " 之间，实际是 ", length, "。");
  }
  for (int64_t r = 0; r < in.rows; r++)
    for (int64_t i = 0; i < (in.draft_len ? in.draft_len[r] : in.drafts); i++) {
      const int64_t token = in.draft[r * in.drafts + i];
      expect(token >= 0 && token < in.vocab, op, "：drafts[", r, ", ", i, "] 应在 [0, ", in.vocab,
             ") 内，实际是 ", token, "。");
    }
}

inline void expect_greedy_verified(const char *op, const dso_mtp_rows &in) {
  for (int64_t r = 0; r < in.rows; r++)
    expect(in.next[r] >= 0, op, "：第 ", r, " 行第 ", -1 - in.next[r], " 个位置的 logits 含 NaN。");
}

inline void expect_sample_verified(const char *op, const dso_mtp_rows &in) {
  for (int64_t r = 0; r < in.rows; r++) {
    const int64_t at = -1 - in.next[r];
    if (at < 0) continue;
    expect(in.accepted[r] != DSO_MTP_BAD_TARGET, op, "：第 ", r, " 行第 ", at,
           " 个位置的分布不对：probs 应为非负的有限数且不全是 0（draft_probs 应为有限数）。");
    expect(false, op, "：第 ", r, " 行第 ", at,
           " 个草稿的 draft_probs 应为正的有限数：草稿应是按 draft_probs 抽出的。");
  }
}

// ---- mtp_input ----

inline void check_mtp_input(const Tensor &embedding, const Tensor &hidden,
                            const Tensor &embedding_norm, const Tensor &hidden_norm,
                            const Tensor &weight) {
  const char *op = "mtp_input";
  expect(embedding.dim() >= 1, op, "：embedding 至少要有 1 维。");
  float_dtype(op, "embedding", embedding);
  float_dtype(op, "weight", weight);
  expect(shape_of(hidden) == shape_of(embedding), op, "：hidden 的形状应与 embedding ",
         shape_of(embedding), " 相同，实际是 ", shape_of(hidden), "。");
  expect_type(op, "hidden", hidden, embedding.scalar_type());
  const int64_t k = embedding.size(embedding.dim() - 1);
  expect_shape(op, "embedding_norm", embedding_norm, {k});
  expect_shape(op, "hidden_norm", hidden_norm, {k});
  expect_shape(op, "weight", weight, {-1, 2 * k});
  float_dtype(op, "embedding_norm", embedding_norm);
  float_dtype(op, "hidden_norm", hidden_norm);
}

// ---- mtp_draft_head ----

inline void check_draft_head(const Tensor &hidden, const Tensor &weight,
                             const std::optional<Tensor> &bias,
                             const std::optional<Tensor> &vocabulary) {
  const char *op = "mtp_draft_head";
  expect_shape(op, "hidden", hidden, {-1, -1});
  expect_shape(op, "weight", weight, {-1, hidden.size(1)});
  expect(weight.size(0) > 0, op, "：weight 至少要有一行。");
  float_dtype(op, "hidden", hidden);
  float_dtype(op, "weight", weight);
  if (bias) {
    expect_shape(op, "bias", *bias, {weight.size(0)});
    expect_type(op, "bias", *bias, weight.scalar_type());
  }
  if (!vocabulary) return;
  expect_shape(op, "vocabulary", *vocabulary, {-1});
  expect_type(op, "vocabulary", *vocabulary, ScalarType::Long);
  expect(vocabulary->size(0) > 0, op, "：vocabulary 至少要有一个词元。");
}

inline void expect_vocabulary_content(const Tensor &ids, int64_t vocab) {
  for (int64_t i = 0; i < ids.size(0); i++)
    expect(integers(ids)[i] >= 0 && integers(ids)[i] < vocab, "mtp_draft_head：vocabulary[", i,
           "] 应在 [0, ", vocab, ") 内，实际是 ", integers(ids)[i], "。");
}

inline void expect_drafted(const Tensor &token) {
  for (int64_t r = 0; r < token.size(0); r++)
    expect(integers(token)[r] >= 0, "mtp_draft_head：第 ", r, " 行的分数含 NaN。");
}

// ---- sample_* ----

struct FilterOptions {
  double temperature;
  int64_t top_k;
  double top_p, min_p, penalty;
};

inline void check_options(const char *op, const FilterOptions &o) {
  expect(std::isfinite(o.temperature) && static_cast<float>(o.temperature) > 0, op,
         "：temperature 应为正的有限数，实际是 ", o.temperature, "。");
  expect(o.top_k >= 0, op, "：top_k 应不小于 0（0 为不用），实际是 ", o.top_k, "。");
  expect(o.top_p >= 0 && o.top_p <= 1, op, "：top_p 应在 0 与 1 之间，实际是 ", o.top_p, "。");
  expect(o.min_p >= 0 && o.min_p <= 1, op, "：min_p 应在 0 与 1 之间，实际是 ", o.min_p, "。");
  expect(std::isfinite(o.penalty) && static_cast<float>(o.penalty) > 0, op,
         "：repetition_penalty 应为正的有限数，实际是 ", o.penalty, "。");
}

// 一次处理：除 probs、fault 外都填好的参数与它用到的张量。
struct Filtering {
  Tensor logits, tokens;
  std::optional<Tensor> length;
  dso_sample_filter_params p;
};

// 没有给出 token_len 时 p.token_len 是 NULL。
inline Filtering filtering(const Tensor &logits, const std::optional<Tensor> &token_ids,
                           const std::optional<Tensor> &token_len, const FilterOptions &o) {
  const char *op = "sample_filter";
  expect_shape(op, "logits", logits, {-1, -1, -1});
  const dso_dtype type = float_dtype(op, "logits", logits);
  expect_vocab(op, "logits", logits);
  check_options(op, o);
  const int64_t rows = logits.size(0), positions = logits.size(1);
  Filtering f;
  f.p = {};
  if (token_ids) {
    expect_shape(op, "token_ids", *token_ids, {rows, -1});
    expect_type(op, "token_ids", *token_ids, ScalarType::Long);
    f.tokens = row_major(*token_ids);
    f.p.token = integers(f.tokens), f.p.token_rs = f.tokens.stride(0);
    f.p.tokens = f.tokens.size(1);
    if (token_len) {
      expect_shape(op, "token_len", *token_len, {rows, positions});
      expect_type(op, "token_len", *token_len, ScalarType::Long);
      f.length = torch::stable::contiguous(*token_len);
      f.p.token_len = integers(*f.length);
    }
  }
  expect(token_ids || o.penalty == 1.0, op, "：repetition_penalty 不为 1 时应给出 token_ids。");
  f.logits = row_major(logits);
  f.p.rows = rows, f.p.positions = positions, f.p.vocab = logits.size(2);
  f.p.logits = positions_of(f.logits, type);
  f.p.penalty = static_cast<float>(o.penalty);
  f.p.temperature = static_cast<float>(o.temperature);
  f.p.min_p = static_cast<float>(o.min_p);
  f.p.top_k = o.top_k, f.p.top_p = o.top_p;
  return f;
}

inline void expect_token_len_content(const dso_sample_filter_params &p) {
  if (!p.token_len) return;
  for (int64_t i = 0; i < p.rows * p.positions; i++)
    expect(p.token_len[i] >= 0 && p.token_len[i] <= p.tokens, "sample_filter：token_len[",
           i / p.positions, ", ", i % p.positions, "] 应在 0 与 token_ids 的宽 ", p.tokens,
           " 之间，实际是 ", p.token_len[i], "。");
}

inline void expect_filtered(const dso_sample_filter_params &p) {
  for (int64_t i = 0; i < p.rows * p.positions; i++)
    expect(p.fault[i] == 0, "sample_filter：第 ", i / p.positions, " 行第 ", i % p.positions,
           " 个位置的 logits（惩罚、除以温度之后）含 NaN 或 +inf，或者全是 -inf。");
}

inline void check_sample_tokens(const Tensor &probs, const Tensor &uniform) {
  const char *op = "sample_tokens";
  expect_shape(op, "probs", probs, {-1, -1});
  float_dtype(op, "probs", probs);
  expect_vocab(op, "probs", probs);
  expect_shape(op, "uniform", uniform, {probs.size(0)});
}

inline void expect_sampled(const Tensor &token) {
  for (int64_t r = 0; r < token.size(0); r++)
    expect(integers(token)[r] >= 0, "sample_tokens：probs 的第 ", r,
           " 行应为非负的有限数且不全是 0。");
}

}  // namespace dso
