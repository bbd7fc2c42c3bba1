// linear、swiglu_mlp 的参数检查（CPU 与 CUDA 的绑定共用）。
#pragma once

#include "binding.h"

namespace dso {

inline void check_linear(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias) {
  const char *op = "linear";
  expect(x.dim() >= 1, "linear：x 至少要有 1 维。");
  expect_shape(op, "weight", weight, {-1, x.size(x.dim() - 1)});
  float_dtype(op, "x", x);
  float_dtype(op, "weight", weight);
  if (!bias) return;
  expect_shape(op, "bias", *bias, {weight.size(0)});
  expect_type(op, "bias", *bias, weight.scalar_type());
}

inline void check_linear_backward(const Tensor &grad, const Tensor &x, const Tensor &weight) {
  const char *op = "linear_backward";
  const int64_t n = weight.size(0), k = weight.size(1);
  expect(grad.dim() == x.dim() && grad.size(grad.dim() - 1) == n && x.size(x.dim() - 1) == k &&
             rows_of(grad) == rows_of(x),
         op, "：grad 应为 [..., ", n, "]、x 应为 [..., ", k, "]，实际是 ", shape_of(grad), " 与 ",
         shape_of(x), "。");
  float_dtype(op, "grad", grad);
  float_dtype(op, "x", x);
  float_dtype(op, "weight", weight);
}

struct MlpDims {
  int64_t k, inner, n;
};

inline MlpDims mlp_dims(const char *op, const Tensor &x, const Tensor &gate, const Tensor &up,
                        const Tensor &down) {
  expect(x.dim() >= 1, op, "：x 至少要有 1 维。");
  const int64_t k = x.size(x.dim() - 1);
  expect_shape(op, "gate", gate, {-1, k});
  const int64_t inner = gate.size(0);
  expect_shape(op, "up", up, {inner, k});
  expect_shape(op, "down", down, {-1, inner});
  float_dtype(op, "x", x);
  float_dtype(op, "gate", gate);
  expect_type(op, "up", up, gate.scalar_type());
  expect_type(op, "down", down, gate.scalar_type());
  return {k, inner, down.size(0)};
}

inline void check_mlp_grad(const char *op, const Tensor &grad, const Tensor &x, int64_t n) {
  expect(grad.size(grad.dim() - 1) == n && rows_of(grad) == rows_of(x), op, "：grad 应为 [..., ", n,
         "]，实际是 ", shape_of(grad), "。");
  float_dtype(op, "grad", grad);
}

}  // namespace dso
