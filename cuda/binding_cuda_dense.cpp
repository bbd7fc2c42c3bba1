// 归一化的 CUDA 绑定：检查参数（与 csrc/binding_dense.cpp 同样的消息），分配输出，在当前流上启动。
#include <tuple>

#include "binding_cuda.h"

namespace dso {
namespace {

dso_rms_norm_params norm_params(const char *op, const Tensor &rows, const Tensor &weight,
                                double eps, Tensor &y) {
  const int64_t dim = rows.size(rows.dim() - 1);
  expect_shape(op, "weight", weight, {dim});
  expect_device(op, "weight", weight, rows);
  dso_rms_norm_params p = {};
  p.rows = rows_of(rows), p.dim = dim, p.eps = static_cast<float>(eps);
  p.x = mat_of(rows, float_dtype(op, "x", rows));
  p.weight = weight.const_data_ptr(), p.weight_dtype = float_dtype(op, "weight", weight);
  p.y = y.mutable_data_ptr();
  return p;
}

std::vector<int64_t> sizes_of(const char *op, const Tensor &x) {
  expect(x.dim() >= 1, op, "：x 至少要有 1 维。");
  return sizes_with_last(x, x.size(x.dim() - 1));
}

}  // namespace

Tensor rms_norm(const Tensor &x, const Tensor &weight, double eps) {
  const auto sizes = sizes_of("rms_norm", x);
  Tensor rows = as_rows(x), w = torch::stable::contiguous(weight);
  Tensor y = torch::stable::new_empty(x, sizes);
  dso_rms_norm_params p = norm_params("rms_norm", rows, w, eps, y);
  check("rms_norm", dso_cuda_rms_norm(&p, Launch(x).stream()));
  return y;
}

namespace {

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor &x, const Tensor &residual,
                                        const Tensor &weight, double eps) {
  const char *op = "add_rms_norm";
  const auto sizes = sizes_of(op, x);
  expect(shape_of(x) == shape_of(residual), op, "：residual 的形状应与 x ", shape_of(x),
         " 相同，实际是 ", shape_of(residual), "。");
  expect_type(op, "residual", residual, x.scalar_type());
  expect_device(op, "residual", residual, x);
  Tensor rows = as_rows(x), extra = as_rows(residual), w = torch::stable::contiguous(weight);
  Tensor y = torch::stable::new_empty(x, sizes), total = torch::stable::new_empty(x, sizes);
  dso_rms_norm_params p = norm_params(op, rows, w, eps, y);
  p.residual = mat_of(extra, p.x.dtype);
  p.total = total.mutable_data_ptr();
  check(op, dso_cuda_rms_norm(&p, Launch(x).stream()));
  return {y, total};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor &grad, const Tensor &x,
                                             const Tensor &weight, double eps) {
  const char *op = "rms_norm_backward";
  const auto sizes = sizes_of(op, x);
  expect(shape_of(grad) == shape_of(x), op, "：grad 的形状应与 x ", shape_of(x), " 相同，实际是 ",
         shape_of(grad), "。");
  expect_shape(op, "weight", weight, {sizes.back()});
  expect_device(op, "grad", grad, x);
  expect_device(op, "weight", weight, x);
  Tensor g = as_rows(grad), rows = as_rows(x), w = torch::stable::contiguous(weight);
  Tensor dx = torch::stable::new_empty(x, sizes);
  Tensor dw = torch::stable::new_empty(weight, {sizes.back()});
  dso_rms_norm_backward_params p = {};
  p.rows = rows_of(x), p.dim = sizes.back(), p.eps = static_cast<float>(eps);
  p.grad = mat_of(g, float_dtype(op, "grad", grad)), p.x = mat_of(rows, float_dtype(op, "x", x));
  p.weight = w.const_data_ptr(), p.weight_dtype = float_dtype(op, "weight", weight);
  p.dx = dx.mutable_data_ptr(), p.dw = dw.mutable_data_ptr();
  const auto bytes = static_cast<int64_t>(dso_cuda_rms_norm_backward_scratch(p.rows, p.dim));
  Tensor scratch = torch::stable::new_empty(x, {bytes / 4}, ScalarType::Float);
  check(op, dso_cuda_rms_norm_backward(&p, scratch.mutable_data_ptr(), Launch(x).stream()));
  return {dx, dw};
}

}  // namespace
}  // namespace dso

DSO_DEVICE_LIBRARY(m) {
  m.impl("rms_norm", TORCH_BOX(&dso::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&dso::rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&dso::add_rms_norm));
}
