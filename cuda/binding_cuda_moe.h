// moe_experts 各算子的 CUDA 绑定共用：排序、成叠的权重、计算的类型。
//
// 下标在设备上，不读它的内容（读要等 GPU）：负的由排序的核断言。
#pragma once

#include "binding_cuda.h"
#include "binding_moe.h"

namespace dso {

// 一次调用在设备上的参数；张量要活到启动之后。
struct DeviceExperts : Experts {
  Tensor table, sorted, hidden, out;
  dso_cuda_moe_experts_params p{};
};

inline void expect_devices(const char *op, const char *name, const std::vector<Tensor> &list,
                           const Tensor &like) {
  for (size_t i = 0; i < list.size(); i++)
    expect_device(op, (std::string(name) + "[" + std::to_string(i) + "]").c_str(), list[i], like);
}

// 下标、混合权重：检查并填 routing（tile_rows 与输出除外）。先填好 x、routed。
inline void fill_device_routing(const char *op, DeviceExperts &m, const Tensor &indices,
                                const Tensor &weights, bool shared) {
  expect_device(op, "indices", indices, m.x);
  expect_device(op, "weights", weights, m.x);
  check_routing(op, m, indices, weights);
  if (on_host(m.index)) expect_not_negative(op, m);
  dso_cuda_moe_routing &r = m.p.routing;
  r.tokens = m.x.size(0), r.top_k = indices.size(1), r.experts = m.routed, r.shared = shared;
  r.index = static_cast<const int64_t *>(m.index.const_data_ptr());
  m.p.weights = static_cast<const float *>(m.mix.const_data_ptr());
  const int64_t most = dso_cuda_moe_most_experts(), rows = r.tokens * (r.top_k + 1);
  expect(m.routed <= most, op, "：专家数应不大于 ", most, "，实际是 ", m.routed, "。");
  expect(rows <= INT32_MAX, op, "：T * (k + 1) 应小于 2^31，实际是 ", rows, "。");
}

// 给 tile_rows，在设备上排序。
inline void sort_rows(const char *op, DeviceExperts &m, int64_t tile_rows, cudaStream_t stream) {
  dso_cuda_moe_routing &r = m.p.routing;
  r.tile_rows = tile_rows;
  m.sorted = scratch_of(m.x, dso_cuda_moe_sort_place(&r, nullptr));
  dso_cuda_moe_sort_place(&r, m.sorted.mutable_data_ptr());
  check(op, dso_cuda_moe_sort(&r, stream));
}

// 专家 e 相对于专家 0 移动多少字节。
inline int64_t step_of(const void *first, const void *second) {
  return static_cast<const char *>(second) - static_cast<const char *>(first);
}

// list 里各专家的位置相隔固定的间隔（成叠的权重）：first 与各间隔。
inline void use_stack(DeviceExperts &m) {
  dso_cuda_moe_weights &w = m.p.w;
  if (m.routed == 0) return;
  w.first = m.list[0];
  if (m.routed == 1) return;
  const dso_expert &a = m.list[0], &b = m.list[1];
  w.gate_step = step_of(a.gate.data, b.gate.data), w.down_step = step_of(a.down.data, b.down.data);
  w.gate_bias_step = step_of(a.gate_bias, b.gate_bias);
  w.down_bias_step = step_of(a.down_bias, b.down_bias);
  w.gate_scale_step = step_of(a.gate_quant.scale, b.gate_quant.scale);
  w.gate_zero_step = step_of(a.gate_quant.zero, b.gate_quant.zero);
  w.down_scale_step = step_of(a.down_quant.scale, b.down_quant.scale);
  w.down_zero_step = step_of(a.down_quant.zero, b.down_quant.zero);
}

// 各专家是单独的张量：写成设备上的表。
inline void use_list(const char *op, DeviceExperts &m, cudaStream_t stream) {
  dso_cuda_moe_weights &w = m.p.w;
  w.first = m.list[0];
  m.table = scratch_of(m.x, static_cast<size_t>(m.routed) * sizeof(dso_expert));
  auto *to = static_cast<dso_expert *>(m.table.mutable_data_ptr());
  check(op, dso_cuda_moe_table(m.list.data(), m.routed, to, stream));
  w.list = to;
}

// paired：up 是 gate 的下一个元素（CPU 上成对处理，不用 up）。
inline void place_pairs(DeviceExperts &m) {
  dso_expert &e = m.p.w.first;
  const int64_t size = e.gate.dtype == DSO_F32 ? 4 : 2;
  e.up = {static_cast<const char *>(e.gate.data) + size, e.gate.rs, e.gate.dtype};
  e.bias_step = 2;
  if (e.gate_bias) e.up_bias = static_cast<const char *>(e.gate_bias) + size;
}

// list（最后一个可以是共享专家）、routing 填好之后：计算的类型、h 的行距，其余的参数。
inline void finish_params(const char *op, DeviceExperts &m, const dso_act &act,
                          const float *shared_scale) {
  dso_cuda_moe_experts_params &p = m.p;
  p.k = m.x.size(1), p.n = m.in.n, p.act = act;
  p.x = {m.x.const_data_ptr(), m.x.stride(0), float_dtype(op, "x", m.x)};
  p.w.transposed = m.in.transposed, p.w.paired = m.in.paired, p.w.gated = m.in.gated;
  if (p.w.paired) place_pairs(m);
  for (int64_t e = 0; e < m.routed; e++)
    p.widest = std::max(p.widest, m.list[static_cast<size_t>(e)].inner);
  if (p.routing.shared) p.w.shared = m.list.back(), p.w.shared_scale = shared_scale;
  p.h_rs = (p.widest + 7) / 8 * 8;
  const auto count = static_cast<int64_t>(m.list.size());
  p.dtype = dso_cuda_moe_fits(&p, m.list.data(), count, p.x.dtype) ? p.x.dtype : DSO_F32;
}

// 分配 h、o、y（save：另有留给反向的 gate、up），排序，计算。
inline std::tuple<Tensor, Tensor> run_experts(const char *op, DeviceExperts &m, bool save,
                                              cudaStream_t stream) {
  dso_cuda_moe_experts_params &p = m.p;
  const dso_cuda_moe_routing &r = p.routing;
  Tensor y = torch::stable::new_empty(m.x, {r.tokens, p.n});
  dso_moe_saved at{};
  Tensor saved = new_saved(m, r.top_k, save, &at);
  p.saved = at.data;
  if (r.tokens == 0 || p.n == 0) return {y, saved};
  const int64_t tile_rows = dso_cuda_moe_tile_rows(&p);
  if (tile_rows > 0) sort_rows(op, m, tile_rows, stream);
  const ScalarType type = p.dtype == DSO_F32 ? ScalarType::Float : m.x.scalar_type();
  const int64_t slots = r.tokens * r.top_k, shared = r.shared ? r.tokens : 0;
  m.hidden = torch::stable::new_empty(m.x, {slots * p.h_rs + shared * p.w.shared.inner}, type);
  m.out = torch::stable::new_empty(m.x, {tile_rows > 0 ? slots + shared : 0, p.n}, type);
  p.h = m.hidden.mutable_data_ptr(), p.o = m.out.mutable_data_ptr(), p.y = y.mutable_data_ptr();
  check(op, dso_cuda_moe_experts(&p, stream));
  return {y, saved};
}

}  // namespace dso
