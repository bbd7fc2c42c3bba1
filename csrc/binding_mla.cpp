// rope、mla_cache_write、mla_decode、mla_prefill 及其反向的 CPU 绑定。
#include <algorithm>
#include <cmath>
#include <tuple>

#include "binding.h"

namespace dso {
namespace {

Tensor to_f32(const Tensor &t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

// cos、sin：fp32、连续，活到执行结束。
struct Angles {
  Tensor cos, sin;
  const float *c, *s;
};

Angles angles_of(const Tensor &cos, const Tensor &sin) {
  Angles a{torch::stable::contiguous(to_f32(cos)), torch::stable::contiguous(to_f32(sin)), nullptr,
           nullptr};
  a.c = static_cast<const float *>(a.cos.const_data_ptr());
  a.s = static_cast<const float *>(a.sin.const_data_ptr());
  return a;
}

void rotate(const char *op, const Tensor &x, Tensor &y, const Tensor &cos, const Tensor &sin,
            bool interleaved, bool inverse) {
  const int64_t b = x.size(0), t = x.size(1), h = x.size(2), d = x.size(3);
  expect(d % 2 == 0, op, "：x 的最后一维应为偶数，实际是 ", d, "。");
  expect_shape(op, "cos", cos, {-1, t, d / 2});
  expect_shape(op, "sin", sin, {cos.size(0), t, d / 2});
  expect(cos.size(0) == 1 || cos.size(0) == b, op, "：cos 的第 0 维应为 1 或 ", b, "，实际是 ",
         cos.size(0), "。");
  const dso_dtype type = float_dtype(op, "x", x);
  Angles a = angles_of(cos, sin);
  const int64_t shared = cos.size(0) == 1 ? 0 : t * (d / 2);
  dso_rope_params p{b,
                    t,
                    h,
                    d,
                    x.const_data_ptr(),
                    x.stride(0),
                    x.stride(1),
                    x.stride(2),
                    type,
                    a.c,
                    a.s,
                    shared,
                    d / 2,
                    y.mutable_data_ptr(),
                    y.stride(0),
                    y.stride(1),
                    y.stride(2),
                    interleaved,
                    inverse};
  if (b * t * h * d > 0) execute(dso_rope, &p);
}

Tensor rope(const Tensor &x, const Tensor &cos, const Tensor &sin, bool interleaved, bool inverse) {
  expect_shape("rope", "x", x, {-1, -1, -1, -1});
  Tensor rows = row_major(x),
         y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  rotate("rope", rows, y, cos, sin, interleaved, inverse);
  return y;
}

void rope_in_place(Tensor x, const Tensor &cos, const Tensor &sin, bool interleaved) {
  expect_shape("rope_", "x", x, {-1, -1, -1, -1});
  expect(x.size(3) <= 1 || x.stride(3) == 1, "rope_：x 的最后一维步长应为 1。");
  rotate("rope_", x, x, cos, sin, interleaved, false);
}

// q_a、kv_a 投影、两个归一化与键的旋转：返回 (q 的潜变量，潜变量，旋转键)。
std::tuple<Tensor, Tensor, Tensor> mla_qkv_a(
    const char *op, const Tensor &x, const std::optional<Tensor> &q_a,
    const std::optional<Tensor> &q_bias, const std::optional<Tensor> &q_norm, double q_eps,
    const Tensor &kv_a, const std::optional<Tensor> &kv_bias, const Tensor &kv_norm, double kv_eps,
    const Tensor &cos, const Tensor &sin, bool interleaved) {
  expect_shape(op, "hidden", x, {-1, -1, -1});
  const int64_t b = x.size(0), t = x.size(1), k = x.size(2), rank = kv_norm.size(0),
                dr = kv_a.size(0) - rank;
  expect_shape(op, "kv_a_weight", kv_a, {-1, k});
  expect(dr >= 0 && dr % 2 == 0, op,
         "：kv_a_weight 的行数减去 kv_norm_weight 的长度应为非负偶数，实际是 ", dr, "。");
  expect_shape(op, "cos", cos, {-1, t, dr / 2});
  expect_shape(op, "sin", sin, {cos.size(0), t, dr / 2});
  expect(cos.size(0) == b || (cos.size(0) == 1 && (t == 1 || b == 1)), op, "：cos 的第 0 维应为 ",
         b, "，实际是 ", cos.size(0), "。");
  expect(q_a.has_value() == q_norm.has_value(), op,
         "：q_a_weight 与 q_norm_weight 应同时给出或同时为 None。");
  const int64_t q_rank = q_a ? q_a->size(0) : 0;
  dso_mla_qkv_a_params p{};
  Tensor rows = as_rows(x), kv = row_major(kv_a), qw, qb, kb, qn,
         kn = torch::stable::contiguous(kv_norm);
  p.m = b * t, p.k = k, p.q_rank = q_rank, p.rank = rank, p.rope_dim = dr;
  p.x = mat_of(rows, float_dtype(op, "hidden", x)),
  p.kv_a = mat_of(kv, float_dtype(op, "kv_a_weight", kv_a));
  p.q_a = p.kv_a;
  p.norm_dtype = float_dtype(op, "kv_norm_weight", kv_norm);
  p.kv_norm = kn.const_data_ptr();
  if (q_a) {
    expect_shape(op, "q_a_weight", *q_a, {q_rank, k});
    expect_shape(op, "q_norm_weight", *q_norm, {q_rank});
    expect_type(op, "q_norm_weight", *q_norm, kv_norm.scalar_type());
    qw = row_major(*q_a), qn = torch::stable::contiguous(*q_norm);
    p.q_a = mat_of(qw, float_dtype(op, "q_a_weight", *q_a)), p.q_norm = qn.const_data_ptr();
  }
  auto bias_of = [&](const char *name, const std::optional<Tensor> &bias, int64_t n,
                     const Tensor &w, Tensor &keep) {
    if (!bias) return static_cast<const void *>(nullptr);
    expect_shape(op, name, *bias, {n});
    expect_type(op, name, *bias, w.scalar_type());
    keep = torch::stable::contiguous(*bias);
    return static_cast<const void *>(keep.const_data_ptr());
  };
  p.q_bias = q_a ? bias_of("q_a_bias", q_bias, q_rank, *q_a, qb) : nullptr;
  p.kv_bias = bias_of("kv_a_bias", kv_bias, rank + dr, kv_a, kb);
  p.q_eps = static_cast<float>(q_eps), p.kv_eps = static_cast<float>(kv_eps),
  p.interleaved = interleaved;
  Angles a = angles_of(cos, sin);
  p.cos = a.c, p.sin = a.s, p.cs_rs = cos.size(0) * t == 1 ? 0 : dr / 2;
  Tensor q = torch::stable::new_empty(x, {b, t, q_rank}),
         latent = torch::stable::new_empty(x, {b, t, rank});
  Tensor rope_keys = torch::stable::new_empty(x, {b, t, dr});
  p.q_latent = q.mutable_data_ptr(), p.latent = latent.mutable_data_ptr(),
  p.rope = rope_keys.mutable_data_ptr();
  if (p.m > 0) execute(dso_mla_qkv_a, &p);
  return {q, latent, rope_keys};
}

dso_dtype latent_dtype(const char *op, const char *name, const Tensor &t) {
  return t.scalar_type() == ScalarType::Char ? DSO_I8 : float_dtype(op, name, t);
}

// offsets [B] int64、连续：每行要写的 t 个槽位都应在缓存之内。
void check_offsets(const char *op, const Tensor &offsets, int64_t b, int64_t t, int64_t slots) {
  expect_shape(op, "offsets", offsets, {b});
  expect_type(op, "offsets", offsets, ScalarType::Long);
  const auto *start = static_cast<const int64_t *>(offsets.const_data_ptr());
  for (int64_t i = 0; i < b; i++)
    expect(start[i] >= 0 && start[i] + t <= slots, op, "：第 ", i, " 行要写槽位 [", start[i], ", ",
           start[i] + t, ")，超出缓存的 ", slots, " 个槽位。");
}

void mla_cache_write(Tensor latent_cache, Tensor rope_cache, std::optional<Tensor> scale_cache,
                     const Tensor &latent, const Tensor &rope_keys, const Tensor &offsets) {
  const char *op = "mla_cache_write";
  expect_shape(op, "latent", latent, {-1, -1, -1});
  const int64_t b = latent.size(0), t = latent.size(1), rank = latent.size(2);
  expect_shape(op, "rope", rope_keys, {b, t, -1});
  const int64_t dr = rope_keys.size(2);
  expect_shape(op, "latent_cache", latent_cache, {b, -1, rank});
  const int64_t slots = latent_cache.size(1);
  expect_shape(op, "rope_cache", rope_cache, {b, slots, dr});
  Tensor starts = torch::stable::contiguous(offsets);
  check_offsets(op, starts, b, t, slots);
  const dso_dtype cache_type = latent_dtype(op, "latent_cache", latent_cache);
  const bool quantized = cache_type == DSO_I8;
  expect(quantized == scale_cache.has_value(), op,
         "：latent_cache 为 int8 时必须给出 scale_cache，否则不能给。");
  if (quantized) {
    expect_shape(op, "scale_cache", *scale_cache, {b, slots});
    expect_type(op, "scale_cache", *scale_cache, ScalarType::Float);
    expect(scale_cache->stride(1) == 1 || slots <= 1, op, "：scale_cache 的最后一维步长应为 1。");
  }
  expect(rank <= 1 || latent_cache.stride(2) == 1, op, "：latent_cache 的最后一维步长应为 1。");
  expect(dr <= 1 || rope_cache.stride(2) == 1, op, "：rope_cache 的最后一维步长应为 1。");
  Tensor from = row_major(latent), rope_from = row_major(rope_keys);
  dso_mla_cache_write_params p{
      b,
      t,
      rank,
      dr,
      from.const_data_ptr(),
      rope_from.const_data_ptr(),
      from.stride(0),
      from.stride(1),
      rope_from.stride(0),
      rope_from.stride(1),
      float_dtype(op, "latent", latent),
      float_dtype(op, "rope", rope_keys),
      latent_cache.mutable_data_ptr(),
      rope_cache.mutable_data_ptr(),
      latent_cache.stride(0),
      latent_cache.stride(1),
      rope_cache.stride(0),
      rope_cache.stride(1),
      cache_type,
      float_dtype(op, "rope_cache", rope_cache),
      quantized ? static_cast<float *>(scale_cache->mutable_data_ptr()) : nullptr,
      quantized ? scale_cache->stride(0) : 0,
      static_cast<const int64_t *>(starts.const_data_ptr())};
  if (b * t > 0) execute(dso_mla_cache_write, &p);
}

// 检查 spans：范围合法、各在一行之内、查询不重叠、causal 时键不少于查询。
void check_spans(const char *op, const dso_mla_inputs &in) {
  std::vector<std::pair<int64_t, int64_t>> queries;
  auto inside = [](int64_t begin, int64_t end, int64_t rows, int64_t width) {
    return 0 <= begin && begin <= end && end <= rows * width &&
           (begin == end || begin / width == (end - 1) / width);
  };
  for (int64_t i = 0; i < in.n_spans; i++) {
    const dso_span &s = in.spans[i];
    expect(inside(s.q_begin, s.q_end, in.b, in.t), op, "：spans[", i, "] 的查询范围 [", s.q_begin,
           ", ", s.q_end, ") 应落在同一行之内（共 ", in.b, " 行，每行 ", in.t, " 个）。");
    expect(inside(s.kv_begin, s.kv_end, in.b, in.s), op, "：spans[", i, "] 的键范围 [", s.kv_begin,
           ", ", s.kv_end, ") 应落在同一行之内（共 ", in.b, " 行，每行 ", in.s, " 个）。");
    expect(!in.causal || s.kv_end - s.kv_begin >= s.q_end - s.q_begin, op, "：causal 时 spans[", i,
           "] 的键数 ", s.kv_end - s.kv_begin, " 不应少于查询数 ", s.q_end - s.q_begin, "。");
    if (s.q_begin < s.q_end) queries.emplace_back(s.q_begin, s.q_end);
  }
  std::sort(queries.begin(), queries.end());
  for (size_t i = 1; i < queries.size(); i++)
    expect(queries[i].first >= queries[i - 1].second, op, "：spans 的查询范围重叠：[",
           queries[i - 1].first, ", ", queries[i - 1].second, ") 与 [", queries[i].first, ", ",
           queries[i].second, ")。");
}

// 张量与由它们得到的结构体；张量要活到执行结束。
struct MlaInputs {
  Tensor q, latent, rope, scale, kv_b, mask;
  std::vector<dso_span> list;
  dso_mla_inputs in{};
};

struct MlaOptions {
  double softmax_scale;
  int64_t v_head_dim;
  bool causal;
};

void fill_cache(const char *op, MlaInputs &m, const Tensor &latent, const Tensor &rope_keys,
                const std::optional<Tensor> &scale, const std::optional<Tensor> &kv_mask) {
  dso_mla_inputs &in = m.in;
  m.latent = row_major(latent), m.rope = row_major(rope_keys);
  in.latent = m.latent.const_data_ptr(), in.latent_bs = m.latent.stride(0),
  in.latent_ts = m.latent.stride(1);
  in.rope = m.rope.const_data_ptr(), in.rope_bs = m.rope.stride(0), in.rope_ts = m.rope.stride(1);
  in.latent_dtype = latent_dtype(op, "latent", latent);
  in.rope_dtype = float_dtype(op, "rope", rope_keys);
  expect((in.latent_dtype == DSO_I8) == scale.has_value(), op,
         "：latent 为 int8 时必须给出 scale，否则不能给。");
  if (scale) {
    expect_shape(op, "scale", *scale, {in.b, in.s});
    expect_type(op, "scale", *scale, ScalarType::Float);
    m.scale = row_major(*scale);
    in.scale = static_cast<const float *>(m.scale.const_data_ptr()),
    in.scale_bs = m.scale.stride(0);
  }
  if (kv_mask) {
    expect_shape(op, "kv_mask", *kv_mask, {in.b, in.s});
    expect_type(op, "kv_mask", *kv_mask, ScalarType::Bool);
    m.mask = row_major(*kv_mask);
    in.kv_mask = static_cast<const uint8_t *>(m.mask.const_data_ptr()),
    in.kv_mask_bs = m.mask.stride(0);
  }
}

void fill(const char *op, MlaInputs &m, const Tensor &q, const Tensor &latent,
          const Tensor &rope_keys, const std::optional<Tensor> &scale, const Tensor &kv_b,
          const std::optional<Tensor> &kv_mask, const MlaOptions &options) {
  dso_mla_inputs &in = m.in;
  expect_shape(op, "q", q, {-1, -1, -1, -1});
  expect_shape(op, "latent", latent, {q.size(0), -1, -1});
  in.b = q.size(0), in.t = q.size(1), in.heads = q.size(2), in.s = latent.size(1),
  in.rank = latent.size(2);
  expect_shape(op, "rope", rope_keys, {in.b, in.s, -1});
  in.rope_dim = rope_keys.size(2), in.nope_dim = q.size(3) - in.rope_dim,
  in.v_dim = options.v_head_dim;
  expect(in.nope_dim >= 0, op, "：q 的最后一维 ", q.size(3), " 应不小于 rope 的最后一维 ",
         in.rope_dim, "。");
  expect(in.heads > 0 && in.rank > 0 && in.v_dim > 0, op,
         "：头数、kv_lora_rank、v_head_dim 都应大于 0，实际是 ", in.heads, "、", in.rank, "、",
         in.v_dim, "。");
  expect_shape(op, "kv_b_weight", kv_b, {in.heads * (in.nope_dim + in.v_dim), in.rank});
  expect(std::isfinite(options.softmax_scale) && options.softmax_scale > 0, op,
         "：softmax_scale 应为正的有限数，实际是 ", options.softmax_scale, "。");
  m.q = row_major(q), m.kv_b = row_major(kv_b);
  in.q = m.q.const_data_ptr(), in.q_bs = m.q.stride(0), in.q_ts = m.q.stride(1),
  in.q_hs = m.q.stride(2);
  in.q_dtype = float_dtype(op, "q", q);
  in.kv_b = mat_of(m.kv_b, float_dtype(op, "kv_b_weight", kv_b));
  fill_cache(op, m, latent, rope_keys, scale, kv_mask);
  in.softmax_scale = static_cast<float>(options.softmax_scale), in.causal = options.causal;
}

void use_spans(const char *op, MlaInputs &m, const Tensor &spans) {
  expect_shape(op, "spans", spans, {-1, 4});
  expect_type(op, "spans", spans, ScalarType::Long);
  dso_mla_inputs &in = m.in;
  Tensor rows = torch::stable::contiguous(spans);
  in.spans = static_cast<const dso_span *>(rows.const_data_ptr()), in.n_spans = spans.size(0);
  check_spans(op, in);
  for (int64_t i = 0; i < in.n_spans; i++) /* 空的查询范围不参与计算 */
    if (in.spans[i].q_begin < in.spans[i].q_end) m.list.push_back(in.spans[i]);
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
                        double softmax_scale, int64_t heads) {
  const char *op = "mla_layer_decode";
  auto [low, latent, rope_keys] = mla_qkv_a(op, hidden, q_a, q_a_bias, q_norm, q_eps, kv_a,
                                            kv_a_bias, kv_norm, kv_eps, cos, sin, interleaved);
  const int64_t b = hidden.size(0), t = hidden.size(1), dr = rope_keys.size(2);
  expect(heads > 0 && q_weight.size(0) % heads == 0 && kv_b.size(0) % heads == 0, op,
         "：q_weight 的行数 ", q_weight.size(0), " 与 kv_b_weight 的行数 ", kv_b.size(0),
         " 应是头数 ", heads, " 的倍数。");
  const int64_t head_dim = q_weight.size(0) / heads, v_dim = kv_b.size(0) / heads - (head_dim - dr);
  expect_shape(op, "o_weight", o_weight, {-1, heads * v_dim});
  Tensor q =
      torch::stable::view(linear(q_a ? low : hidden, q_weight, q_bias), {b, t, heads, head_dim});
  MlaInputs m;
  fill(op, m, q, latent_cache, rope_cache, scale_cache, kv_b, kv_mask,
       {softmax_scale, v_dim, true});
  expect(offsets.is_contiguous(), op, "：offsets 应是连续的。");
  check_offsets(op, offsets, b, t, m.in.s);
  auto *starts = static_cast<int64_t *>(offsets.mutable_data_ptr());
  if (spans)
    use_spans(op, m, *spans);
  else
    use_whole_rows(m, starts);
  Tensor turned = torch::stable::narrow(q, 3, head_dim - dr, dr);
  if (dr > 0) rotate(op, turned, turned, cos, sin, interleaved, false);
  mla_cache_write(latent_cache, rope_cache, scale_cache, latent, rope_keys, offsets);
  Tensor out = torch::stable::new_empty(q, {b, t, heads * v_dim});
  dso_mla_params p{m.in, out.mutable_data_ptr(), nullptr};
  if (b * t > 0) execute(dso_mla_decode, &p);
  for (int64_t i = 0; i < b; i++) starts[i] += t;
  return linear(out, o_weight, o_bias);
}

Tensor mla_decode(const Tensor &q, const Tensor &latent, const Tensor &rope_keys,
                  const std::optional<Tensor> &scale, const Tensor &kv_b, const Tensor &spans,
                  const std::optional<Tensor> &kv_mask, double softmax_scale, int64_t v_head_dim,
                  bool causal) {
  MlaInputs m;
  fill("mla_decode", m, q, latent, rope_keys, scale, kv_b, kv_mask,
       {softmax_scale, v_head_dim, causal});
  use_spans("mla_decode", m, spans);
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
  expect_shape(op, "grad", grad, {in.b, in.t, in.heads, in.v_dim});
  expect_shape(op, "out", out, {in.b, in.t, in.heads, in.v_dim});
  expect_shape(op, "lse", lse, {in.b, in.t, in.heads});
  expect_type(op, "grad", grad, q.scalar_type());
  expect_type(op, "out", out, q.scalar_type());
  expect_type(op, "lse", lse, ScalarType::Float);
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
