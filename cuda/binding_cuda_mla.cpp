// rope、mla_cache_write、mla_decode 的 CUDA 绑定：检查参数（与 csrc/binding_mla.cpp 同样的消息），分配输出，
// 在当前流上启动。
#include "binding_cuda_mla.h"

namespace dso {
namespace {

Tensor rope(const Tensor &x, const Tensor &cos, const Tensor &sin, bool interleaved, bool inverse) {
  expect_shape("rope", "x", x, {-1, -1, -1, -1});
  Tensor rows = row_major(x),
         y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  rotate("rope", rows, y, cos, sin, angles_of(cos, sin), interleaved, inverse);
  return y;
}

void rope_in_place(Tensor x, const Tensor &cos, const Tensor &sin, bool interleaved) {
  expect_shape("rope_", "x", x, {-1, -1, -1, -1});
  expect(x.size(3) <= 1 || x.stride(3) == 1, "rope_：x 的最后一维步长应为 1。");
  rotate("rope_", x, x, cos, sin, angles_of(cos, sin), interleaved, false);
}

void mla_cache_write(Tensor latent_cache, Tensor rope_cache, std::optional<Tensor> scale_cache,
                     const Tensor &latent, const Tensor &rope_keys, const Tensor &offsets) {
  const char *op = "mla_cache_write";
  expect(on_device(latent_cache), op, "：latent_cache 应在 CUDA 设备上。");
  expect_device(op, "rope_cache", rope_cache, latent_cache);
  expect_device(op, "latent", latent, latent_cache);
  expect_device(op, "rope", rope_keys, latent_cache);
  if (scale_cache) expect_device(op, "scale_cache", *scale_cache, latent_cache);
  CacheWrite w =
      cache_write_of(op, latent_cache, rope_cache, scale_cache, latent, rope_keys, offsets);
  Tensor starts = device_offsets(op, offsets, w.p.t, latent_cache);
  w.p.offsets = static_cast<const int64_t *>(starts.const_data_ptr());
  check(op, dso_cuda_mla_cache_write(&w.p, latent_cache.size(1), Launch(latent_cache).stream()));
}

// kv_b_weight 看成 [H, dn + dv, r]，取每个头的一段行。
Tensor weight_part(const Tensor &kv_b, const dso_mla_inputs &in, int64_t begin, int64_t rows,
                   ScalarType type) {
  Tensor wide = torch::stable::view(torch::stable::contiguous(to_type(kv_b, type)),
                                    {in.heads, in.nope_dim + in.v_dim, in.rank});
  return torch::stable::narrow(wide, 1, begin, rows);
}

// 各头的非旋转部分吸收 W_UK：[B*T, H, r]。
Tensor absorb(const MlaInputs &m, ScalarType type) {
  const dso_mla_inputs &in = m.in;
  const int64_t tokens = in.b * in.t;
  Tensor q = m.q;  // narrow 要可改写的引用
  Tensor rows = torch::stable::reshape(torch::stable::narrow(q, 3, 0, in.nope_dim),
                                       {tokens, in.heads, in.nope_dim});
  Tensor out = torch::stable::new_empty(m.q, {tokens, in.heads, in.rank}, type);
  bmm_into(torch::stable::transpose(out, 0, 1), torch::stable::transpose(to_type(rows, type), 0, 1),
           weight_part(m.kv_b, in, 0, in.nope_dim, type));
  return out;
}

// o [B*T, H, r] 乘各头的 W_UV：[B, T, H, dv]，与 q 同类型。
Tensor project_out(const MlaInputs &m, const Tensor &o, ScalarType type) {
  const dso_mla_inputs &in = m.in;
  Tensor out = torch::stable::new_empty(m.q, {in.b * in.t, in.heads, in.v_dim}, type);
  Tensor weight = weight_part(m.kv_b, in, in.nope_dim, in.v_dim, type);
  bmm_into(torch::stable::transpose(out, 0, 1), torch::stable::transpose(o, 0, 1),
           torch::stable::transpose(weight, 1, 2));
  return torch::stable::view(to_type(out, m.q.scalar_type()), {in.b, in.t, in.heads, in.v_dim});
}

}  // namespace

Tensor decode(const char *op, const DeviceInputs &m) {
  const dso_mla_inputs &in = m.in;
  if (in.b * in.t == 0) return torch::stable::new_empty(m.q, {in.b, in.t, in.heads, in.v_dim});
  const NoGrad off;
  const ScalarType type = compute_type(in);
  Tensor q_abs = absorb(m, type);
  Tensor o = torch::stable::new_empty(m.q, {in.b * in.t, in.heads, in.rank}, type);
  dso_cuda_mla_decode_params p{in,
                               q_abs.const_data_ptr(),
                               o.mutable_data_ptr(),
                               float_dtype(op, "q", q_abs),
                               m.longest * in.heads,
                               m.covered};
  const Launch launch(m.q);
  size_t bytes = 0;
  check(op, dso_cuda_mla_decode_scratch(&p, &bytes));
  Tensor scratch = scratch_of(m.q, bytes);
  check(op, dso_cuda_mla_decode(&p, scratch.mutable_data_ptr(), launch.stream()));
  return project_out(m, o, type);
}

namespace {

Tensor mla_decode(const Tensor &q, const Tensor &latent, const Tensor &rope_keys,
                  const std::optional<Tensor> &scale, const Tensor &kv_b, const Tensor &spans,
                  const std::optional<Tensor> &kv_mask, double softmax_scale, int64_t v_head_dim,
                  bool causal, const std::optional<Tensor> &block_table) {
  const char *op = "mla_decode";
  DeviceInputs m;
  fill_device(op, m, q, latent, rope_keys, scale, kv_b, kv_mask,
              {softmax_scale, v_head_dim, causal}, block_table);
  use_device_spans(op, m, spans);
  return decode(op, m);
}

}  // namespace
}  // namespace dso

DSO_DEVICE_LIBRARY(m) {
  m.impl("rope", TORCH_BOX(&dso::rope));
  m.impl("rope_", TORCH_BOX(&dso::rope_in_place));
  m.impl("mla_cache_write", TORCH_BOX(&dso::mla_cache_write));
  m.impl("mla_decode", TORCH_BOX(&dso::mla_decode));
}
