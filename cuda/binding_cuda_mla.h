// 注意力各算子的 CUDA 绑定共用：检查参数、spans 送到设备、计算用的类型。
#pragma once

#include "binding_cuda.h"
#include "binding_mla.h"

namespace dso {

// 填写参数与 spans；返回一个 span 至多多少个查询。
inline int64_t fill_device(const char *op, MlaInputs &m, const Tensor &q, const Tensor &latent,
                           const Tensor &rope_keys, const std::optional<Tensor> &scale,
                           const Tensor &kv_b, const Tensor &spans,
                           const std::optional<Tensor> &kv_mask, const MlaOptions &options) {
  fill(op, m, q, latent, rope_keys, scale, kv_b, kv_mask, options);
  expect_spans(op, spans);
  expect_device(op, "latent", latent, q);
  expect_device(op, "rope", rope_keys, q);
  expect_device(op, "kv_b_weight", kv_b, q);
  if (scale) expect_device(op, "scale", *scale, q);
  if (kv_mask) expect_device(op, "kv_mask", *kv_mask, q);
  dso_mla_inputs &in = m.in;
  expect(in.b * in.t * in.heads <= INT32_MAX && in.s <= INT32_MAX, op,
         "：B * T * H 与 S 都应小于 2^31，实际是 ", in.b * in.t * in.heads, " 与 ", in.s, "。");
  m.spans = torch::stable::contiguous(spans);
  in.n_spans = spans.size(0);
  int64_t longest = in.t;
  if (m.spans.is_cpu()) {
    const auto *list = static_cast<const dso_span *>(m.spans.const_data_ptr());
    check_spans(op, in, list, in.n_spans);
    longest = 0;
    for (int64_t i = 0; i < in.n_spans; i++)
      longest = std::max(longest, list[i].q_end - list[i].q_begin);
    m.list.assign(list, list + in.n_spans);
    m.spans = torch::stable::to(m.spans, q.device());
  } else {
    expect_device(op, "spans", m.spans, q);
  }
  in.spans = static_cast<const dso_span *>(m.spans.const_data_ptr());
  return longest;
}

// spans 是否盖住全部查询而且都有键可看；在设备上的不知道，当作没有。
inline bool all_covered(const MlaInputs &m) {
  int64_t covered = 0;
  for (const dso_span &s : m.list)
    if (s.kv_begin < s.kv_end) covered += s.q_end - s.q_begin;
  return covered == m.in.b * m.in.t;
}

// 计算用的类型：全是同一种 16 位就用它（潜变量可以是 int8），否则 fp32。
inline ScalarType compute_type(const dso_mla_inputs &in) {
  const bool same = in.q_dtype == in.rope_dtype && in.q_dtype == in.kv_b.dtype &&
                    (in.latent_dtype == in.q_dtype || in.latent_dtype == DSO_I8);
  if (!same) return ScalarType::Float;
  return in.q_dtype == DSO_BF16  ? ScalarType::BFloat16
         : in.q_dtype == DSO_F16 ? ScalarType::Half
                                 : ScalarType::Float;
}

}  // namespace dso
