// moe_experts、moe_experts_list、moe_experts_quantized 的 CUDA 绑定。
#include "binding_cuda_moe.h"
#include "binding_moe_list.h"
#include "binding_moe_quantized.h"
#include "binding_moe_stacked.h"

namespace dso {
namespace {

Tensor moe_experts(const Tensor &x, const Tensor &indices, const Tensor &weights,
                   const Tensor &gate_up, const std::optional<Tensor> &gate_up_bias,
                   const Tensor &down, const std::optional<Tensor> &down_bias,
                   std::vector<Tensor> shared, std::string activation, double alpha, double limit,
                   bool transposed, bool interleaved, bool gated) {
  const char *op = "moe_experts";
  DeviceExperts m;
  expect_device(op, "gate_up", gate_up, x);
  expect_device(op, "down", down, x);
  if (gate_up_bias) expect_device(op, "gate_up_bias", *gate_up_bias, x);
  if (down_bias) expect_device(op, "down_bias", *down_bias, x);
  expect_devices(op, "shared", shared, x);
  const NoGrad off;
  const StackedOptions options{activation, alpha, limit, {transposed, interleaved, gated}};
  const dso_act act =
      check_experts(op, m, x, gate_up, gate_up_bias, down, down_bias, shared, options);
  fill_device_routing(op, m, indices, weights, !shared.empty());
  for (int64_t e = 0; e < m.routed; e++)
    m.list.push_back(
        expert_at(m, options.layout, gate_up_bias.has_value(), down_bias.has_value(), e));
  use_stack(m);
  if (!shared.empty()) add_shared(op, m, shared);
  finish_params(op, m, act, add_shared_scale(op, m, shared));
  return run_experts(op, m, Launch(x).stream());
}

Tensor moe_experts_list(const Tensor &x, const Tensor &indices, const Tensor &weights, Tensors gate,
                        Tensors up, Tensors down, Tensors gate_bias, Tensors up_bias,
                        Tensors down_bias, Tensors shared, std::string activation, double alpha,
                        double limit, bool gated) {
  const char *op = "moe_experts_list";
  DeviceExperts m;
  Lists w{gate, up, down, gate_bias, up_bias, down_bias};
  expect_devices(op, "gate", gate, x), expect_devices(op, "up", up, x);
  expect_devices(op, "down", down, x), expect_devices(op, "gate_bias", gate_bias, x);
  expect_devices(op, "up_bias", up_bias, x), expect_devices(op, "down_bias", down_bias, x);
  expect_devices(op, "shared", shared, x);
  const NoGrad off;
  const dso_act act = check_experts(op, m, w, x, shared, {activation, alpha, limit, gated});
  fill_device_routing(op, m, indices, weights, !shared.empty());
  const Launch launch(x);
  use_list(op, m, launch.stream());
  if (!shared.empty()) add_shared(op, m, shared);
  finish_params(op, m, act, add_shared_scale(op, m, shared));
  return run_experts(op, m, launch.stream());
}

Tensor moe_experts_quantized(const Tensor &x, const Tensor &indices, const Tensor &weights,
                             const Tensor &gate_up, const Tensor &gate_up_scale,
                             const std::optional<Tensor> &gate_up_zero, const Tensor &down,
                             const Tensor &down_scale, const std::optional<Tensor> &down_zero,
                             std::vector<Tensor> shared, int64_t group_size, std::string activation,
                             double alpha, double limit, bool gated,
                             std::vector<Tensor> shared_scale, std::vector<Tensor> shared_zero,
                             const std::optional<Tensor> &gate_up_bias,
                             const std::optional<Tensor> &down_bias) {
  const char *op = quantized::kOp;
  DeviceExperts m;
  const std::pair<const char *, const Tensor *> given[] = {{"gate_up", &gate_up},
                                                           {"gate_up_scale", &gate_up_scale},
                                                           {"down", &down},
                                                           {"down_scale", &down_scale}};
  for (const auto &[name, tensor] : given)
    if (tensor->defined()) expect_device(op, name, *tensor, x);
  const std::pair<const char *, const std::optional<Tensor> *> optional[] = {
      {"gate_up_zero", &gate_up_zero},
      {"down_zero", &down_zero},
      {"gate_up_bias", &gate_up_bias},
      {"down_bias", &down_bias}};
  for (const auto &[name, tensor] : optional)
    if (*tensor) expect_device(op, name, **tensor, x);
  expect_devices(op, "shared", shared, x), expect_devices(op, "shared_scale", shared_scale, x);
  expect_devices(op, "shared_zero", shared_zero, x);
  const NoGrad off;
  const quantized::Options options{activation, alpha, limit, gated, group_size};
  quantized::Stacks s;
  const dso_act act = quantized::check_experts(m, s, x, gate_up, gate_up_scale, gate_up_zero, down,
                                               down_scale, down_zero, shared, options);
  fill_device_routing(op, m, indices, weights, !shared.empty());
  quantized::add_experts(m, s, shared, shared_scale, shared_zero, gate_up_bias, down_bias, options);
  use_stack(m);
  finish_params(op, m, act, add_shared_scale(op, m, shared));
  return run_experts(op, m, Launch(x).stream());
}

}  // namespace
}  // namespace dso

DSO_DEVICE_LIBRARY(m) {
  m.impl("moe_experts", TORCH_BOX(&dso::moe_experts));
  m.impl("moe_experts_list", TORCH_BOX(&dso::moe_experts_list));
  m.impl("moe_experts_quantized", TORCH_BOX(&dso::moe_experts_quantized));
}
