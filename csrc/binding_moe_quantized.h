// moe_experts_quantized 的参数：int8、int4、fp8 的专家；CPU 与 CUDA 的绑定共用。
#pragma once

#include "binding_moe.h"

namespace dso {
namespace quantized {

inline constexpr const char *kOp = "moe_experts_quantized";
constexpr int64_t kSingle = -2;  // 共享专家：没有专家这一维

// 一叠量化的矩阵 [E, R, C]：int8 [E, R, C] 与尺度 [E, R]；int4 每行 ⌈C / 组⌉ 组，打包成
// [E, R, 组数 * 组 / 2] uint8，尺度、零点 [E, R, 组数]；fp8 [E, R, C]，尺度 [E, R]（组为 0）或 [E, R, 组数]
// （组为 128）。共享专家是单个矩阵，没有 E 这一维。张量要活到执行结束。
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

inline void check_codes(const std::string &name, const Tensor &t, ScalarType want,
                        const char *text) {
  expect(t.scalar_type() == want, kOp, "：", name, " 的类型应为 ", text, "，实际是 ",
         t.scalar_type() == ScalarType::Byte ? "uint8" : dtype_name(t.scalar_type()), "。");
}

// 要求的形状：专家数（-1 任意，kSingle 没有这一维）、行数（-1 任意）、没有打包时的列数。
struct Want {
  int64_t experts, rows, columns;

  void check(const std::string &name, const Tensor &t, int64_t r, int64_t c) const {
    if (experts == kSingle)
      expect_shape(kOp, name.c_str(), t, {r, c});
    else
      expect_shape(kOp, name.c_str(), t, {experts, r, c});
  }
  void check(const std::string &name, const Tensor &t, int64_t r) const {
    if (experts == kSingle)
      expect_shape(kOp, name.c_str(), t, {r});
    else
      expect_shape(kOp, name.c_str(), t, {experts, r});
  }
};

struct Names {
  std::string packed, scale, zero;
};

// 一叠权重的格式与组；由第一个张量的类型与 group_size 定。
struct Format {
  dso_dtype type;
  int64_t group;
};

inline void check_packed(const std::string &name, const Tensor &packed) {
  expect(packed.defined(), kOp, "：", name, " 应为张量，实际是 None。");
}

// fp8 由类型分辨；其余的 group_size 大于 0 是 int4，为 0 是 int8（类型由 stack_of 核对）。
inline Format format_of(const std::string &name, const Tensor &packed, int64_t group_size) {
  check_packed(name, packed);
  if (packed.scalar_type() == ScalarType::Float8_e4m3fn) {
    expect(group_size == 0 || group_size == 128, kOp, "：group_size 应为 0 或 128（", name,
           " 是 fp8），实际是 ", group_size, "。");
    return {DSO_F8, group_size};
  }
  return {group_size > 0 ? DSO_I4 : DSO_I8, group_size};
}

inline void check_codes(const std::string &name, const Tensor &packed, dso_dtype type) {
  if (type == DSO_F8)
    check_codes(name, packed, ScalarType::Float8_e4m3fn, "float8_e4m3fn（与 gate_up 相同）");
  else if (type == DSO_I4)
    check_codes(name, packed, ScalarType::Byte, "uint8（group_size 大于 0 时是 int4）");
  else
    check_codes(name, packed, ScalarType::Char, "int8（group_size 为 0 时）");
}

inline Stack stack_of(const Names &name, const Tensor &packed, const Tensor &scale,
                      const std::optional<Tensor> &zero, Want want, Format format) {
  const int64_t group = format.group;
  const bool int4 = format.type == DSO_I4;
  check_packed(name.packed, packed);
  expect(scale.defined(), kOp, "：", name.scale,
         " 应为张量（量化的权重必须有尺度），实际是 None。");
  Stack s{};
  s.type = format.type, s.group = group;
  s.groups = group ? (want.columns + group - 1) / group : 1;
  s.width = int4 ? s.groups * group / 2 : want.columns;
  check_codes(name.packed, packed, format.type);
  want.check(name.packed, packed, want.rows, s.width);
  s.rows = packed.size(packed.dim() - 2);
  if (want.experts != kSingle) want.experts = packed.size(0);
  expect_type(kOp, name.scale.c_str(), scale, ScalarType::Float);
  if (group)
    want.check(name.scale, scale, s.rows, s.groups);
  else
    want.check(name.scale, scale, s.rows);
  s.packed = torch::stable::contiguous(packed), s.scale = torch::stable::contiguous(scale);
  if (!zero) return s;
  expect(int4, kOp, "：", name.zero, " 应为 None（", format.type == DSO_F8 ? "fp8" : "int8",
         " 没有零点），实际给了。");
  check_codes(name.zero, *zero, ScalarType::Byte, "uint8");
  want.check(name.zero, *zero, s.rows, s.groups);
  s.zero = torch::stable::contiguous(*zero);
  return s;
}

inline Names named(const std::string &name) { return {name, name + "_scale", name + "_zero"}; }

inline dso_expert expert_of(const Stack &gate, int64_t gate_row, const Stack &up, int64_t up_row,
                            const Stack &down, int64_t e, int64_t inner) {
  dso_expert one{};
  one.inner = inner, one.bias_step = 1;
  one.gate = gate.mat(e, gate_row), one.gate_quant = gate.quant(e, gate_row);
  one.up = up.mat(e, up_row), one.up_quant = up.quant(e, up_row);
  one.down = down.mat(e, 0), one.down_quant = down.quant(e, 0);
  return one;
}

// 路由专家的偏置 [E, R]：浮点，gate_up 的与 down 的同一个类型。张量要活到执行结束。
inline Tensor bias_of(const char *name, const Tensor &bias, int64_t experts, int64_t rows) {
  expect_shape(kOp, name, bias, {experts, rows});
  float_dtype(kOp, name, bias);
  return torch::stable::contiguous(bias);
}

inline void fill_biases(Experts &m, int64_t rows, bool gated, const std::optional<Tensor> &gate_up,
                        const std::optional<Tensor> &down) {
  if (gate_up) m.gate_up_bias = bias_of("gate_up_bias", *gate_up, m.routed, rows);
  if (down) m.down_bias = bias_of("down_bias", *down, m.routed, m.in.n);
  if (gate_up && down) expect_type(kOp, "down_bias", *down, gate_up->scalar_type());
  if (!gate_up && !down) return;
  const dso_dtype type = float_dtype(kOp, "gate_up_bias", gate_up ? *gate_up : *down);
  const int64_t size = type == DSO_F32 ? 4 : 2;
  auto at = [size](const Tensor &t, int64_t index) {
    return static_cast<const char *>(t.const_data_ptr()) + index * size;
  };
  for (int64_t e = 0; e < m.routed; e++) {
    dso_expert &one = m.list[static_cast<size_t>(e)];
    one.bias_dtype = type;
    if (gate_up) one.gate_bias = at(m.gate_up_bias, e * rows);
    if (gate_up && gated) one.up_bias = at(m.gate_up_bias, e * rows + m.inner);
    if (down) one.down_bias = at(m.down_bias, e * m.in.n);
  }
}

// 量化的共享专家：格式由 gate 的类型分辨，int8 的可与 int4、fp8 的路由专家同用。kept 留住张量。
inline void add_quantized_shared(Experts &m, const std::vector<Tensor> &shared,
                                 const std::vector<Tensor> &scale, const std::vector<Tensor> &zero,
                                 int64_t group_size, std::vector<Stack> &kept) {
  if (!shared.empty()) check_shared_count(kOp, shared);
  expect(!shared.empty() && scale.size() == 3, kOp,
         "：shared_scale 应为空，或与 shared 的 gate、up、down 一一对应的 3 个，实际有 ",
         scale.size(), " 个，shared 有 ", shared.size(), " 个。");
  expect(zero.empty() || zero.size() == 3, kOp, "：shared_zero 应为空，或 3 个，实际有 ",
         zero.size(), " 个。");
  const int64_t k = m.x.size(1);
  const bool int8 = shared[0].scalar_type() == ScalarType::Char;
  const Format format = format_of("shared[0]", shared[0], int8 ? 0 : group_size);
  for (size_t i = 0; i < 3; i++) {
    const std::string at = "[" + std::to_string(i) + "]";
    const Want want{kSingle,
                    i == 0   ? -1
                    : i == 1 ? kept[0].rows
                             : m.in.n,
                    i == 2 ? kept[0].rows : k};
    std::optional<Tensor> zeros;
    if (!zero.empty()) zeros = zero[i];
    kept.push_back(stack_of({"shared" + at, "shared_scale" + at, "shared_zero" + at}, shared[i],
                            scale[i], zeros, want, format));
  }
  m.list.push_back(expert_of(kept[0], 0, kept[1], 0, kept[2], 0, kept[0].rows));
}

struct Options {
  std::string activation;
  double alpha, limit;
  bool gated;
  int64_t group_size;
};

// 路由专家的两叠权重，共享专家的在 kept（没有量化时为空）。张量要活到执行结束。
struct Stacks {
  Stack up, down;
  std::vector<Stack> kept;
};

// x、量化的权重：检查，填 routed、inner、in 的 n 与 gated；返回激活。
inline dso_act check_experts(Experts &m, Stacks &s, const Tensor &x, const Tensor &gate_up,
                             const Tensor &gate_up_scale, const std::optional<Tensor> &gate_up_zero,
                             const Tensor &down, const Tensor &down_scale,
                             const std::optional<Tensor> &down_zero,
                             const std::vector<Tensor> &shared, const Options &options) {
  const int64_t group_size = options.group_size;
  const bool gated = options.gated;
  expect_shape(kOp, "x", x, {-1, -1});
  expect(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128, kOp,
         "：group_size 应为 0（int8、fp8）或 32、64、128（int4；fp8 只有 128），实际是 ",
         group_size, "。");
  const dso_act act = act_of(kOp, options.activation, options.alpha, options.limit, gated);
  expect(shared.empty() || gated, kOp, "：有 shared 时必须有门。");
  const Format format = format_of("gate_up", gate_up, group_size);
  s.up =
      stack_of(named("gate_up"), gate_up, gate_up_scale, gate_up_zero, {-1, -1, x.size(1)}, format);
  expect(!gated || s.up.rows % 2 == 0, kOp, "：gate_up 应由等宽的 gate 与 up 组成，实际宽 ",
         s.up.rows, "。");
  m.x = row_major(x), m.routed = gate_up.size(0), m.inner = gated ? s.up.rows / 2 : s.up.rows;
  s.down = stack_of(named("down"), down, down_scale, down_zero, {m.routed, -1, m.inner}, format);
  m.in.n = s.down.rows, m.in.gated = gated;
  return act;
}

// 路由专家、它们的偏置、共享专家填进 list。
inline void add_experts(Experts &m, Stacks &s, const std::vector<Tensor> &shared,
                        const std::vector<Tensor> &shared_scale,
                        const std::vector<Tensor> &shared_zero,
                        const std::optional<Tensor> &gate_up_bias,
                        const std::optional<Tensor> &down_bias, const Options &options) {
  m.list.reserve(static_cast<size_t>(m.routed + 1));
  for (int64_t e = 0; e < m.routed; e++)
    m.list.push_back(expert_of(s.up, 0, s.up, options.gated ? m.inner : 0, s.down, e, m.inner));
  fill_biases(m, s.up.rows, options.gated, gate_up_bias, down_bias);
  if (!shared_scale.empty() || !shared_zero.empty())
    add_quantized_shared(m, shared, shared_scale, shared_zero, options.group_size, s.kept);
  else if (!shared.empty())
    add_shared(kOp, m, shared);
}

}  // namespace quantized
}  // namespace dso
