// 成叠的、逐个张量的专家：检查，排序以外的参数都填好；前向与反向的绑定共用。
#pragma once

#include "binding_cuda_moe.h"
#include "binding_moe_list.h"
#include "binding_moe_stacked.h"

namespace dso {

inline void fill_stacked(const char *op, DeviceExperts &m, const Tensor &x, const Tensor &indices,
                         const Tensor &weights, const Tensor &gate_up,
                         const std::optional<Tensor> &gate_up_bias, const Tensor &down,
                         const std::optional<Tensor> &down_bias, const Tensors &shared,
                         const StackedOptions &options) {
  expect_device(op, "gate_up", gate_up, x);
  expect_device(op, "down", down, x);
  if (gate_up_bias) expect_device(op, "gate_up_bias", *gate_up_bias, x);
  if (down_bias) expect_device(op, "down_bias", *down_bias, x);
  expect_devices(op, "shared", shared, x);
  const dso_act act =
      check_experts(op, m, x, gate_up, gate_up_bias, down, down_bias, shared, options);
  fill_device_routing(op, m, indices, weights, !shared.empty());
  for (int64_t e = 0; e < m.routed; e++)
    m.list.push_back(
        expert_at(m, options.layout, gate_up_bias.has_value(), down_bias.has_value(), e));
  use_stack(m);
  if (!shared.empty()) add_shared(op, m, shared);
  finish_params(op, m, act, add_shared_scale(op, m, shared));
}

inline void fill_list(const char *op, DeviceExperts &m, Lists &w, const Tensor &x,
                      const Tensor &indices, const Tensor &weights, const Tensors &shared,
                      const ListOptions &options, cudaStream_t stream) {
  expect_devices(op, "gate", w.gate, x), expect_devices(op, "up", w.up, x);
  expect_devices(op, "down", w.down, x), expect_devices(op, "gate_bias", w.gate_bias, x);
  expect_devices(op, "up_bias", w.up_bias, x), expect_devices(op, "down_bias", w.down_bias, x);
  expect_devices(op, "shared", shared, x);
  const dso_act act = check_experts(op, m, w, x, shared, options);
  fill_device_routing(op, m, indices, weights, !shared.empty());
  use_list(op, m, stream);
  if (!shared.empty()) add_shared(op, m, shared);
  finish_params(op, m, act, add_shared_scale(op, m, shared));
}

}  // namespace dso
