// 解码时的整个注意力层（mla_layer_decode）的 CUDA 绑定。行多的投影交给 torch（cuBLAS），其余直接启动核，不经过分派器。
//
// offsets 在设备上时不读，由写缓存的核原地前移；没有给出 spans 时也由它写出。于是一步里没有等待，也没有主机到
// 设备的复制，可以录进 CUDA graph。
#include "binding_cuda_mla.h"

namespace dso {
namespace {

void expect_devices(const char *op, const LayerArgs &a) {
  const std::pair<const char *, const Tensor *> given[] = {
      {"q_weight", &a.q_weight}, {"kv_a_weight", &a.kv_a}, {"kv_norm_weight", &a.kv_norm},
      {"o_weight", &a.o_weight}, {"cos", &a.cos},          {"sin", &a.sin}};
  for (const auto &[name, tensor] : given) expect_device(op, name, *tensor, a.hidden);
  const std::pair<const char *, const std::optional<Tensor> *> optional[] = {
      {"q_a_weight", &a.q_a}, {"q_a_bias", &a.q_a_bias},   {"q_norm_weight", &a.q_norm},
      {"q_bias", &a.q_bias},  {"kv_a_bias", &a.kv_a_bias}, {"o_bias", &a.o_bias}};
  for (const auto &[name, tensor] : optional)
    if (*tensor) expect_device(op, name, **tensor, a.hidden);
}

// q [B, T, H, dn + dr]（还没有旋转）与 kv_a 的输出 [B, T, r + dr]：直接乘 hidden 的两个权重一起算。
std::pair<Tensor, Tensor> projected(const LayerArgs &a, const LayerDims &d, int64_t heads) {
  auto [q, joint] = a.q_a ? linear_pair(a.hidden, *a.q_a, a.q_a_bias, a.kv_a, a.kv_a_bias)
                          : linear_pair(a.hidden, a.q_weight, a.q_bias, a.kv_a, a.kv_a_bias);
  if (a.q_a) q = linear(rms_norm(q, *a.q_norm, a.q_eps), a.q_weight, a.q_bias);
  return {torch::stable::view(q, {d.b, d.t, heads, d.head_dim}),
          torch::stable::view(joint, {d.b, d.t, a.kv_a.size(0)})};
}

// 写缓存的核已经前移了 offsets（在主机上的不是它前移的，为空）：之后的步骤抛出（内存不足、启动失败）就撤回，缓存与调用
// 之前相同。撤回也启动不了的，设备已经出错。
class Advanced {
 public:
  Advanced(int64_t *offsets, int64_t b, int64_t t, cudaStream_t stream)
      : offsets_(offsets), b_(b), t_(t), stream_(stream) {}
  Advanced(const Advanced &) = delete;
  Advanced &operator=(const Advanced &) = delete;
  ~Advanced() {
    if (offsets_) dso_cuda_mla_kv_rewind(offsets_, b_, t_, stream_);
  }
  void keep() { offsets_ = nullptr; }

 private:
  int64_t *offsets_, b_, t_;
  cudaStream_t stream_;
};

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
  expect_devices(op, a);
  const NoGrad off;
  auto [q, joint] = projected(a, d, heads);
  DeviceInputs m;
  fill_device(op, m, q, latent_cache, rope_cache, scale_cache, kv_b, kv_mask,
              {softmax_scale, d.v_dim, true});
  expect_layer_offsets(op, offsets, d.b);
  Tensor starts = device_offsets(op, offsets, d.t, latent_cache);
  if (spans) {
    use_device_spans(op, m, *spans);
  } else {
    m.spans = torch::stable::new_empty(q, {d.b, 4}, ScalarType::Long);
    m.longest = d.t, m.covered = true;
    set_spans(m);
  }
  CacheWrite w = cache_write_of(op, latent_cache, rope_cache, scale_cache,
                                torch::stable::narrow(joint, 2, 0, d.rank),
                                torch::stable::narrow(joint, 2, d.rank, d.rope_dim), offsets);
  w.p.offsets = static_cast<const int64_t *>(starts.const_data_ptr());
  const Angles angles = angles_of(cos, sin);
  Tensor norm = torch::stable::contiguous(kv_norm);
  dso_cuda_mla_kv_write_params p{};
  p.write = w.p, p.capacity = m.in.s;
  p.norm = norm.const_data_ptr(), p.norm_dtype = float_dtype(op, "kv_norm_weight", norm);
  p.eps = static_cast<float>(kv_eps);
  p.cos = angles.c, p.sin = angles.s, p.cs_ts = d.rope_dim / 2;
  p.cs_bs = cos.size(0) == 1 ? 0 : d.t * p.cs_ts;
  p.interleaved = interleaved, p.keep_pairs = keep_pairs;
  Tensor turned = torch::stable::narrow(q, 3, d.head_dim - d.rope_dim, d.rope_dim);
  if (d.rope_dim > 0) p.queries = rope_params(op, turned, turned, cos, sin, angles, a.turn);
  if (!spans) p.spans = static_cast<dso_span *>(m.spans.mutable_data_ptr());
  if (!on_host(offsets)) p.advance = static_cast<int64_t *>(offsets.mutable_data_ptr());
  const Launch launch(hidden);
  check(op, dso_cuda_mla_kv_write(&p, launch.stream()));
  Advanced advanced(p.advance, d.b, d.t, launch.stream());
  Tensor out = torch::stable::view(decode(op, m), {d.b, d.t, heads * d.v_dim});
  Tensor y = linear(out, o_weight, o_bias);
  advanced.keep();
  if (on_host(offsets)) {
    auto *host = static_cast<int64_t *>(offsets.mutable_data_ptr());
    for (int64_t i = 0; i < d.b; i++) host[i] += d.t;
  }
  return y;
}

}  // namespace
}  // namespace dso

DSO_DEVICE_LIBRARY(m) { m.impl("mla_layer_decode", TORCH_BOX(&dso::mla_layer_decode)); }
