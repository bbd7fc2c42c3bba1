// CUDA 绑定的公用部分：启动的错误、设备检查、交给 torch（cuBLAS）的矩阵乘。
// schema 在 csrc/binding.cpp；_C_cuda.so 只登记实现，单独成库，只在带 CUDA 的 torch 上加载。
#pragma once

#include <binding_device.h>

#include <array>

#include "dso_cuda.h"

namespace dso {

inline void check(const char *op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("deepseek_opt：") + op + " 启动失败：" +
                           cudaGetErrorString(error) + "。");
}

// t 应与 like 在同一设备上。
inline void expect_device(const char *op, const char *name, const Tensor &t, const Tensor &like) {
  const bool same = on_device(t) && t.get_device() == like.get_device();
  expect(same, op, "：", name, " 应与其他张量同在设备 cuda:", static_cast<int>(like.get_device()),
         " 上，实际在 ", on_device(t) ? "另一块 GPU" : "CPU", " 上。");
}

inline Tensor scratch_of(const Tensor &like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes / 4 + 1)}, ScalarType::Float);
}

inline Tensor to_type(const Tensor &t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// out [H, M, N] = a [H, M, K] b [H, K, N]；各张量步长任意，最后两维之一的步长为 1 就不复制。
inline void bmm_into(const Tensor &out, const Tensor &a, const Tensor &b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // 收下返回的引用
}

// out [M, N] = a [M, K] b [K, N]。
inline void mm_into(const Tensor &out, const Tensor &a, const Tensor &b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// total + part，类型随 total（稳定 ABI 里没有带 Scalar 的 add）。
inline Tensor sum_of(const Tensor &total, const Tensor &part) {
  return torch::stable::subtract(total, part, -1.0);
}

}  // namespace dso
