// moe_experts_quantized 的 CPU 绑定：int8、int4 的专家，只做前向。
#include "binding_moe.h"

namespace dso {
namespace {

constexpr const char *kOp = "moe_experts_quantized";

// 一叠量化的矩阵 [E, R, C]：int8 [E, R, C] 与尺度 [E, R]；int4 每行 ⌈C / 组⌉ 组，打包成
// [E, R, 组数 * 组 / 2] uint8，尺度、零点 [E, R, 组数]。张量要活到执行结束。
struct Stack {
  Tensor packed, scale, zero;
  dso_dtype type;
  int64_t rows, width, group, groups; /* width 为一行的元素数（int4 以字节计） */

  dso_mat mat(int64_t e, int64_t row) const {
    const auto *base = static_cast<const char *>(packed.const_data_ptr());
    return {base + (e * rows + row) * width, width, type};
  }
  dso_quant quant(int64_t e, int64_t row) const {
    const int64_t at = (e * rows + row) * groups;
    const bool has_zero = zero.defined();
    return {static_cast<const float *>(scale.const_data_ptr()) + at,
            has_zero ? static_cast<const uint8_t *>(zero.const_data_ptr()) + at : nullptr, group,
            groups};
  }
};

void check_codes(const std::string &name, const Tensor &t, ScalarType want, const char *text) {
  expect(t.scalar_type() == want, kOp, "：", name, " 的类型应为 ", text, "，实际是 ",
         t.scalar_type() == ScalarType::Byte ? "uint8" : dtype_name(t.scalar_type()), "。");
}

// experts、rows 为 -1 时任意；columns 是没有打包时的列数。
Stack stack_of(const std::string &name, const Tensor &packed, const Tensor &scale,
               const std::optional<Tensor> &zero, int64_t experts, int64_t columns,
               int64_t group_size) {
  const bool int4 = group_size > 0;
  const std::string scale_name = name + "_scale", zero_name = name + "_zero";
  expect(packed.defined(), kOp, "：", name, " 应为张量，实际是 None。");
  expect(scale.defined(), kOp, "：", scale_name,
         " 应为张量（量化的权重必须有尺度），实际是 None。");
  Stack s{};
  s.type = int4 ? DSO_I4 : DSO_I8, s.group = group_size;
  s.groups = int4 ? (columns + group_size - 1) / group_size : 1;
  s.width = int4 ? s.groups * group_size / 2 : columns;
  if (int4)
    check_codes(name, packed, ScalarType::Byte, "uint8（group_size 大于 0 时是 int4）");
  else
    check_codes(name, packed, ScalarType::Char, "int8（group_size 为 0 时）");
  expect_shape(kOp, name.c_str(), packed, {experts, -1, s.width});
  s.rows = packed.size(1);
  expect_type(kOp, scale_name.c_str(), scale, ScalarType::Float);
  if (int4)
    expect_shape(kOp, scale_name.c_str(), scale, {packed.size(0), s.rows, s.groups});
  else
    expect_shape(kOp, scale_name.c_str(), scale, {packed.size(0), s.rows});
  s.packed = torch::stable::contiguous(packed), s.scale = torch::stable::contiguous(scale);
  if (!zero) return s;
  expect(int4, kOp, "：", zero_name, " 应为 None（int8 没有零点），实际给了。");
  check_codes(zero_name, *zero, ScalarType::Byte, "uint8");
  expect_shape(kOp, zero_name.c_str(), *zero, {packed.size(0), s.rows, s.groups});
  s.zero = torch::stable::contiguous(*zero);
  return s;
}

Tensor moe_experts_quantized(const Tensor &x, const Tensor &indices, const Tensor &weights,
                             const Tensor &gate_up, const Tensor &gate_up_scale,
                             const std::optional<Tensor> &gate_up_zero, const Tensor &down,
                             const Tensor &down_scale, const std::optional<Tensor> &down_zero,
                             std::vector<Tensor> shared, int64_t group_size, std::string activation,
                             double alpha, double limit, bool gated) {
  expect_shape(kOp, "x", x, {-1, -1});
  expect(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128, kOp,
         "：group_size 应为 0（int8）或 32、64、128（int4），实际是 ", group_size, "。");
  const dso_act act = act_of(kOp, activation, alpha, limit, gated);
  expect(shared.empty() || gated, kOp, "：有 shared 时必须有门。");
  const Stack up =
      stack_of("gate_up", gate_up, gate_up_scale, gate_up_zero, -1, x.size(1), group_size);
  expect(!gated || up.rows % 2 == 0, kOp, "：gate_up 应由等宽的 gate 与 up 组成，实际宽 ", up.rows,
         "。");
  Experts m;
  m.x = row_major(x), m.routed = gate_up.size(0), m.inner = gated ? up.rows / 2 : up.rows;
  const Stack last = stack_of("down", down, down_scale, down_zero, m.routed, m.inner, group_size);
  m.in.n = last.rows;
  fill_routing(kOp, m, indices, weights, shared.empty() ? 0 : 1);
  m.list.reserve(static_cast<size_t>(m.routed + 1));
  for (int64_t e = 0; e < m.routed; e++) {
    dso_expert one{};
    one.inner = m.inner, one.bias_step = 1;
    one.gate = up.mat(e, 0), one.gate_quant = up.quant(e, 0);
    one.up.dtype = up.type;
    if (gated) one.up = up.mat(e, m.inner), one.up_quant = up.quant(e, m.inner);
    one.down = last.mat(e, 0), one.down_quant = last.quant(e, 0);
    m.list.push_back(one);
  }
  fill_shared(kOp, m, shared);
  prepare(kOp, m, act, false);
  Tensor y = torch::stable::new_empty(x, {m.in.tokens, m.in.n});
  dso_moe_params p{m.in, y.mutable_data_ptr()};
  if (m.in.tokens > 0 && m.in.n > 0) execute(dso_moe_experts, &p);
  return y;
}
}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("moe_experts_quantized", TORCH_BOX(&dso::moe_experts_quantized));
}
