// moe_experts、moe_experts_list、moe_experts_quantized 的 CUDA 绑定。
#include "binding_cuda_moe_fill.h"
#include "binding_moe_quantized.h"

namespace dso {
namespace {

std::tuple<Tensor, Tensor> moe_experts(const Tensor &x, const Tensor &indices,
                                       const Tensor &weights, const Tensor &gate_up,
                                       const std::optional<Tensor> &gate_up_bias,
                                       const Tensor &down, const std::optional<Tensor> &down_bias,
                                       std::vector<Tensor> shared, std::string activation,
                                       double alpha, double limit, bool transposed,
                                       bool interleaved, bool gated, bool save) {
  const char *op = "moe_experts";
  const NoGrad off;
  DeviceExperts m;
  fill_stacked(op, m, x, indices, weights, gate_up, gate_up_bias, down, down_bias, shared,
               {activation, alpha, limit, {transposed, interleaved, gated}});
  return run_experts(op, m, save, Launch(x).stream());
}

std::tuple<Tensor, Tensor> moe_experts_list(const Tensor &x, const Tensor &indices,
                                            const Tensor &weights, Tensors gate, Tensors up,
                                            Tensors down, Tensors gate_bias, Tensors up_bias,
                                            Tensors down_bias, Tensors shared,
                                            std::string activation, double alpha, double limit,
                                            bool gated, bool save) {
  const char *op = "moe_experts_list";
  expect_on_device(op, x);
  const NoGrad off;
  const Launch launch(x);
  DeviceExperts m;
  Lists w{gate, up, down, gate_bias, up_bias, down_bias};
  fill_list(op, m, w, x, indices, weights, shared, {activation, alpha, limit, gated},
            launch.stream());
  return run_experts(op, m, save, launch.stream());
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
  return std::get<0>(run_experts(op, m, false, Launch(x).stream()));
}

}  // namespace
}  // namespace dso

DSO_DEVICE_LIBRARY(m) {
  m.impl("moe_experts", TORCH_BOX(&dso::moe_experts));
  m.impl("moe_experts_list", TORCH_BOX(&dso::moe_experts_list));
  m.impl("moe_experts_quantized", TORCH_BOX(&dso::moe_experts_quantized));
}
