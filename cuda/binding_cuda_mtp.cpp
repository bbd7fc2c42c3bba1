// mtp_*、sample_* 的 CUDA 绑定：检查形状与类型（与 CPU 同样的消息），分配输出，在当前流上启动。
//
// 草稿、长度、随机数与结果都在设备上，读它们要等 GPU，所以不读：CPU 上会报错的内容（NaN、越界……）由核记在结果里
// （见各算子的文档），读结果的地方再报错。on_host 的那些检查只在主机模拟里有。
#include "binding_mtp.h"

#include <tuple>

#include "binding_cuda.h"

namespace dso {
namespace {

using Verified = std::tuple<Tensor, Tensor>;

void expect_one_device(const char *op, const Tensor &like,
                       std::initializer_list<std::pair<const char *, const Tensor *>> given) {
  for (const auto &[name, tensor] : given)
    if (tensor) expect_device(op, name, *tensor, like);
}

const Tensor *pointer(const std::optional<Tensor> &t) { return t ? &*t : nullptr; }

Verified mtp_verify_greedy(const Tensor &logits, const Tensor &drafts,
                           const std::optional<Tensor> &draft_len) {
  const char *op = "mtp_verify_greedy";
  const dso_dtype type = float_dtype(op, "logits", logits);
  Verification v = verification(op, "logits", logits, drafts, draft_len);
  expect_one_device(op, logits, {{"drafts", &drafts}, {"draft_len", pointer(draft_len)}});
  if (on_host(drafts)) expect_drafts_content(op, v.rows);
  Tensor rows = row_major(logits);
  dso_mtp_verify_greedy_params p{v.rows, positions_of(rows, type)};
  Tensor scratch = scratch_of(logits, dso_cuda_mtp_verify_greedy_scratch(&p.in));
  check(op, dso_cuda_mtp_verify_greedy(&p, scratch.mutable_data_ptr(), Launch(logits).stream()));
  if (on_host(v.next)) expect_greedy_verified(op, p.in);
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
  expect_one_device(op, probs,
                    {{"drafts", &drafts},
                     {"draft_len", pointer(draft_len)},
                     {"draft_probs", pointer(draft_probs)},
                     {"uniform", &uniform}});
  if (on_host(drafts)) expect_drafts_content(op, v.rows);
  Tensor u = uniform_doubles(op, uniform);
  if (on_host(u)) expect_uniform_content(op, u);
  dso_mtp_verify_sample_params p{v.rows, !draft_probs.has_value(), positions_of(target, type),
                                 positions_of(proposal, proposal_type),
                                 static_cast<const double *>(u.const_data_ptr())};
  Tensor scratch = scratch_of(probs, dso_cuda_mtp_verify_sample_scratch(&p.in));
  check(op, dso_cuda_mtp_verify_sample(&p, scratch.mutable_data_ptr(), Launch(probs).stream()));
  if (on_host(v.next)) expect_sample_verified(op, p.in);
  return {v.accepted, v.next};
}

Tensor mtp_input(const Tensor &embedding, const Tensor &hidden, const Tensor &embedding_norm,
                 const Tensor &hidden_norm, const Tensor &weight, double eps) {
  const char *op = "mtp_input";
  check_mtp_input(embedding, hidden, embedding_norm, hidden_norm, weight);
  expect_one_device(op, embedding,
                    {{"hidden", &hidden},
                     {"embedding_norm", &embedding_norm},
                     {"hidden_norm", &hidden_norm},
                     {"weight", &weight}});
  const dso_dtype type = float_dtype(op, "embedding", embedding);
  const int64_t k = embedding.size(embedding.dim() - 1);
  Tensor e = as_rows(embedding), h = as_rows(hidden),
         e_norm = torch::stable::contiguous(embedding_norm),
         h_norm = torch::stable::contiguous(hidden_norm);
  Tensor rows = torch::stable::new_empty(embedding, sizes_with_last(embedding, 2 * k));
  dso_mtp_input_params p = {};
  p.m = rows_of(embedding), p.k = k, p.eps = static_cast<float>(eps);
  p.embedding = mat_of(e, type), p.hidden = mat_of(h, type);
  p.embedding_norm = e_norm.const_data_ptr(), p.hidden_norm = h_norm.const_data_ptr();
  p.embedding_norm_dtype = float_dtype(op, "embedding_norm", embedding_norm);
  p.hidden_norm_dtype = float_dtype(op, "hidden_norm", hidden_norm);
  check(op, dso_cuda_mtp_input(&p, rows.mutable_data_ptr(), Launch(embedding).stream()));
  return linear(rows, weight, std::nullopt);
}

Tensor mtp_draft_head(const Tensor &hidden, const Tensor &weight, const std::optional<Tensor> &bias,
                      const std::optional<Tensor> &vocabulary) {
  const char *op = "mtp_draft_head";
  check_draft_head(hidden, weight, bias, vocabulary);
  expect_one_device(
      op, hidden,
      {{"weight", &weight}, {"bias", pointer(bias)}, {"vocabulary", pointer(vocabulary)}});
  const int64_t rows = hidden.size(0), vocab = weight.size(0);
  Tensor x = row_major(hidden), w = row_major(weight),
         b = bias ? torch::stable::contiguous(*bias) : w;
  std::optional<Tensor> ids;
  if (vocabulary) {
    ids = torch::stable::contiguous(*vocabulary);
    if (on_host(*ids)) expect_vocabulary_content(*ids, vocab);
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
  Tensor scratch = scratch_of(hidden, dso_cuda_mtp_draft_head_scratch(&p));
  check(op, dso_cuda_mtp_draft_head(&p, scratch.mutable_data_ptr(), Launch(hidden).stream()));
  if (on_host(token)) expect_drafted(token);
  return token;
}

Tensor sample_filter(const Tensor &logits, const std::optional<Tensor> &token_ids,
                     const std::optional<Tensor> &token_len, double temperature, int64_t top_k,
                     double top_p, double min_p, double repetition_penalty) {
  const char *op = "sample_filter";
  Filtering f = filtering(logits, token_ids, token_len,
                          {temperature, top_k, top_p, min_p, repetition_penalty});
  expect_one_device(op, logits,
                    {{"token_ids", pointer(token_ids)}, {"token_len", pointer(token_len)}});
  dso_sample_filter_params &p = f.p;
  if (f.length && on_host(*f.length)) expect_token_len_content(p);
  Tensor probs =
      torch::stable::new_empty(logits, {p.rows, p.positions, p.vocab}, ScalarType::Float);
  Tensor fault = torch::stable::new_empty(logits, {p.rows, p.positions}, ScalarType::Long);
  p.probs = static_cast<float *>(probs.mutable_data_ptr()), p.fault = mutable_integers(fault);
  Tensor scratch = scratch_of(logits, dso_cuda_sample_filter_scratch(&p));
  check(op, dso_cuda_sample_filter(&p, scratch.mutable_data_ptr(), Launch(logits).stream()));
  if (on_host(fault)) expect_filtered(p);
  return probs;
}

Tensor sample_tokens(const Tensor &probs, const Tensor &uniform) {
  const char *op = "sample_tokens";
  check_sample_tokens(probs, uniform);
  expect_one_device(op, probs, {{"uniform", &uniform}});
  const int64_t rows = probs.size(0);
  Tensor u = uniform_doubles(op, uniform), x = row_major(probs),
         token = torch::stable::new_empty(probs, {rows}, ScalarType::Long);
  if (on_host(u)) expect_uniform_content(op, u);
  dso_sample_tokens_params p{rows, probs.size(1), mat_of(x, float_dtype(op, "probs", probs)),
                             static_cast<const double *>(u.const_data_ptr()),
                             mutable_integers(token)};
  Tensor scratch = scratch_of(probs, dso_cuda_sample_tokens_scratch(&p));
  check(op, dso_cuda_sample_tokens(&p, scratch.mutable_data_ptr(), Launch(probs).stream()));
  if (on_host(token)) expect_sampled(token);
  return token;
}

}  // namespace
}  // namespace dso

DSO_DEVICE_LIBRARY(m) {
  m.impl("mtp_draft_head", TORCH_BOX(&dso::mtp_draft_head));
  m.impl("mtp_verify_greedy", TORCH_BOX(&dso::mtp_verify_greedy));
  m.impl("mtp_verify_sample", TORCH_BOX(&dso::mtp_verify_sample));
  m.impl("mtp_input", TORCH_BOX(&dso::mtp_input));
  m.impl("sample_filter", TORCH_BOX(&dso::sample_filter));
  m.impl("sample_tokens", TORCH_BOX(&dso::sample_tokens));
}
