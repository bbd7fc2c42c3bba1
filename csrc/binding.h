// 绑定层的公用部分：参数检查（中文消息）、张量到 C 结构体的转换、在 torch 线程池上执行算子。
// 只有 binding*.cpp 见得到 torch。
#pragma once

#include "binding_torch.h"  // 要在 torch 的头文件之前

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dso.h"

namespace dso {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor &t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); i++) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

inline const char *dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    default:
      return "其他类型";
  }
}

// std::invalid_argument 在 Python 里是 ValueError。
template <class... Parts>
void expect(bool ok, const Parts &...parts) {
  if (ok) return;
  std::ostringstream text;
  text << "deepseek_opt：";
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

// 形状检查；-1 表示任意。
inline void expect_shape(const char *op, const char *name, const Tensor &t,
                         std::initializer_list<int64_t> want) {
  bool same = t.dim() == static_cast<int64_t>(want.size());
  int64_t axis = 0;
  for (int64_t size : want) {
    same = same && (size < 0 || t.size(axis) == size);
    axis++;
  }
  if (same) return;
  std::ostringstream text;
  const char *comma = "";
  for (int64_t size : want) {
    text << comma;
    comma = ", ";
    if (size < 0)
      text << "*";
    else
      text << size;
  }
  expect(false, op, "：", name, " 的形状应为 [", text.str(), "]，实际是 ", shape_of(t), "。");
}

inline dso_dtype float_dtype(const char *op, const char *name, const Tensor &t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DSO_F32;
    case ScalarType::BFloat16:
      return DSO_BF16;
    case ScalarType::Half:
      return DSO_F16;
    default:
      expect(false, op, "：", name, " 的类型应为 float32、bfloat16 或 float16，实际是 ",
             dtype_name(t.scalar_type()), "。");
      return DSO_F32;
  }
}

inline void expect_type(const char *op, const char *name, const Tensor &t, ScalarType want) {
  expect(t.scalar_type() == want, op, "：", name, " 的类型应为 ", dtype_name(want), "，实际是 ",
         dtype_name(t.scalar_type()), "。");
}

// 最后一维步长为 1 的张量（否则复制成连续的）。
inline Tensor row_major(const Tensor &t) {
  return t.dim() == 0 || t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) <= 1
             ? t
             : torch::stable::contiguous(t);
}

// [..., K] 看成 [M, K]；合不成单一行距时复制。
inline Tensor as_rows(const Tensor &t) {
  if (t.dim() == 2) return row_major(t);
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline int64_t rows_of(const Tensor &t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); i++) rows *= t.size(i);
  return rows;
}

inline dso_mat mat_of(const Tensor &t, dso_dtype dtype) {
  int64_t width = t.size(t.dim() - 1);
  return {t.const_data_ptr(), t.dim() == 2 ? t.stride(0) : width, dtype};
}

inline std::vector<int64_t> sizes_with_last(const Tensor &t, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < t.dim(); i++) sizes.push_back(t.size(i));
  sizes.push_back(last);
  return sizes;
}

// 逐阶段执行；每阶段的任务由各线程从同一计数器领取，负载自动均衡，结果与领取次序无关。
void execute(const dso_op &op, const void *params);

// linear 算子本身：别的算子的绑定也用它。
Tensor linear(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias);

}  // namespace dso
