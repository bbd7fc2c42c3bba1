// MLA 各算子的 CUDA 绑定共用：填写参数与 spans；吸收、核、W_UV 三步的解码。
//
// spans、offsets、block_table 在 CPU 上时先检查内容再送到设备；已在设备上时不读（读要等 GPU）：offsets 由写缓存的核断言，
// spans、block_table 由调用者保证。
#pragma once

#include "binding_cuda.h"
#include "binding_mla.h"

namespace dso {

struct DeviceInputs : MlaInputs {
  int64_t longest = 0;   // 一个 span 至多多少个查询
  bool covered = false;  // 全部查询都在 span 里，而且有键可看；不知道的当作没有
};

// 检查并填写 spans 以外的参数。
inline void fill_device(const char *op, DeviceInputs &m, const Tensor &q, const Tensor &latent,
                        const Tensor &rope_keys, const std::optional<Tensor> &scale,
                        const Tensor &kv_b, const std::optional<Tensor> &kv_mask,
                        const MlaOptions &options,
                        const std::optional<Tensor> &block_table = std::nullopt) {
  fill(op, m, q, latent, rope_keys, scale, kv_b, kv_mask, options, block_table);
  expect_device(op, "latent", latent, q);
  expect_device(op, "rope", rope_keys, q);
  expect_device(op, "kv_b_weight", kv_b, q);
  if (scale) expect_device(op, "scale", *scale, q);
  if (kv_mask) expect_device(op, "kv_mask", *kv_mask, q);
  if (block_table && !on_host(*block_table)) expect_device(op, "block_table", *block_table, q);
  const dso_mla_inputs &in = m.in;
  expect(in.b * in.t * in.heads <= INT32_MAX && in.s <= INT32_MAX, op,
         "：B * T * H 与 S 都应小于 2^31，实际是 ", in.b * in.t * in.heads, " 与 ", in.s, "。");
}

inline void set_spans(DeviceInputs &m) {
  m.in.n_spans = m.spans.size(0);
  m.in.spans = static_cast<const dso_span *>(m.spans.const_data_ptr());
}

// 检查 spans 与它们要读的页，都送到设备上。
inline void use_device_spans(const char *op, DeviceInputs &m, const Tensor &spans) {
  expect_spans(op, spans);
  m.spans = torch::stable::contiguous(spans);
  m.longest = m.in.t;
  if (on_host(m.spans)) {
    const auto *list = static_cast<const dso_span *>(m.spans.const_data_ptr());
    check_spans(op, m.in, list, spans.size(0));
    if (m.in.page_size > 0 && on_host(m.pages)) check_pages(op, m, list, spans.size(0));
    int64_t covered = 0;
    m.longest = 0;
    for (int64_t i = 0; i < spans.size(0); i++) {
      const int64_t count = list[i].q_end - list[i].q_begin;
      m.longest = std::max(m.longest, count);
      if (list[i].kv_begin < list[i].kv_end) covered += count;
    }
    m.covered = covered == m.in.b * m.in.t;
    m.spans = torch::stable::to(m.spans, m.q.device());
  } else {
    expect_device(op, "spans", m.spans, m.q);
  }
  set_spans(m);
  if (m.in.page_size == 0) return;
  m.pages = torch::stable::to(m.pages, m.q.device());  // 送过去的各行相连，不再是原来的步长
  m.in.pages = static_cast<const int32_t *>(m.pages.const_data_ptr());
  m.in.pages_bs = m.pages.stride(0);
}

// offsets [B]：在 CPU 上就检查；返回设备上的。
inline Tensor device_offsets(const char *op, const Tensor &offsets, int64_t t,
                             const Tensor &latent_cache) {
  Tensor starts = torch::stable::contiguous(offsets);
  if (!on_host(starts)) {
    expect_device(op, "offsets", starts, latent_cache);
    return starts;
  }
  check_offsets(op, starts, t, latent_cache.size(1));
  return torch::stable::to(starts, latent_cache.device());
}

inline void rotate(const char *op, const Tensor &x, Tensor &y, const Tensor &cos, const Tensor &sin,
                   const Angles &angles, const Turn &turn) {
  expect_device(op, "cos", cos, x);
  expect_device(op, "sin", sin, x);
  dso_rope_params p = rope_params(op, x, y, cos, sin, angles, turn);
  const cudaError_t error = dso_cuda_rope(&p, Launch(x).stream());
  expect(error != cudaErrorInvalidValue, op, "：x 的最后一维 ", x.size(3),
         " 太大：CUDA 上至多 2048（各行按 16 字节对齐时 8192）。");
  check(op, error);
}

// 计算用的类型：全是同一种 16 位就用它（潜变量可以是量化的），否则 fp32。
inline ScalarType compute_type(const dso_mla_inputs &in) {
  const bool same = in.q_dtype == in.rope_dtype && in.q_dtype == in.kv_b.dtype &&
                    (in.latent_dtype == in.q_dtype || dso_quantized_latent(in.latent_dtype));
  if (!same) return ScalarType::Float;
  return in.q_dtype == DSO_BF16  ? ScalarType::BFloat16
         : in.q_dtype == DSO_F16 ? ScalarType::Half
                                 : ScalarType::Float;
}

// 返回 [B, T, H, dv]，与 q 同类型。
Tensor decode(const char *op, const DeviceInputs &m);

}  // namespace dso
