// rope、mla_cache_write、mla_decode、mla_prefill 及其反向的 CPU 绑定。
#include "binding_mla.h"

#include <tuple>

namespace dso {
namespace {

void rotate(const char *op, const Tensor &x, Tensor &y, const Tensor &cos, const Tensor &sin,
            const Turn &turn) {
  const Angles angles = angles_of(cos, sin);
  dso_rope_params p = rope_params(op, x, y, cos, sin, angles, turn);
  if (p.b * p.t * p.h * p.d > 0) execute(dso_rope, &p);
}

Tensor rope(const Tensor &x, const Tensor &cos, const Tensor &sin, bool interleaved, bool inverse,
            bool keep_pairs) {
  expect_shape("rope", "x", x, {-1, -1, -1, -1});
  Tensor rows = row_major(x),
         y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  rotate("rope", rows, y, cos, sin, {interleaved, inverse, keep_pairs});
  return y;
}

void rope_in_place(Tensor x, const Tensor &cos, const Tensor &sin, bool interleaved,
                   bool keep_pairs) {
  expect_shape("rope_", "x", x, {-1, -1, -1, -1});
  expect(x.size(3) <= 1 || x.stride(3) == 1, "rope_：x 的最后一维步长应为 1。");
  rotate("rope_", x, x, cos, sin, {interleaved, false, keep_pairs});
}

// q_a、kv_a 投影、两个归一化与键的旋转：返回 (q 的潜变量，潜变量，旋转键)。
std::tuple<Tensor, Tensor, Tensor> mla_qkv_a(const char *op, const LayerArgs &a,
                                             const LayerDims &d) {
  const Tensor &x = a.hidden;
  dso_mla_qkv_a_params p{};
  Tensor rows = as_rows(x), kv = row_major(a.kv_a), qw, qb, kb, qn,
         kn = torch::stable::contiguous(a.kv_norm);
  p.m = d.b * d.t, p.k = d.k, p.q_rank = d.q_rank, p.rank = d.rank, p.rope_dim = d.rope_dim;
  p.x = mat_of(rows, float_dtype(op, "hidden", x)),
  p.kv_a = mat_of(kv, float_dtype(op, "kv_a_weight", a.kv_a));
  p.q_a = p.kv_a;
  p.norm_dtype = float_dtype(op, "kv_norm_weight", a.kv_norm);
  p.kv_norm = kn.const_data_ptr();
  auto use_bias = [](const std::optional<Tensor> &bias, Tensor &keep) {
    if (!bias) return static_cast<const void *>(nullptr);
    keep = torch::stable::contiguous(*bias);
    return static_cast<const void *>(keep.const_data_ptr());
  };
  if (a.q_a) {
    qw = row_major(*a.q_a), qn = torch::stable::contiguous(*a.q_norm);
    p.q_a = mat_of(qw, float_dtype(op, "q_a_weight", *a.q_a)), p.q_norm = qn.const_data_ptr();
    p.q_bias = use_bias(a.q_a_bias, qb);
  }
  p.kv_bias = use_bias(a.kv_a_bias, kb);
  p.q_eps = static_cast<float>(a.q_eps), p.kv_eps = static_cast<float>(a.kv_eps),
  p.interleaved = a.turn.interleaved, p.keep_pairs = a.turn.keep_pairs;
  Angles angles = angles_of(a.cos, a.sin);
  p.cos = angles.c, p.sin = angles.s;
  p.cs_rs = a.cos.size(0) * d.t == 1 ? 0 : d.rope_dim / 2;
  Tensor q = torch::stable::new_empty(x, {d.b, d.t, d.q_rank}),
         latent = torch::stable::new_empty(x, {d.b, d.t, d.rank});
  Tensor rope_keys = torch::stable::new_empty(x, {d.b, d.t, d.rope_dim});
  p.q_latent = q.mutable_data_ptr(), p.latent = latent.mutable_data_ptr(),
  p.rope = rope_keys.mutable_data_ptr();
  if (p.m > 0) execute(dso_mla_qkv_a, &p);
  return {q, latent, rope_keys};
}

void mla_cache_write(Tensor latent_cache, Tensor rope_cache, std::optional<Tensor> scale_cache,
                     const Tensor &latent, const Tensor &rope_keys, const Tensor &offsets) {
  const char *op = "mla_cache_write";
  CacheWrite w =
      cache_write_of(op, latent_cache, rope_cache, scale_cache, latent, rope_keys, offsets);
  Tensor starts = torch::stable::contiguous(offsets);
  check_offsets(op, starts, w.p.t, latent_cache.size(1));
  w.p.offsets = static_cast<const int64_t *>(starts.const_data_ptr());
  if (w.p.b * w.p.t > 0) execute(dso_mla_cache_write, &w.p);
}

// 检查并记下 spans；空的查询范围不参与计算。
void use_spans(const char *op, MlaInputs &m, const Tensor &spans) {
  expect_spans(op, spans);
  dso_mla_inputs &in = m.in;
  Tensor rows = torch::stable::contiguous(spans);
  const auto *list = static_cast<const dso_span *>(rows.const_data_ptr());
  check_spans(op, in, list, spans.size(0));
  for (int64_t i = 0; i < spans.size(0); i++)
    if (list[i].q_begin < list[i].q_end) m.list.push_back(list[i]);
  in.spans = m.list.data(), in.n_spans = static_cast<int64_t>(m.list.size());
}

// 每行看见自己的整个缓存：starts[b] 个旧词元与 t 个新词元。
void use_whole_rows(MlaInputs &m, const int64_t *starts) {
  dso_mla_inputs &in = m.in;
  for (int64_t i = 0; i < in.b && in.t > 0; i++)
    m.list.push_back({i * in.t, (i + 1) * in.t, i * in.s, i * in.s + starts[i] + in.t});
  in.spans = m.list.data(), in.n_spans = static_cast<int64_t>(m.list.size());
}

// 解码时的整个注意力层：检查全部在写缓存之前。
Tensor mla_layer_decode(const Tensor &hidden, const std::optional<Tensor> &q_a,
                        const std::optional<Tensor> &q_a_bias, const std::optional<Tensor> &q_norm,
                        double q_eps, const Tensor &q_weight, const std::optional<Tensor> &q_bias,
                        const Tensor &kv_a, const std::optional<Tensor> &kv_a_bias,
                        const Tensor &kv_norm, double kv_eps, const Tensor &kv_b,
                        const Tensor &o_weight, const std::optional<Tensor> &o_bias,
                        const Tensor &cos, const Tensor &sin, bool interleaved, Tensor latent_cache,
                        Tensor rope_cache, std::optional<Tensor> scale_cache, Tensor offsets,
                        const std::optional<Tensor> &spans, const std::optional<Tensor> &kv_mask,
                        double softmax_scale, int64_t heads, bool keep_pairs) {
  const char *op = "mla_layer_decode";
  const Turn turn{interleaved, false, keep_pairs};
  const LayerArgs a{hidden,  q_a,    q_a_bias, q_norm,   q_eps,  q_weight, q_bias, kv_a, kv_a_bias,
                    kv_norm, kv_eps, kv_b,     o_weight, o_bias, cos,      sin,    turn};
  const LayerDims d = layer_dims(op, a, heads);
  auto [low, latent, rope_keys] = mla_qkv_a(op, a, d);
  const int64_t b = d.b, t = d.t, dr = d.rope_dim;
  Tensor q =
      torch::stable::view(linear(q_a ? low : hidden, q_weight, q_bias), {b, t, heads, d.head_dim});
  MlaInputs m;
  fill(op, m, q, latent_cache, rope_cache, scale_cache, kv_b, kv_mask,
       {softmax_scale, d.v_dim, true});
  expect_layer_offsets(op, offsets, b);
  check_offsets(op, offsets, t, m.in.s);
  auto *starts = static_cast<int64_t *>(offsets.mutable_data_ptr());
  if (spans)
    use_spans(op, m, *spans);
  else
    use_whole_rows(m, starts);
  Tensor turned = torch::stable::narrow(q, 3, d.head_dim - dr, dr);
  if (dr > 0) rotate(op, turned, turned, cos, sin, a.turn);
  mla_cache_write(latent_cache, rope_cache, scale_cache, latent, rope_keys, offsets);
  Tensor out = torch::stable::new_empty(q, {b, t, heads * d.v_dim});
  dso_mla_params p{m.in, out.mutable_data_ptr(), nullptr};
  if (b * t > 0) execute(dso_mla_decode, &p);
  Tensor y = linear(out, o_weight, o_bias);
  for (int64_t i = 0; i < b; i++)
    starts[i] += t;  // 最后才前移：中途失败（内存不足）时什么也没有写入
  return y;
}

Tensor mla_decode(const Tensor &q, const Tensor &latent, const Tensor &rope_keys,
                  const std::optional<Tensor> &scale, const Tensor &kv_b, const Tensor &spans,
                  const std::optional<Tensor> &kv_mask, double softmax_scale, int64_t v_head_dim,
                  bool causal, const std::optional<Tensor> &block_table) {
  const char *op = "mla_decode";
  MlaInputs m;
  fill(op, m, q, latent, rope_keys, scale, kv_b, kv_mask, {softmax_scale, v_head_dim, causal},
       block_table);
  use_spans(op, m, spans);
  if (block_table) check_pages(op, m, m.in.spans, m.in.n_spans);
  Tensor out = torch::stable::new_empty(q, {m.in.b, m.in.t, m.in.heads, m.in.v_dim});
  dso_mla_params p{m.in, out.mutable_data_ptr(), nullptr};
  if (m.in.b * m.in.t > 0) execute(dso_mla_decode, &p);
  return out;
}

std::tuple<Tensor, Tensor> mla_prefill(const Tensor &q, const Tensor &latent,
                                       const Tensor &rope_keys, const std::optional<Tensor> &scale,
                                       const Tensor &kv_b, const Tensor &spans,
                                       const std::optional<Tensor> &kv_mask, double softmax_scale,
                                       int64_t v_head_dim, bool causal) {
  MlaInputs m;
  fill("mla_prefill", m, q, latent, rope_keys, scale, kv_b, kv_mask,
       {softmax_scale, v_head_dim, causal});
  use_spans("mla_prefill", m, spans);
  Tensor out = torch::stable::new_empty(q, {m.in.b, m.in.t, m.in.heads, m.in.v_dim});
  Tensor lse = torch::stable::new_empty(q, {m.in.b, m.in.t, m.in.heads}, ScalarType::Float);
  int64_t covered = 0;
  for (const dso_span &s : m.list) covered += s.q_end - s.q_begin;
  if (covered < m.in.b * m.in.t) {
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
  }
  dso_mla_params p{m.in, out.mutable_data_ptr(), static_cast<float *>(lse.mutable_data_ptr())};
  if (covered > 0) execute(dso_mla_prefill, &p);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mla_prefill_backward(
    const Tensor &grad, const Tensor &q, const Tensor &latent, const Tensor &rope_keys,
    const Tensor &kv_b, const Tensor &spans, const std::optional<Tensor> &kv_mask,
    const Tensor &out, const Tensor &lse, double softmax_scale, int64_t v_head_dim, bool causal) {
  const char *op = "mla_prefill_backward";
  MlaInputs m;
  fill(op, m, q, latent, rope_keys, std::nullopt, kv_b, kv_mask,
       {softmax_scale, v_head_dim, causal});
  use_spans(op, m, spans);
  const dso_mla_inputs &in = m.in;
  expect_backward(op, in, q, grad, out, lse);
  Tensor g = torch::stable::contiguous(grad), o = torch::stable::contiguous(out),
         l = torch::stable::contiguous(lse);
  Tensor dq = torch::stable::new_zeros(q, {in.b, in.t, in.heads, in.nope_dim + in.rope_dim});
  Tensor dlatent = torch::stable::new_zeros(q, {in.b, in.s, in.rank}, ScalarType::Float);
  Tensor drope = torch::stable::new_zeros(q, {in.b, in.s, in.rope_dim}, ScalarType::Float);
  Tensor dkv_b = torch::stable::new_zeros(q, {kv_b.size(0), in.rank}, ScalarType::Float);
  dso_mla_backward_params p{in,
                            g.const_data_ptr(),
                            o.const_data_ptr(),
                            static_cast<const float *>(l.const_data_ptr()),
                            dq.mutable_data_ptr(),
                            static_cast<float *>(dlatent.mutable_data_ptr()),
                            static_cast<float *>(drope.mutable_data_ptr()),
                            static_cast<float *>(dkv_b.mutable_data_ptr())};
  if (in.n_spans > 0) execute(dso_mla_prefill_backward, &p);
  auto as = [](const Tensor &t, const Tensor &like) {
    return like.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, like.scalar_type());
  };
  return {dq, as(dlatent, latent), as(drope, rope_keys), as(dkv_b, kv_b)};
}

}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("rope", TORCH_BOX(&dso::rope));
  m.impl("rope_", TORCH_BOX(&dso::rope_in_place));
  m.impl("mla_layer_decode", TORCH_BOX(&dso::mla_layer_decode));
  m.impl("mla_cache_write", TORCH_BOX(&dso::mla_cache_write));
  m.impl("mla_decode", TORCH_BOX(&dso::mla_decode));
  m.impl("mla_prefill", TORCH_BOX(&dso::mla_prefill));
  m.impl("mla_prefill_backward", TORCH_BOX(&dso::mla_prefill_backward));
}
