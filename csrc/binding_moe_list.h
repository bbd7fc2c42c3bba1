// moe_experts_list 的参数：每个专家是几个单独的张量；CPU 与 CUDA 的绑定共用。
#pragma once

#include "binding_moe.h"

namespace dso {

using Tensors = std::vector<Tensor>;

// 逐专家的权重与偏置；up 为空而有门时，gate 是上下相接的 [2 I, K]。张量要活到执行结束。
struct Lists {
  Tensors gate, up, down, gate_bias, up_bias, down_bias;

  bool is_joint(bool gated) const { return gated && up.empty(); }
};

inline std::string nth(const char *name, size_t e) {
  return std::string(name) + "[" + std::to_string(e) + "]";
}

inline void check_count(const char *op, const char *name, const Tensors &list, size_t want,
                        bool optional) {
  expect(list.size() == want || (optional && list.empty()), op, "：", name, " 应有 ", want,
         " 个张量（每个专家一个）", optional ? "或为空" : "", "，实际有 ", list.size(), " 个。");
}

// 每个张量的最后一维步长为 1（否则复制），类型都与 gate[0] 相同。
inline void check_list(const char *op, const char *name, Tensors &list, ScalarType type) {
  for (size_t e = 0; e < list.size(); e++) {
    expect_type(op, nth(name, e).c_str(), list[e], type);
    list[e] = row_major(list[e]);
  }
}

inline void check_counts(const char *op, const Lists &w, bool gated) {
  const size_t experts = w.gate.size();
  expect(experts > 0, op, "：gate 应至少有一个专家，实际为空。");
  check_count(op, "up", w.up, experts, true);
  expect(gated || w.up.empty(), op, "：gated 为 False 时 up 应为空，实际有 ", w.up.size(), " 个。");
  check_count(op, "down", w.down, experts, false);
  check_count(op, "gate_bias", w.gate_bias, experts, true);
  check_count(op, "up_bias", w.up_bias, w.up.size(), true);
  check_count(op, "down_bias", w.down_bias, experts, true);
}

// 一个专家的形状；返回中间宽。
inline int64_t check_expert(const char *op, const Lists &w, size_t e, int64_t k, int64_t n,
                            bool gated) {
  expect_shape(op, nth("gate", e).c_str(), w.gate[e], {-1, k});
  const int64_t rows = w.gate[e].size(0), times = w.is_joint(gated) ? 2 : 1;
  expect(rows % times == 0, op, "：", nth("gate", e), " 应由等宽的 gate 与 up 组成，实际宽 ", rows,
         "。");
  if (!w.up.empty()) expect_shape(op, nth("up", e).c_str(), w.up[e], {rows, k});
  expect_shape(op, nth("down", e).c_str(), w.down[e], {n, rows / times});
  if (!w.gate_bias.empty()) expect_shape(op, nth("gate_bias", e).c_str(), w.gate_bias[e], {rows});
  if (!w.up_bias.empty()) expect_shape(op, nth("up_bias", e).c_str(), w.up_bias[e], {rows});
  if (!w.down_bias.empty()) expect_shape(op, nth("down_bias", e).c_str(), w.down_bias[e], {n});
  return rows / times;
}

inline const void *at(const Tensors &list, size_t e, int64_t skip, dso_dtype type) {
  if (list.empty()) return nullptr;
  return static_cast<const char *>(list[e].const_data_ptr()) + skip * (type == DSO_F32 ? 4 : 2);
}

inline dso_expert expert_of(const Lists &w, size_t e, int64_t inner, dso_dtype type, bool gated) {
  const bool joint = w.is_joint(gated);
  dso_expert out{};
  out.inner = inner, out.bias_dtype = type, out.bias_step = 1;
  out.gate = mat_of(w.gate[e], type), out.down = mat_of(w.down[e], type);
  out.up = {nullptr, 0, type};
  if (joint) out.up = {at(w.gate, e, inner * out.gate.rs, type), out.gate.rs, type};
  if (!w.up.empty()) out.up = mat_of(w.up[e], type);
  out.gate_bias = at(w.gate_bias, e, 0, type);
  out.up_bias = joint ? at(w.gate_bias, e, inner, type) : at(w.up_bias, e, 0, type);
  out.down_bias = at(w.down_bias, e, 0, type);
  return out;
}

struct ListOptions {
  std::string activation;
  double alpha, limit;
  bool gated;
};

// x、各专家的权重：检查并填 list 与 in 的 n、gated；返回激活。
inline dso_act check_experts(const char *op, Experts &m, Lists &w, const Tensor &x,
                             const Tensors &shared, const ListOptions &options) {
  expect_shape(op, "x", x, {-1, -1});
  check_counts(op, w, options.gated);
  const dso_dtype type = float_dtype(op, "gate[0]", w.gate[0]);
  const ScalarType scalar = w.gate[0].scalar_type();
  const dso_act act = act_of(op, options.activation, options.alpha, options.limit, options.gated);
  expect(shared.empty() || options.gated, op, "：有 shared 时必须有门。");
  check_list(op, "gate", w.gate, scalar), check_list(op, "up", w.up, scalar);
  check_list(op, "down", w.down, scalar), check_list(op, "gate_bias", w.gate_bias, scalar);
  check_list(op, "up_bias", w.up_bias, scalar), check_list(op, "down_bias", w.down_bias, scalar);
  expect_shape(op, "down[0]", w.down[0], {-1, -1});
  m.x = row_major(x), m.routed = static_cast<int64_t>(w.gate.size()), m.in.n = w.down[0].size(0);
  m.list.reserve(w.gate.size() + 1);
  for (size_t e = 0; e < w.gate.size(); e++) {
    const int64_t inner = check_expert(op, w, e, m.x.size(1), m.in.n, options.gated);
    m.list.push_back(expert_of(w, e, inner, type, options.gated));
  }
  m.in.gated = options.gated;
  return act;
}

}  // namespace dso
