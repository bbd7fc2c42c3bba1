// CUDA 绑定的公用部分：启动的错误、设备检查、交给 torch（cuBLAS）的矩阵乘。
// schema 在 csrc/binding.cpp；_C_cuda.so 只登记实现，单独成库，只在带 CUDA 的 torch 上加载。
#pragma once

#include <binding_device.h>

#include <array>

#include "dso_cuda.h"

namespace dso {

inline void check(const char *op, cudaError_t error) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorNoKernelImageForDevice)
    throw std::runtime_error(std::string("deepseek_opt：") + op +
                             " 启动失败：这块 GPU 太旧，需要计算能力 8.0（Ampere）及更新的。");
  throw std::runtime_error(std::string("deepseek_opt：") + op + " 启动失败：" +
                           cudaGetErrorString(error) + "。");
}

// 派发到这里的总有一个张量在设备上；x 却不在。要在 Launch(x) 之前：那里没有设备可切换。
inline void expect_on_device(const char *op, const Tensor &x) {
  expect(on_device(x), op, "：全部张量应在同一设备上，实际有的在 CPU 上，有的在 CUDA 设备上。");
}

// t 应与 like 在同一设备上。
inline void expect_device(const char *op, const char *name, const Tensor &t, const Tensor &like) {
  expect_on_device(op, like);
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

// 各张量共同的类型；不同则 fp32。
inline ScalarType common_type(const Tensor &a, const Tensor &b) {
  return a.scalar_type() == b.scalar_type() ? a.scalar_type() : ScalarType::Float;
}

// 绑定里调用 torch 的算子时不记录求导：我们的反向另有算子。
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  NoGrad(const NoGrad &) = delete;
  NoGrad &operator=(const NoGrad &) = delete;
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }

 private:
  bool before_;
};

// 以下交给 torch（cuBLAS）；都是写进 out 的那一种：autocast 不管它们，类型就是我们给的。
template <size_t N>
void call_out(const char *name, const char *overload, std::array<StableIValue, N> stack) {
  if (torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION) != TORCH_SUCCESS)
    torch_failed(name);
  torch::stable::detail::to<Tensor>(stack[0]);  // 收下返回的引用
}

// total + part，类型随 total（稳定 ABI 里没有带 Scalar 的 add）。
inline Tensor sum_of(const Tensor &total, const Tensor &part) {
  return torch::stable::subtract(total, part, -1.0);
}

// out [H, M, N] = a [H, M, K] b [H, K, N]；各张量步长任意，最后两维之一的步长为 1 就不复制。
inline void bmm_into(const Tensor &out, const Tensor &a, const Tensor &b) {
  using torch::stable::detail::from;
  call_out<3>("aten::bmm", "out", {from(a), from(b), from(out)});
}

// out [M, N] = a [M, K] b [K, N]
inline void mm_into(const Tensor &out, const Tensor &a, const Tensor &b) {
  using torch::stable::detail::from;
  call_out<3>("aten::mm", "out", {from(a), from(b), from(out)});
}

// 同上，a、b 是 16 位的同一种类型，out 是 fp32；只在 HAS_WIDE_MM 时。
inline void mm_wide_into(const Tensor &out, const Tensor &a, const Tensor &b) {
  using torch::stable::detail::from;
  call_out<4>("aten::mm", "dtype_out", {from(a), from(b), from(ScalarType::Float), from(out)});
}

// out [M, N] = x [M, K] weightᵀ + bias
inline void linear_into(const Tensor &out, const Tensor &x, const Tensor &weight,
                        const std::optional<Tensor> &bias) {
  using torch::stable::detail::from;
  call_out<4>("aten::linear", "out", {from(x), from(weight), from(bias), from(out)});
}

// x 与两个权重各自的 linear；行极少时一起算。
std::pair<Tensor, Tensor> linear_pair(const Tensor &x, const Tensor &first,
                                      const std::optional<Tensor> &first_bias, const Tensor &second,
                                      const std::optional<Tensor> &second_bias);

// [..., K] 看成 [M, K]。
inline Tensor flat_rows(const Tensor &t) {
  return torch::stable::view(as_rows(t), {rows_of(t), t.size(t.dim() - 1)});
}

// 算子本身：别的算子的绑定也用它（linear 在 binding.h 里声明）。
Tensor rms_norm(const Tensor &x, const Tensor &weight, double eps);

}  // namespace dso
