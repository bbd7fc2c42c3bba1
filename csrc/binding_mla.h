// MLA 各算子的绑定共用（CPU 与 CUDA）：旋转、写缓存、注意力的参数检查与填写。
// 张量在哪里都行，只有标明“在 CPU 上”的才读内容。
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "binding.h"

namespace dso {

inline Tensor to_f32(const Tensor &t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

// cos、sin：fp32、连续，活到执行结束。
struct Angles {
  Tensor cos, sin;
  const float *c, *s;
};

inline Angles angles_of(const Tensor &cos, const Tensor &sin) {
  Angles a{torch::stable::contiguous(to_f32(cos)), torch::stable::contiguous(to_f32(sin)), nullptr,
           nullptr};
  a.c = static_cast<const float *>(a.cos.const_data_ptr());
  a.s = static_cast<const float *>(a.sin.const_data_ptr());
  return a;
}

// 怎样旋转，见 csrc/rope.c。
struct Turn {
  bool interleaved, inverse, keep_pairs;
};

inline void check_turn(const char *op, const Turn &turn) {
  expect(turn.interleaved || !turn.keep_pairs, op,
         "：keep_pairs=True 时 interleaved 也应为 True，实际是 False。");
}

// y 可以就是 x；x 的最后一维步长为 1。
inline dso_rope_params rope_params(const char *op, const Tensor &x, Tensor &y, const Tensor &cos,
                                   const Tensor &sin, const Angles &a, const Turn &turn) {
  check_turn(op, turn);
  const int64_t b = x.size(0), t = x.size(1), h = x.size(2), d = x.size(3);
  expect(d % 2 == 0, op, "：x 的最后一维应为偶数，实际是 ", d, "。");
  expect_shape(op, "cos", cos, {-1, t, d / 2});
  expect_shape(op, "sin", sin, {cos.size(0), t, d / 2});
  expect(cos.size(0) == 1 || cos.size(0) == b, op, "：cos 的第 0 维应为 1 或 ", b, "，实际是 ",
         cos.size(0), "。");
  dso_rope_params p{};
  p.b = b, p.t = t, p.h = h, p.d = d;
  p.x = x.const_data_ptr(), p.dtype = float_dtype(op, "x", x);
  p.x_bs = x.stride(0), p.x_ts = x.stride(1), p.x_hs = x.stride(2);
  p.cos = a.c, p.sin = a.s;
  p.cs_bs = cos.size(0) == 1 ? 0 : t * (d / 2), p.cs_ts = d / 2;
  p.y = y.mutable_data_ptr();
  p.y_bs = y.stride(0), p.y_ts = y.stride(1), p.y_hs = y.stride(2);
  p.interleaved = turn.interleaved, p.inverse = turn.inverse, p.keep_pairs = turn.keep_pairs;
  return p;
}

inline dso_dtype latent_dtype(const char *op, const char *name, const Tensor &t) {
  switch (t.scalar_type()) {
    case ScalarType::Char:
      return DSO_I8;
    case ScalarType::Float8_e4m3fn:
      return DSO_F8;
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return float_dtype(op, name, t);
    default:
      expect(false, op, "：", name,
             " 的类型应为 float32、bfloat16、float16、int8 或 float8_e4m3fn，实际是 ",
             dtype_name(t.scalar_type()), "。");
      return DSO_F32;
  }
}

// 量化的（int8、float8_e4m3fn）带着每词元的尺度，其余没有。
inline void expect_scale(const char *op, const char *latent, const char *scale, dso_dtype dtype,
                         bool given) {
  expect((dso_quantized_latent(dtype) != 0) == given, op, "：", latent,
         " 为 int8 或 float8_e4m3fn 时必须给出 ", scale, "，否则不能给。");
}

// offsets [B] int64、连续、在 CPU 上：每行要写的 t 个槽位都应在缓存之内。
inline void check_offsets(const char *op, const Tensor &offsets, int64_t t, int64_t slots) {
  const auto *start = static_cast<const int64_t *>(offsets.const_data_ptr());
  for (int64_t i = 0; i < offsets.size(0); i++)
    expect(start[i] >= 0 && start[i] + t <= slots, op, "：第 ", i, " 行要写槽位 [", start[i], ", ",
           start[i] + t, ")，超出缓存的 ", slots, " 个槽位。");
}

// 张量与由它们得到的参数；offsets 由调用者检查并填写。
struct CacheWrite {
  Tensor latent, rope;
  dso_mla_cache_write_params p{};
};

inline CacheWrite cache_write_of(const char *op, Tensor &latent_cache, Tensor &rope_cache,
                                 std::optional<Tensor> &scale_cache, const Tensor &latent,
                                 const Tensor &rope_keys, const Tensor &offsets) {
  expect_shape(op, "latent", latent, {-1, -1, -1});
  const int64_t b = latent.size(0), t = latent.size(1), rank = latent.size(2);
  expect_shape(op, "rope", rope_keys, {b, t, -1});
  const int64_t dr = rope_keys.size(2);
  expect_shape(op, "latent_cache", latent_cache, {b, -1, rank});
  const int64_t slots = latent_cache.size(1);
  expect_shape(op, "rope_cache", rope_cache, {b, slots, dr});
  expect_shape(op, "offsets", offsets, {b});
  expect_type(op, "offsets", offsets, ScalarType::Long);
  CacheWrite w{row_major(latent), row_major(rope_keys), {}};
  dso_mla_cache_write_params &p = w.p;
  p.latent_cache_dtype = latent_dtype(op, "latent_cache", latent_cache);
  expect_scale(op, "latent_cache", "scale_cache", p.latent_cache_dtype, scale_cache.has_value());
  if (scale_cache) {
    expect_shape(op, "scale_cache", *scale_cache, {b, slots});
    expect_type(op, "scale_cache", *scale_cache, ScalarType::Float);
    expect(scale_cache->stride(1) == 1 || slots <= 1, op, "：scale_cache 的最后一维步长应为 1。");
    p.scale_cache = static_cast<float *>(scale_cache->mutable_data_ptr());
    p.scale_cache_bs = scale_cache->stride(0);
  }
  expect(rank <= 1 || latent_cache.stride(2) == 1, op, "：latent_cache 的最后一维步长应为 1。");
  expect(dr <= 1 || rope_cache.stride(2) == 1, op, "：rope_cache 的最后一维步长应为 1。");
  p.b = b, p.t = t, p.rank = rank, p.rope_dim = dr;
  p.latent = w.latent.const_data_ptr(), p.rope = w.rope.const_data_ptr();
  p.latent_bs = w.latent.stride(0), p.latent_ts = w.latent.stride(1);
  p.rope_bs = w.rope.stride(0), p.rope_ts = w.rope.stride(1);
  p.latent_dtype = float_dtype(op, "latent", latent);
  p.rope_dtype = float_dtype(op, "rope", rope_keys);
  p.latent_cache = latent_cache.mutable_data_ptr(), p.rope_cache = rope_cache.mutable_data_ptr();
  p.latent_cache_bs = latent_cache.stride(0), p.latent_cache_ts = latent_cache.stride(1);
  p.rope_cache_bs = rope_cache.stride(0), p.rope_cache_ts = rope_cache.stride(1);
  p.rope_cache_dtype = float_dtype(op, "rope_cache", rope_cache);
  return w;
}

// 检查 spans：范围合法、各在一行之内、查询不重叠、causal 时键不少于查询。
inline void check_spans(const char *op, const dso_mla_inputs &in, const dso_span *spans,
                        int64_t count) {
  std::vector<std::pair<int64_t, int64_t>> queries;
  auto inside = [](int64_t begin, int64_t end, int64_t rows, int64_t width) {
    return 0 <= begin && begin <= end && end <= rows * width &&
           (begin == end || begin / width == (end - 1) / width);
  };
  for (int64_t i = 0; i < count; i++) {
    const dso_span &s = spans[i];
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

// 张量与由它们得到的结构体；张量要活到执行结束。spans 另由 CPU、CUDA 各自填写。
struct MlaInputs {
  Tensor q, latent, rope, scale, kv_b, mask, spans, pages;
  std::vector<dso_span> list;
  dso_mla_inputs in{};
};

struct MlaOptions {
  double softmax_scale;
  int64_t v_head_dim;
  bool causal;
};

// 分页的缓存：latent [页数, 每页的槽位数, r]，block_table [B, 每行的页数]。
inline void fill_pages(const char *op, MlaInputs &m, const Tensor &latent, const Tensor &table) {
  dso_mla_inputs &in = m.in;
  expect_shape(op, "latent", latent, {-1, -1, -1});
  expect_shape(op, "block_table", table, {in.b, -1});
  expect_type(op, "block_table", table, ScalarType::Int);
  expect(latent.size(1) > 0, op, "：latent 每页的槽位数（第 1 维）应大于 0。");
  m.pages = row_major(table);
  in.pages = static_cast<const int32_t *>(m.pages.const_data_ptr());
  in.pages_bs = m.pages.stride(0), in.page_size = latent.size(1), in.page_count = latent.size(0);
}

// spans 要读的页都应存在；用不到的页号不看。页表在 CPU 上，spans 已经检查过。
inline void check_pages(const char *op, const MlaInputs &m, const dso_span *spans, int64_t count) {
  const dso_mla_inputs &in = m.in;
  for (int64_t i = 0; i < count; i++) {
    const dso_span &s = spans[i];
    if (s.q_begin == s.q_end || s.kv_begin == s.kv_end) continue;
    const int64_t row = s.kv_begin / in.s, slot = s.kv_begin % in.s;
    const int64_t end = slot + s.kv_end - s.kv_begin;
    for (int64_t j = slot / in.page_size; j * in.page_size < end; j++) {
      const int64_t page = in.pages[row * in.pages_bs + j];
      expect(0 <= page && page < m.latent.size(0), op, "：block_table[", row, ", ", j,
             "] 应是 0 到 ", m.latent.size(0) - 1, " 的页号，实际是 ", page, "。");
    }
  }
}

inline void fill_cache(const char *op, MlaInputs &m, const Tensor &latent, const Tensor &rope_keys,
                       const std::optional<Tensor> &scale, const std::optional<Tensor> &kv_mask) {
  dso_mla_inputs &in = m.in;
  m.latent = row_major(latent), m.rope = row_major(rope_keys);
  in.latent = m.latent.const_data_ptr(), in.latent_bs = m.latent.stride(0),
  in.latent_ts = m.latent.stride(1);
  in.rope = m.rope.const_data_ptr(), in.rope_bs = m.rope.stride(0), in.rope_ts = m.rope.stride(1);
  in.latent_dtype = latent_dtype(op, "latent", latent);
  in.rope_dtype = float_dtype(op, "rope", rope_keys);
  expect_scale(op, "latent", "scale", in.latent_dtype, scale.has_value());
  if (scale) {
    expect_shape(op, "scale", *scale, {latent.size(0), latent.size(1)});
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

inline void fill(const char *op, MlaInputs &m, const Tensor &q, const Tensor &latent,
                 const Tensor &rope_keys, const std::optional<Tensor> &scale, const Tensor &kv_b,
                 const std::optional<Tensor> &kv_mask, const MlaOptions &options,
                 const std::optional<Tensor> &block_table = std::nullopt) {
  dso_mla_inputs &in = m.in;
  expect_shape(op, "q", q, {-1, -1, -1, -1});
  in.b = q.size(0), in.t = q.size(1), in.heads = q.size(2);
  if (block_table)
    fill_pages(op, m, latent, *block_table);
  else
    expect_shape(op, "latent", latent, {in.b, -1, -1});
  in.s = latent.size(1) * (block_table ? block_table->size(1) : 1), in.rank = latent.size(2);
  expect_shape(op, "rope", rope_keys, {latent.size(0), latent.size(1), -1});
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

inline void expect_spans(const char *op, const Tensor &spans) {
  expect_shape(op, "spans", spans, {-1, 4});
  expect_type(op, "spans", spans, ScalarType::Long);
}

// mla_prefill_backward 另有的三个输入。
inline void expect_backward(const char *op, const dso_mla_inputs &in, const Tensor &q,
                            const Tensor &grad, const Tensor &out, const Tensor &lse) {
  expect_shape(op, "grad", grad, {in.b, in.t, in.heads, in.v_dim});
  expect_shape(op, "out", out, {in.b, in.t, in.heads, in.v_dim});
  expect_shape(op, "lse", lse, {in.b, in.t, in.heads});
  expect_type(op, "grad", grad, q.scalar_type());
  expect_type(op, "out", out, q.scalar_type());
  expect_type(op, "lse", lse, ScalarType::Float);
}

// ---- mla_layer_decode ----

// 投影的参数，次序同算子的模式。
struct LayerArgs {
  const Tensor &hidden;
  const std::optional<Tensor> &q_a, &q_a_bias, &q_norm;
  double q_eps;
  const Tensor &q_weight;
  const std::optional<Tensor> &q_bias;
  const Tensor &kv_a;
  const std::optional<Tensor> &kv_a_bias;
  const Tensor &kv_norm;
  double kv_eps;
  const Tensor &kv_b, &o_weight;
  const std::optional<Tensor> &o_bias;
  const Tensor &cos, &sin;
  Turn turn;
};

struct LayerDims {
  int64_t b, t, k, q_rank, rank, rope_dim, head_dim, v_dim;
};

inline void check_bias(const char *op, const char *name, const std::optional<Tensor> &bias,
                       const Tensor &weight) {
  if (!bias) return;
  expect_shape(op, name, *bias, {weight.size(0)});
  expect_type(op, name, *bias, weight.scalar_type());
}

inline LayerDims layer_dims(const char *op, const LayerArgs &a, int64_t heads) {
  check_turn(op, a.turn);
  expect_shape(op, "hidden", a.hidden, {-1, -1, -1});
  const int64_t b = a.hidden.size(0), t = a.hidden.size(1), k = a.hidden.size(2);
  expect_shape(op, "kv_a_weight", a.kv_a, {-1, k});
  expect_shape(op, "kv_norm_weight", a.kv_norm, {-1});
  const int64_t rank = a.kv_norm.size(0), dr = a.kv_a.size(0) - rank;
  expect(dr >= 0 && dr % 2 == 0, op,
         "：kv_a_weight 的行数减去 kv_norm_weight 的长度应为非负偶数，实际是 ", dr, "。");
  expect_shape(op, "cos", a.cos, {-1, t, dr / 2});
  expect_shape(op, "sin", a.sin, {a.cos.size(0), t, dr / 2});
  expect(a.cos.size(0) == b || (a.cos.size(0) == 1 && (t == 1 || b == 1)), op,
         "：cos 的第 0 维应为 ", b, "，实际是 ", a.cos.size(0), "。");
  expect(a.q_a.has_value() == a.q_norm.has_value(), op,
         "：q_a_weight 与 q_norm_weight 应同时给出或同时为 None。");
  if (a.q_a) {
    expect_shape(op, "q_a_weight", *a.q_a, {-1, k});
    expect_shape(op, "q_norm_weight", *a.q_norm, {a.q_a->size(0)});
    expect_type(op, "q_norm_weight", *a.q_norm, a.kv_norm.scalar_type());
    check_bias(op, "q_a_bias", a.q_a_bias, *a.q_a);
  }
  check_bias(op, "kv_a_bias", a.kv_a_bias, a.kv_a);
  expect(heads > 0 && a.q_weight.size(0) % heads == 0 && a.kv_b.size(0) % heads == 0, op,
         "：q_weight 的行数 ", a.q_weight.size(0), " 与 kv_b_weight 的行数 ", a.kv_b.size(0),
         " 应是头数 ", heads, " 的倍数。");
  const int64_t head_dim = a.q_weight.size(0) / heads;
  const int64_t v_dim = a.kv_b.size(0) / heads - (head_dim - dr);
  expect_shape(op, "o_weight", a.o_weight, {-1, heads * v_dim});
  float_dtype(op, "o_weight", a.o_weight);
  check_bias(op, "o_bias", a.o_bias, a.o_weight);
  return {b, t, k, a.q_a ? a.q_a->size(0) : 0, rank, dr, head_dim, v_dim};
}

// offsets 要原地前移。
inline void expect_layer_offsets(const char *op, const Tensor &offsets, int64_t b) {
  expect(offsets.is_contiguous(), op, "：offsets 应是连续的。");
  expect_shape(op, "offsets", offsets, {b});
  expect_type(op, "offsets", offsets, ScalarType::Long);
}

}  // namespace dso
