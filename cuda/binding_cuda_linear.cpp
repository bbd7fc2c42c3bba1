// linear、swiglu_mlp 及其反向的 CUDA 绑定：矩阵乘交给 torch（cuBLAS），激活是一个核；行极少时都是自己的核。
#include <tuple>

#include "binding_cuda.h"
#include "binding_dense.h"

namespace dso {

namespace {

// 同一个 x 的一个矩阵乘：y [M, N] 连续，三者同类型。
struct Product {
  const Tensor &y, &weight;
  const std::optional<Tensor> &bias;
};

bool part_of(dso_cuda_linear_part &part, const Product &product, int64_t k, dso_dtype dtype) {
  const Tensor &w = product.weight;
  part = {mat_of(w, dtype), nullptr, w.size(0), product.y.mutable_data_ptr(), w.size(0), 0, 0};
  if (product.bias) part.bias = product.bias->const_data_ptr();
  return (w.stride(1) == 1 || k == 1) && (!product.bias || product.bias->is_contiguous());
}

// 行极少、16 位时用自己的核一次算完一个或两个；gated 见 dso_cuda.h。返回 false：不合适，什么也没做。
bool small_product(const char *op, const Tensor &x, const Product &first,
                   const Product *second = nullptr, bool gated = false) {
  dso_cuda_linear_params p{};
  const dso_dtype dtype = float_dtype(op, "x", x);
  p.m = x.size(0), p.k = x.size(1), p.batch = 1, p.x = mat_of(x, dtype), p.gated = gated;
  if (!part_of(p.part[0], first, p.k, dtype)) return false;
  if (second && !part_of(p.part[1], *second, p.k, dtype)) return false;
  if (!dso_cuda_linear_fits(&p)) return false;
  check(op, dso_cuda_linear(&p, Launch(x).stream()));
  return true;
}

void product_into(const Tensor &y, const Tensor &x, const Tensor &weight,
                  const std::optional<Tensor> &bias) {
  if (!small_product("linear", x, {y, weight, bias})) linear_into(y, x, weight, bias);
}

}  // namespace

Tensor linear(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias) {
  check_linear(x, weight, bias);
  expect_device("linear", "weight", weight, x);
  if (bias) expect_device("linear", "bias", *bias, x);
  const NoGrad off;
  const int64_t m = rows_of(x), n = weight.size(0);
  const ScalarType type = common_type(x, weight);
  const std::optional<Tensor> b = bias ? std::optional<Tensor>(to_type(*bias, type)) : std::nullopt;
  Tensor y = torch::stable::new_empty(x, {m, n}, type);
  product_into(y, flat_rows(to_type(x, type)), to_type(weight, type), b);
  return torch::stable::view(to_type(y, x.scalar_type()), sizes_with_last(x, n));
}

std::pair<Tensor, Tensor> linear_pair(const Tensor &x, const Tensor &first,
                                      const std::optional<Tensor> &first_bias, const Tensor &second,
                                      const std::optional<Tensor> &second_bias) {
  const bool same =
      x.scalar_type() == first.scalar_type() && x.scalar_type() == second.scalar_type();
  if (same) {
    check_linear(x, first, first_bias), check_linear(x, second, second_bias);
    const NoGrad off;
    const Tensor rows = flat_rows(x);
    const int64_t m = rows.size(0), n = first.size(0), other = second.size(0);
    Tensor y = torch::stable::new_empty(x, {m, n}), z = torch::stable::new_empty(x, {m, other});
    const Product one{y, first, first_bias}, two{z, second, second_bias};
    if (small_product("linear", rows, one, &two))
      return {torch::stable::view(y, sizes_with_last(x, n)),
              torch::stable::view(z, sizes_with_last(x, other))};
  }
  return {linear(x, first, first_bias), linear(x, second, second_bias)};
}

namespace {

Tensor none_like(const Tensor &t) { return torch::stable::new_empty(t, {0}); }

// aᵀ b [N, K]，a [M, N]、b [M, K]。
Tensor transposed_product(const Tensor &a, const Tensor &b) {
  Tensor out = torch::stable::new_empty(a, {a.size(1), b.size(1)});
  mm_into(out, torch::stable::transpose(a, 0, 1), b);
  return out;
}

Tensor column_sum(const Tensor &rows) {
  const int64_t dim = 0;
  return torch::stable::sum(rows, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1));
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor &grad, const Tensor &x,
                                                   const Tensor &weight, bool need_x,
                                                   bool need_weight, bool need_bias) {
  const char *op = "linear_backward";
  check_linear_backward(grad, x, weight);
  expect_device(op, "grad", grad, x);
  expect_device(op, "weight", weight, x);
  const NoGrad off;
  const ScalarType type =
      grad.scalar_type() == x.scalar_type() ? common_type(x, weight) : ScalarType::Float;
  Tensor g = flat_rows(to_type(grad, type)), dx = none_like(x), dw = none_like(weight),
         db = none_like(weight);
  if (need_x) {
    Tensor out = torch::stable::new_empty(x, {g.size(0), weight.size(1)}, type);
    mm_into(out, g, to_type(weight, type));
    dx = torch::stable::view(to_type(out, x.scalar_type()), sizes_with_last(x, weight.size(1)));
  }
  if (need_weight)
    dw = to_type(transposed_product(g, flat_rows(to_type(x, type))), weight.scalar_type());
  if (need_bias) db = to_type(column_sum(g), weight.scalar_type());
  return {dx, dw, db};
}

// 一次调用的各个矩阵，换成共同的类型。
struct Mlp {
  ScalarType type;
  Tensor x, gate, up, down;
};

Mlp mlp_of(const char *op, const Tensor &x, const Tensor &gate, const Tensor &up,
           const Tensor &down) {
  expect_device(op, "gate", gate, x);
  expect_device(op, "up", up, x);
  expect_device(op, "down", down, x);
  const ScalarType type = common_type(x, gate);
  return {type, flat_rows(to_type(x, type)), to_type(gate, type), to_type(up, type),
          to_type(down, type)};
}

Tensor product(const Tensor &x, const Tensor &weight) {
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  product_into(out, x, weight, std::nullopt);
  return out;
}

// 激活的参数：前向写进 gate；反向（给出 dh）三个都改写，见 dso_cuda.h。
void activate(const char *op, const Tensor &gate, const Tensor &up, const Tensor *dh) {
  dso_cuda_silu_params p{gate.size(0) * gate.size(1), float_dtype(op, "gate", gate),
                         gate.mutable_data_ptr(), up.mutable_data_ptr(),
                         dh ? dh->mutable_data_ptr() : nullptr};
  check(op, dso_cuda_silu(&p, Launch(gate).stream()));
}

// silu(x gateᵀ) * (x upᵀ)
Tensor gated_product(const char *op, const Mlp &m) {
  const std::optional<Tensor> none;
  Tensor h = torch::stable::new_empty(m.x, {m.x.size(0), m.gate.size(0)});
  const Product up{h, m.up, none};
  if (small_product(op, m.x, {h, m.gate, none}, &up, true)) return h;
  h = product(m.x, m.gate);
  activate(op, h, product(m.x, m.up), nullptr);
  return h;
}

Tensor swiglu_mlp(const Tensor &x, const Tensor &gate, const Tensor &up, const Tensor &down) {
  const char *op = "swiglu_mlp";
  const MlpDims d = mlp_dims(op, x, gate, up, down);
  const NoGrad off;
  const Mlp m = mlp_of(op, x, gate, up, down);
  const Tensor h = gated_product(op, m);
  return torch::stable::view(to_type(product(h, m.down), x.scalar_type()), sizes_with_last(x, d.n));
}

// 中间量全部重算：反向只留下输入与权重。
std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_mlp_backward(const Tensor &grad, const Tensor &x,
                                                               const Tensor &gate, const Tensor &up,
                                                               const Tensor &down) {
  const char *op = "swiglu_mlp_backward";
  const MlpDims d = mlp_dims(op, x, gate, up, down);
  check_mlp_grad(op, grad, x, d.n);
  expect_device(op, "grad", grad, x);
  const NoGrad off;
  const Mlp m = mlp_of(op, x, gate, up, down);
  Tensor dy = flat_rows(to_type(grad, m.type)), g = product(m.x, m.gate), u = product(m.x, m.up);
  Tensor dh = torch::stable::new_empty(g, {g.size(0), d.inner});
  mm_into(dh, dy, m.down);
  activate(op, g, u, &dh);
  Tensor parts = torch::stable::new_empty(g, {2, g.size(0), d.k});
  mm_into(torch::stable::select(parts, 0, 0), g, m.gate);
  mm_into(torch::stable::select(parts, 0, 1), u, m.up);
  auto weight_grad = [&](const Tensor &a, const Tensor &b) {
    return to_type(transposed_product(a, b), gate.scalar_type());
  };
  Tensor dx =
      torch::stable::view(to_type(column_sum(parts), x.scalar_type()), sizes_with_last(x, d.k));
  return {dx, weight_grad(g, m.x), weight_grad(u, m.x), weight_grad(dy, dh)};
}

}  // namespace
}  // namespace dso

DSO_DEVICE_LIBRARY(m) {
  m.impl("linear", TORCH_BOX(&dso::linear));
  m.impl("linear_backward", TORCH_BOX(&dso::linear_backward));
  m.impl("swiglu_mlp", TORCH_BOX(&dso::swiglu_mlp));
  m.impl("swiglu_mlp_backward", TORCH_BOX(&dso::swiglu_mlp_backward));
}
