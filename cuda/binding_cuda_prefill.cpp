// mla_prefill 及其反向的 CUDA 绑定。
//
// 头分成几组：一组的 K、V 由矩阵乘（cuBLAS）从潜变量展开，算完注意力就丢，所以峰值不随头数增长。
#include <algorithm>
#include <tuple>

#include "binding_cuda_mla.h"

namespace dso {
namespace {

int64_t heads_per_group(const dso_mla_inputs &in, ScalarType type) {
  const int64_t size = type == ScalarType::Float ? 4 : 2;
  const int64_t head = std::max<int64_t>(1, in.b * in.s * (in.nope_dim + in.v_dim) * size);
  return std::clamp<int64_t>(expand_limit() / head, 1, in.heads);
}

// 计算用的类型：矩阵单元做不了的形状按 fp32；fp32 也放不进共享内存的（维度上千）报错。
ScalarType prefill_type(const char *op, const dso_mla_inputs &in, bool backward) {
  const ScalarType type = compute_type(in);
  const dso_dtype code = type == ScalarType::Float ? DSO_F32 : in.q_dtype;
  if (dso_cuda_mla_prefill_fits(&in, code, backward)) return type;
  expect(dso_cuda_mla_prefill_fits(&in, DSO_F32, backward), op, "：维度太大，放不进共享内存：dn ",
         in.nope_dim, "、dr ", in.rope_dim, "、dv ", in.v_dim, "。");
  return ScalarType::Float;
}

// [B * S, r]：可以直接用就是原来的张量；clean 时没人看的槽位为 0。
Tensor latent_rows(const char *op, DeviceInputs &m, ScalarType type, bool clean,
                   const Launch &launch) {
  const dso_mla_inputs &in = m.in;
  if (m.latent.scalar_type() == type && !clean)
    return torch::stable::reshape(m.latent, {in.b * in.s, in.rank});
  Tensor rows = torch::stable::new_zeros(m.q, {in.b * in.s, in.rank}, type);
  check(op, dso_cuda_mla_latents(&in, rows.mutable_data_ptr(), float_dtype(op, "latent", rows),
                                 launch.stream()));
  return rows;
}

// 从第 first 个头起 heads 个头的上投影权重 [heads * (dn + dv), r]。
Tensor group_weight(const DeviceInputs &m, ScalarType type, int64_t first, int64_t heads) {
  const int64_t width = m.in.nope_dim + m.in.v_dim;
  Tensor part = m.kv_b;
  part = torch::stable::narrow(part, 0, first * width, heads * width);
  return to_type(part, type);
}

// 核不写没有键可看的查询：rows [B, T, H, ...] 写 0，lse 写 -inf。
void clear_unseen(const char *op, const DeviceInputs &m, const Tensor &rows, float *lse,
                  const Launch &launch) {
  if (m.covered) return;
  dso_cuda_mla_unseen_params p{m.in, rows.mutable_data_ptr(), m.in.heads * rows.size(3),
                               float_dtype(op, "q", rows), lse};
  check(op, dso_cuda_mla_clear_unseen(&p, launch.stream()));
}

std::tuple<Tensor, Tensor> mla_prefill(const Tensor &q, const Tensor &latent,
                                       const Tensor &rope_keys, const std::optional<Tensor> &scale,
                                       const Tensor &kv_b, const Tensor &spans,
                                       const std::optional<Tensor> &kv_mask, double softmax_scale,
                                       int64_t v_head_dim, bool causal) {
  const char *op = "mla_prefill";
  DeviceInputs m;
  fill_device(op, m, q, latent, rope_keys, scale, kv_b, kv_mask,
              {softmax_scale, v_head_dim, causal});
  use_device_spans(op, m, spans);
  const dso_mla_inputs &in = m.in;
  Tensor out = torch::stable::new_empty(q, {in.b, in.t, in.heads, in.v_dim});
  Tensor lse = torch::stable::new_empty(q, {in.b, in.t, in.heads}, ScalarType::Float);
  const Launch launch(q);
  clear_unseen(op, m, out, static_cast<float *>(lse.mutable_data_ptr()), launch);
  if (in.b * in.t == 0 || in.s == 0) return {out, lse};
  const ScalarType type = prefill_type(op, in, false);
  const int64_t group = heads_per_group(in, type), width = in.nope_dim + in.v_dim;
  // 被遮住的槽位可能是没有初始化的 NaN：展开之前清零，核就不必逐个避开。
  Tensor rows = latent_rows(op, m, type, in.kv_mask != nullptr, launch);
  Tensor kv = torch::stable::new_empty(q, {in.b * in.s * group * width}, type);
  for (int64_t first = 0; first < in.heads; first += group) {
    const int64_t heads = std::min(group, in.heads - first);
    Tensor part = torch::stable::view(torch::stable::narrow(kv, 0, 0, in.b * in.s * heads * width),
                                      {in.b * in.s, heads * width});
    Tensor weight = group_weight(m, type, first, heads);
    mm_into(part, rows, torch::stable::transpose(weight, 0, 1));
    dso_cuda_mla_prefill_params p{in,
                                  part.const_data_ptr(),
                                  first,
                                  heads,
                                  float_dtype(op, "q", part),
                                  out.mutable_data_ptr(),
                                  in.q_dtype,
                                  static_cast<float *>(lse.mutable_data_ptr())};
    check(op, dso_cuda_mla_prefill(&p, launch.stream()));
  }
  return {out, lse};
}

struct Gradients {
  Tensor dq, dlatent, drope, dkv_b;
};

// 一组头的反向：dq 直接写好；dlatent、drope 各组累加（fp32，只有一组时就是它）；dkv_b 是这组头的那些行。
void backward_group(const char *op, DeviceInputs &m, dso_cuda_mla_prefill_backward_params &p,
                    const Tensor &rows, ScalarType type, Gradients &grads, const Launch &launch) {
  const dso_mla_inputs &in = m.in;
  const int64_t width = in.nope_dim + in.v_dim, heads = p.in.heads, slots = in.b * in.s;
  Tensor weight = group_weight(m, type, p.in.first_head, heads);
  Tensor kv = torch::stable::new_empty(m.q, {slots, heads * width}, type);
  mm_into(kv, rows, torch::stable::transpose(weight, 0, 1));
  Tensor dkv = torch::stable::new_empty(m.q, {slots, heads * width}, type);
  Tensor drope = torch::stable::new_empty(m.q, {slots, heads, in.rope_dim}, ScalarType::Float);
  p.in.kv = kv.const_data_ptr(), p.in.dtype = float_dtype(op, "q", kv);
  p.dkv = dkv.mutable_data_ptr(), p.drope = static_cast<float *>(drope.mutable_data_ptr());
  check(op, dso_cuda_mla_prefill_backward(&p, launch.stream()));
  const bool first = p.in.first_head == 0;
  const int64_t axes[] = {1};
  Tensor part = torch::stable::sum(drope, axes);
  grads.drope = first ? part : sum_of(grads.drope, part);
  mm_into(torch::stable::narrow(grads.dkv_b, 0, p.in.first_head * width, heads * width),
          torch::stable::transpose(dkv, 0, 1), rows);
  Tensor dlatent = torch::stable::new_empty(m.q, {slots, in.rank}, type);
  mm_into(dlatent, dkv, weight);
  grads.dlatent = first ? dlatent : sum_of(to_type(grads.dlatent, ScalarType::Float), dlatent);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mla_prefill_backward(
    const Tensor &grad, const Tensor &q, const Tensor &latent, const Tensor &rope_keys,
    const Tensor &kv_b, const Tensor &spans, const std::optional<Tensor> &kv_mask,
    const Tensor &out, const Tensor &lse, double softmax_scale, int64_t v_head_dim, bool causal) {
  const char *op = "mla_prefill_backward";
  DeviceInputs m;
  fill_device(op, m, q, latent, rope_keys, std::nullopt, kv_b, kv_mask,
              {softmax_scale, v_head_dim, causal});
  use_device_spans(op, m, spans);
  const dso_mla_inputs &in = m.in;
  expect_backward(op, in, q, grad, out, lse);
  for (auto [name, t] : {std::pair{"grad", &grad}, {"out", &out}, {"lse", &lse}})
    expect_device(op, name, *t, q);
  Tensor g = torch::stable::contiguous(grad), o = torch::stable::contiguous(out),
         l = torch::stable::contiguous(lse);
  const Launch launch(q);  // 共享内存的上限要看 q 所在的设备
  const ScalarType type = prefill_type(op, in, true);
  const int64_t slots = in.b * in.s;
  Gradients grads{torch::stable::new_empty(q, {in.b, in.t, in.heads, in.nope_dim + in.rope_dim}),
                  {},
                  {},
                  torch::stable::new_empty(q, {kv_b.size(0), in.rank}, type)};
  clear_unseen(op, m, grads.dq, nullptr, launch);
  if (in.b * in.t == 0 || in.s == 0 || in.n_spans == 0) {
    grads.dlatent = torch::stable::new_zeros(q, {slots, in.rank}, type);
    grads.drope = torch::stable::new_zeros(q, {slots, in.rope_dim}, type);
    torch::stable::zero_(grads.dkv_b);
  } else {
    Tensor delta = torch::stable::new_empty(q, {in.b * in.t * in.heads}, ScalarType::Float);
    dso_cuda_mla_prefill_backward_params p{};
    p.in.in = in, p.in.out = o.mutable_data_ptr(), p.in.out_dtype = in.q_dtype;
    p.in.lse = static_cast<float *>(l.mutable_data_ptr());
    p.grad = g.const_data_ptr(), p.delta = static_cast<float *>(delta.mutable_data_ptr());
    p.dq = grads.dq.mutable_data_ptr();
    check(op, dso_cuda_mla_backward_delta(&p, launch.stream()));
    Tensor rows = latent_rows(op, m, type, true, launch);
    const int64_t group = heads_per_group(in, type);
    for (int64_t first = 0; first < in.heads; first += group) {
      p.in.first_head = first, p.in.heads = std::min(group, in.heads - first);
      backward_group(op, m, p, rows, type, grads, launch);
    }
  }
  return {
      grads.dq,
      torch::stable::view(to_type(grads.dlatent, latent.scalar_type()), {in.b, in.s, in.rank}),
      torch::stable::view(to_type(grads.drope, rope_keys.scalar_type()), {in.b, in.s, in.rope_dim}),
      to_type(grads.dkv_b, kv_b.scalar_type())};
}

}  // namespace
}  // namespace dso

DSO_DEVICE_LIBRARY(m) {
  m.impl("mla_prefill", TORCH_BOX(&dso::mla_prefill));
  m.impl("mla_prefill_backward", TORCH_BOX(&dso::mla_prefill_backward));
}
