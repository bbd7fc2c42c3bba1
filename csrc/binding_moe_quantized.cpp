// moe_experts_quantized 的 CPU 绑定：int8、int4、fp8 的专家，只做前向。
#include "binding_moe_quantized.h"

namespace dso {
namespace quantized {
namespace {

Tensor moe_experts_quantized(const Tensor &x, const Tensor &indices, const Tensor &weights,
                             const Tensor &gate_up, const Tensor &gate_up_scale,
                             const std::optional<Tensor> &gate_up_zero, const Tensor &down,
                             const Tensor &down_scale, const std::optional<Tensor> &down_zero,
                             std::vector<Tensor> shared, int64_t group_size, std::string activation,
                             double alpha, double limit, bool gated,
                             std::vector<Tensor> shared_scale, std::vector<Tensor> shared_zero,
                             const std::optional<Tensor> &gate_up_bias,
                             const std::optional<Tensor> &down_bias) {
  const Options options{activation, alpha, limit, gated, group_size};
  Experts m;
  Stacks s;
  const dso_act act = check_experts(m, s, x, gate_up, gate_up_scale, gate_up_zero, down, down_scale,
                                    down_zero, shared, options);
  fill_routing(kOp, m, indices, weights, shared.empty() ? 0 : 1);
  add_experts(m, s, shared, shared_scale, shared_zero, gate_up_bias, down_bias, options);
  if (!shared.empty()) fill_shared_rows(kOp, m, shared);
  prepare(kOp, m, act, false);
  return std::get<0>(run_forward(m, false));
}
}  // namespace
}  // namespace quantized
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("moe_experts_quantized", TORCH_BOX(&dso::quantized::moe_experts_quantized));
}
