// rope、mla_cache_write、mla_decode 的 CUDA 绑定：检查参数（与 csrc/binding_mla.cpp 同样的消息），分配输出，
// 在当前流上启动。
#include "binding_cuda_mla.h"

namespace dso {
namespace {

Tensor rope(const Tensor &x, const Tensor &cos, const Tensor &sin, bool interleaved, bool inverse,
            bool keep_pairs) {
  expect_shape("rope", "x", x, {-1, -1, -1, -1});
  Tensor rows = row_major(x),
         y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  rotate("rope", rows, y, cos, sin, angles_of(cos, sin), {interleaved, inverse, keep_pairs});
  return y;
}

void rope_in_place(Tensor x, const Tensor &cos, const Tensor &sin, bool interleaved,
                   bool keep_pairs) {
  expect_shape("rope_", "x", x, {-1, -1, -1, -1});
  expect(x.size(3) <= 1 || x.stride(3) == 1, "rope_：x 的最后一维步长应为 1。");
  rotate("rope_", x, x, cos, sin, angles_of(cos, sin), {interleaved, false, keep_pairs});
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

// kv_b_weight 看成 [H, dn + dv, r]。
Tensor weights_of(const MlaInputs &m, ScalarType type) {
  const dso_mla_inputs &in = m.in;
  return torch::stable::view(torch::stable::contiguous(to_type(m.kv_b, type)),
                             {in.heads, in.nope_dim + in.v_dim, in.rank});
}

// out [M, H, n] = 各头的 x [M, H, k] 乘权重，见 dso_cuda.h。
dso_cuda_heads_params heads_params(const char *op, const Tensor &out, const Tensor &x,
                                   const Tensor &weight) {
  dso_cuda_heads_params p{};
  p.m = x.size(0), p.heads = x.size(1), p.k = x.size(2), p.n = out.size(2);
  p.x = x.const_data_ptr(), p.x_ms = x.stride(0), p.x_hs = x.stride(1);
  p.w = weight.const_data_ptr(), p.w_hs = weight.stride(0), p.w_rs = weight.stride(1);
  p.y = out.mutable_data_ptr(), p.y_ms = out.stride(0), p.y_hs = out.stride(1);
  p.dtype = float_dtype(op, "q", x);
  return p;
}

// 吸收、W_UV 用自己的核（行极少的另有，W_UV 的与 linear 同一个）；不行返回 false，什么也没做。
bool own_absorb(const char *op, const dso_cuda_heads_params &p, cudaStream_t stream) {
  if (dso_cuda_absorb_fits(&p))
    check(op, dso_cuda_absorb(&p, stream));
  else if (dso_cuda_heads_fits(&p))
    check(op, dso_cuda_heads(&p, stream));
  else
    return false;
  return true;
}

bool own_values(const char *op, const dso_cuda_heads_params &p, cudaStream_t stream) {
  dso_cuda_linear_params few{};
  few.m = p.m, few.batch = p.heads, few.k = p.k, few.x = {p.x, p.x_ms, p.dtype};
  few.x_step = p.x_hs;
  few.part[0] = {{p.w, p.w_rs, p.dtype}, nullptr, p.n, p.y, p.y_ms, p.w_hs, p.y_hs};
  if (dso_cuda_linear_fits(&few))
    check(op, dso_cuda_linear(&few, stream));
  else if (dso_cuda_heads_fits(&p))
    check(op, dso_cuda_heads(&p, stream));
  else
    return false;
  return true;
}

// 各头的非旋转部分吸收 W_UK：[B*T, H, r]。own：用的是自己的核。
Tensor absorb(const char *op, const MlaInputs &m, const Tensor &weights, ScalarType type,
              bool *own) {
  const dso_mla_inputs &in = m.in;
  const int64_t tokens = in.b * in.t;
  Tensor q = m.q, all = weights;  // narrow 要可改写的引用
  Tensor rows = torch::stable::reshape(torch::stable::narrow(q, 3, 0, in.nope_dim),
                                       {tokens, in.heads, in.nope_dim});
  Tensor out = torch::stable::new_empty(m.q, {tokens, in.heads, in.rank}, type);
  rows = to_type(rows, type);
  Tensor weight = torch::stable::narrow(all, 1, 0, in.nope_dim);  // [H, dn, r]
  *own = rows.stride(2) == 1 &&
         own_absorb(op, heads_params(op, out, rows, weight), Launch(m.q).stream());
  if (!*own)
    bmm_into(torch::stable::transpose(out, 0, 1), torch::stable::transpose(rows, 0, 1), weight);
  return out;
}

// o [B*T, H, r] 乘各头的 W_UV：[B, T, H, dv]，与 q 同类型。
Tensor project_out(const char *op, const MlaInputs &m, const Tensor &o, const Tensor &weights,
                   ScalarType type) {
  const dso_mla_inputs &in = m.in;
  Tensor out = torch::stable::new_empty(m.q, {in.b * in.t, in.heads, in.v_dim}, type);
  Tensor all = weights;
  Tensor weight = torch::stable::narrow(all, 1, in.nope_dim, in.v_dim);  // [H, dv, r]
  dso_cuda_heads_params p = heads_params(op, out, o, weight);
  p.by_row = true;
  p.settled = in.n_spans > 0;  // 前两个核是合并与注意力，后者不提早放行；权重在它们之前就有了
  if (!own_values(op, p, Launch(m.q).stream()))
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
  const Tensor weights = weights_of(m, type);  // 要转换的在最前面转换：见 settled
  bool own = false;
  Tensor q_abs = absorb(op, m, weights, type, &own);
  Tensor o = torch::stable::new_empty(m.q, {in.b * in.t, in.heads, in.rank}, type);
  dso_cuda_mla_decode_params p{in,
                               q_abs.const_data_ptr(),
                               o.mutable_data_ptr(),
                               float_dtype(op, "q", q_abs),
                               m.longest * in.heads,
                               m.covered,
                               own};
  const Launch launch(m.q);
  size_t bytes = 0;
  const cudaError_t planned = dso_cuda_mla_decode_scratch(&p, &bytes);
  expect(planned != cudaErrorInvalidValue, op, "：kv_lora_rank ", in.rank, " 加 qk_rope_head_dim ",
         in.rope_dim, " 太大，放不进这块 GPU 的共享内存。");
  check(op, planned);
  Tensor scratch = scratch_of(m.q, bytes);
  check(op, dso_cuda_mla_decode(&p, scratch.mutable_data_ptr(), launch.stream()));
  return project_out(op, m, o, weights, type);
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
