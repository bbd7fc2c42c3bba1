// linear、swiglu_mlp、rms_norm 及其反向的 CPU 绑定。
#include "binding_dense.h"

#include "binding_buffers.h"

namespace dso {

Tensor linear(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias) {
  check_linear(x, weight, bias);
  const int64_t k = weight.size(1), n = weight.size(0);
  const dso_dtype type = float_dtype("linear", "x", x),
                  w_type = float_dtype("linear", "weight", weight);
  Tensor bias_rows = bias ? torch::stable::contiguous(*bias) : Tensor();
  Tensor rows = as_rows(x), w = row_major(weight);
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, n));
  dso_linear_params p{rows_of(x),
                      n,
                      k,
                      mat_of(rows, type),
                      mat_of(w, w_type),
                      bias ? bias_rows.const_data_ptr() : nullptr,
                      y.mutable_data_ptr(),
                      type};
  if (p.m > 0 && n > 0) execute(dso_linear, &p);
  return y;
}

namespace {

Tensor none_like(const Tensor &t) { return torch::stable::new_empty(t, {0}); }

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor &grad, const Tensor &x,
                                                   const Tensor &weight, bool need_x,
                                                   bool need_weight, bool need_bias) {
  check_linear_backward(grad, x, weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  const dso_dtype g_type = float_dtype("linear_backward", "grad", grad),
                  type = float_dtype("linear_backward", "x", x),
                  w_type = float_dtype("linear_backward", "weight", weight);
  Tensor g = as_rows(grad), rows = as_rows(x), w = row_major(weight);
  Tensor dx = need_x ? torch::stable::new_empty(x, sizes_with_last(x, k)) : none_like(x);
  Tensor dw = need_weight ? pooled_empty(weight, {n, k}) : none_like(weight);
  Tensor db = need_bias ? torch::stable::new_empty(weight, {n}) : none_like(weight);
  const int64_t m = rows_of(x);
  if (m == 0) {
    if (need_weight) torch::stable::zero_(dw);
    if (need_bias) torch::stable::zero_(db);
    return {dx, dw, db};
  }
  dso_linear_backward_params p{m,
                               n,
                               k,
                               mat_of(g, g_type),
                               mat_of(rows, type),
                               mat_of(w, w_type),
                               need_x ? dx.mutable_data_ptr() : nullptr,
                               need_weight ? dw.mutable_data_ptr() : nullptr,
                               need_bias ? db.mutable_data_ptr() : nullptr};
  execute(dso_linear_backward, &p);
  return {dx, dw, db};
}

Tensor swiglu_mlp(const Tensor &x, const Tensor &gate, const Tensor &up, const Tensor &down) {
  const MlpDims d = mlp_dims("swiglu_mlp", x, gate, up, down);
  const dso_dtype type = float_dtype("swiglu_mlp", "x", x),
                  w = float_dtype("swiglu_mlp", "gate", gate);
  Tensor rows = as_rows(x), g = row_major(gate), u = row_major(up), o = row_major(down);
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, d.n));
  dso_swiglu_mlp_params p{rows_of(x),          d.n,          d.k,          d.inner,
                          mat_of(rows, type),  mat_of(g, w), mat_of(u, w), mat_of(o, w),
                          y.mutable_data_ptr()};
  if (d.k == 0 || d.inner == 0)  // 空的求和
    torch::stable::zero_(y);
  else if (p.m > 0)
    execute(dso_swiglu_mlp, &p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_mlp_backward(const Tensor &grad, const Tensor &x,
                                                               const Tensor &gate, const Tensor &up,
                                                               const Tensor &down) {
  const MlpDims d = mlp_dims("swiglu_mlp_backward", x, gate, up, down);
  check_mlp_grad("swiglu_mlp_backward", grad, x, d.n);
  const dso_dtype type = float_dtype("swiglu_mlp_backward", "x", x),
                  g_type = float_dtype("swiglu_mlp_backward", "grad", grad),
                  w = float_dtype("swiglu_mlp_backward", "gate", gate);
  Tensor gr = as_rows(grad), rows = as_rows(x), g = row_major(gate), u = row_major(up),
         o = row_major(down);
  Tensor dx = torch::stable::new_empty(x, sizes_with_last(x, d.k));
  Tensor dg = pooled_empty(gate, {d.inner, d.k}), du = pooled_empty(up, {d.inner, d.k});
  Tensor dd = pooled_empty(down, {d.n, d.inner});
  const int64_t m = rows_of(x);
  if (m == 0 || d.k == 0 || d.inner == 0 || d.n == 0) {  // 空的求和
    for (Tensor *t : {&dx, &dg, &du, &dd}) torch::stable::zero_(*t);
    return {dx, dg, du, dd};
  }
  dso_swiglu_mlp_backward_params p{m,
                                   d.n,
                                   d.k,
                                   d.inner,
                                   mat_of(gr, g_type),
                                   mat_of(rows, type),
                                   mat_of(g, w),
                                   mat_of(u, w),
                                   mat_of(o, w),
                                   dx.mutable_data_ptr(),
                                   dg.mutable_data_ptr(),
                                   du.mutable_data_ptr(),
                                   dd.mutable_data_ptr()};
  execute(dso_swiglu_mlp_backward, &p);
  return {dx, dg, du, dd};
}

dso_rms_norm_params norm_params(const char *op, const Tensor &rows, const Tensor &weight,
                                double eps, Tensor &y) {
  expect(rows.dim() >= 1, op, "：x 至少要有 1 维。");
  const int64_t dim = rows.size(rows.dim() - 1);
  expect_shape(op, "weight", weight, {dim});
  return {rows_of(rows),
          dim,
          mat_of(rows, float_dtype(op, "x", rows)),
          {nullptr, 0, DSO_F32},
          weight.const_data_ptr(),
          float_dtype(op, "weight", weight),
          y.mutable_data_ptr(),
          nullptr,
          static_cast<float>(eps)};
}

Tensor rms_norm(const Tensor &x, const Tensor &weight, double eps) {
  Tensor rows = as_rows(x), w = torch::stable::contiguous(weight);
  expect(x.dim() >= 1, "rms_norm：x 至少要有 1 维。");
  Tensor y = torch::stable::new_empty(x, sizes_with_last(x, x.size(x.dim() - 1)));
  dso_rms_norm_params p = norm_params("rms_norm", rows, w, eps, y);
  if (p.rows > 0) execute(dso_rms_norm, &p);
  return y;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor &x, const Tensor &residual,
                                        const Tensor &weight, double eps) {
  expect(x.dim() >= 1 && x.dim() == residual.dim() && shape_of(x) == shape_of(residual),
         "add_rms_norm：residual 的形状应与 x ", shape_of(x), " 相同，实际是 ", shape_of(residual),
         "。");
  expect_type("add_rms_norm", "residual", residual, x.scalar_type());
  Tensor rows = as_rows(x), extra = as_rows(residual), w = torch::stable::contiguous(weight);
  const auto sizes = sizes_with_last(x, x.size(x.dim() - 1));
  Tensor y = torch::stable::new_empty(x, sizes), total = torch::stable::new_empty(x, sizes);
  dso_rms_norm_params p = norm_params("add_rms_norm", rows, w, eps, y);
  p.residual = mat_of(extra, p.x.dtype);
  p.total = total.mutable_data_ptr();
  if (p.rows > 0) execute(dso_rms_norm, &p);
  return {y, total};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor &grad, const Tensor &x,
                                             const Tensor &weight, double eps) {
  expect(shape_of(grad) == shape_of(x), "rms_norm_backward：grad 的形状应与 x ", shape_of(x),
         " 相同，实际是 ", shape_of(grad), "。");
  const int64_t dim = x.size(x.dim() - 1);
  expect_shape("rms_norm_backward", "weight", weight, {dim});
  const dso_dtype g_type = float_dtype("rms_norm_backward", "grad", grad),
                  type = float_dtype("rms_norm_backward", "x", x),
                  w_type = float_dtype("rms_norm_backward", "weight", weight);
  Tensor g = as_rows(grad), rows = as_rows(x), w = torch::stable::contiguous(weight);
  Tensor dx = torch::stable::new_empty(x, sizes_with_last(x, dim)),
         dw = torch::stable::new_empty(weight, {dim});
  dso_rms_norm_backward_params p{rows_of(x),
                                 dim,
                                 mat_of(g, g_type),
                                 mat_of(rows, type),
                                 w.const_data_ptr(),
                                 w_type,
                                 dx.mutable_data_ptr(),
                                 dw.mutable_data_ptr(),
                                 static_cast<float>(eps)};
  if (p.rows > 0)
    execute(dso_rms_norm_backward, &p);
  else
    torch::stable::zero_(dw);
  return {dx, dw};
}

}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m) {
  m.impl("linear", TORCH_BOX(&dso::linear));
  m.impl("linear_backward", TORCH_BOX(&dso::linear_backward));
  m.impl("swiglu_mlp", TORCH_BOX(&dso::swiglu_mlp));
  m.impl("swiglu_mlp_backward", TORCH_BOX(&dso::swiglu_mlp_backward));
  m.impl("rms_norm", TORCH_BOX(&dso::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&dso::rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&dso::add_rms_norm));
}
