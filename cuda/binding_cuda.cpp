// CUDA 算子的绑定：检查参数（与 csrc/binding_*.cpp 同样的消息），分配输出，在当前流上启动。
// schema 在 csrc/binding.cpp；这里只给 CUDA 后端登记实现，单独成库，只在带 CUDA 的 torch 上加载。
#include "binding.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <tuple>

#include "dso_cuda.h"

namespace dso {
namespace {

using torch::stable::accelerator::DeviceGuard;

// 当前设备与流；析构时恢复原来的设备。
class Launch {
 public:
  explicit Launch(const Tensor &t) : guard_(t.get_device()) {
    void *stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

void check(const char *op, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("deepseek_opt：") + op + " 启动失败：" +
                           cudaGetErrorString(error) + "。");
}

void expect_device(const char *op, const char *name, const Tensor &t, const Tensor &x) {
  expect(t.is_cuda() && t.get_device() == x.get_device(), op, "：", name,
         " 应与其他张量同在设备 cuda:", static_cast<int>(x.get_device()), " 上。");
}

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

Tensor rms_norm(const Tensor &x, const Tensor &weight, double eps) {
  const auto sizes = sizes_of("rms_norm", x);
  Tensor rows = as_rows(x), w = torch::stable::contiguous(weight);
  Tensor y = torch::stable::new_empty(x, sizes);
  dso_rms_norm_params p = norm_params("rms_norm", rows, w, eps, y);
  check("rms_norm", dso_cuda_rms_norm(&p, Launch(x).stream()));
  return y;
}

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

Tensor angles(const Tensor &t) {
  Tensor wide = t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
  return torch::stable::contiguous(wide);
}

Tensor rope(const Tensor &x, const Tensor &cos, const Tensor &sin, bool interleaved, bool inverse) {
  expect_shape("rope", "x", x, {-1, -1, -1, -1});
  const int64_t b = x.size(0), t = x.size(1), h = x.size(2), d = x.size(3);
  expect(d % 2 == 0, "rope：x 的最后一维应为偶数，实际是 ", d, "。");
  expect_shape("rope", "cos", cos, {-1, t, d / 2});
  expect_shape("rope", "sin", sin, {cos.size(0), t, d / 2});
  expect(cos.size(0) == 1 || cos.size(0) == b, "rope：cos 的第 0 维应为 1 或 ", b, "，实际是 ",
         cos.size(0), "。");
  expect_device("rope", "cos", cos, x);
  expect_device("rope", "sin", sin, x);
  Tensor rows = row_major(x), c = angles(cos), s = angles(sin);
  Tensor y = torch::stable::new_empty(x, {b, t, h, d});
  dso_rope_params p = {};
  p.b = b, p.t = t, p.h = h, p.d = d;
  p.x = rows.const_data_ptr(), p.dtype = float_dtype("rope", "x", x);
  p.x_bs = rows.stride(0), p.x_ts = rows.stride(1), p.x_hs = rows.stride(2);
  p.cos = static_cast<const float *>(c.const_data_ptr());
  p.sin = static_cast<const float *>(s.const_data_ptr());
  p.cs_bs = c.size(0) == 1 ? 0 : t * (d / 2), p.cs_ts = d / 2;
  p.y_bs = y.stride(0), p.y_ts = y.stride(1), p.y_hs = y.stride(2);
  p.y = y.mutable_data_ptr(), p.interleaved = interleaved, p.inverse = inverse;
  check("rope", dso_cuda_rope(&p, Launch(x).stream()));
  return y;
}

// offsets 在 CPU 上时在这里检查范围再送到设备；在设备上时不同步，由核断言。
Tensor device_offsets(const char *op, const Tensor &offsets, const Tensor &cache, int64_t steps) {
  expect_type(op, "offsets", offsets, ScalarType::Long);
  Tensor starts = torch::stable::contiguous(offsets);
  if (!starts.is_cpu()) {
    expect_device(op, "offsets", starts, cache);
    return starts;
  }
  const auto *start = static_cast<const int64_t *>(starts.const_data_ptr());
  const int64_t slots = cache.size(1);
  for (int64_t i = 0; i < starts.size(0); i++)
    expect(start[i] >= 0 && start[i] + steps <= slots, op, "：第 ", i, " 行要写槽位 [", start[i],
           ", ", start[i] + steps, ")，超出缓存的 ", slots, " 个槽位。");
  return torch::stable::to(starts, cache.device());
}

void set_scale(const char *op, dso_mla_cache_write_params &p, const std::optional<Tensor> &scale,
               const Tensor &cache) {
  const bool quantized = p.latent_cache_dtype == DSO_I8;
  expect(quantized == scale.has_value(), op,
         "：latent_cache 为 int8 时必须给出 scale_cache，否则不能给。");
  if (!quantized) return;
  expect_shape(op, "scale_cache", *scale, {cache.size(0), cache.size(1)});
  expect_type(op, "scale_cache", *scale, ScalarType::Float);
  expect_device(op, "scale_cache", *scale, cache);
  expect(scale->stride(1) == 1 || cache.size(1) <= 1, op, "：scale_cache 的最后一维步长应为 1。");
  p.scale_cache = static_cast<float *>(scale->mutable_data_ptr());
  p.scale_cache_bs = scale->stride(0);
}

void mla_cache_write(Tensor latent_cache, Tensor rope_cache, std::optional<Tensor> scale_cache,
                     const Tensor &latent, const Tensor &rope_keys, const Tensor &offsets) {
  const char *op = "mla_cache_write";
  expect_shape(op, "latent", latent, {-1, -1, -1});
  const int64_t b = latent.size(0), t = latent.size(1), rank = latent.size(2);
  expect_shape(op, "rope", rope_keys, {b, t, -1});
  const int64_t dr = rope_keys.size(2);
  expect_shape(op, "latent_cache", latent_cache, {b, -1, rank});
  expect_shape(op, "rope_cache", rope_cache, {b, latent_cache.size(1), dr});
  expect_shape(op, "offsets", offsets, {b});
  expect(rank <= 1 || latent_cache.stride(2) == 1, op, "：latent_cache 的最后一维步长应为 1。");
  expect(dr <= 1 || rope_cache.stride(2) == 1, op, "：rope_cache 的最后一维步长应为 1。");
  expect(latent_cache.is_cuda(), op, "：latent_cache 应在 CUDA 设备上。");
  expect_device(op, "rope_cache", rope_cache, latent_cache);
  expect_device(op, "latent", latent, latent_cache);
  expect_device(op, "rope", rope_keys, latent_cache);
  Tensor from = row_major(latent), rope_from = row_major(rope_keys);
  Tensor starts = device_offsets(op, offsets, latent_cache, t);
  dso_mla_cache_write_params p = {};
  p.b = b, p.t = t, p.rank = rank, p.rope_dim = dr;
  p.latent = from.const_data_ptr(), p.rope = rope_from.const_data_ptr();
  p.latent_bs = from.stride(0), p.latent_ts = from.stride(1);
  p.rope_bs = rope_from.stride(0), p.rope_ts = rope_from.stride(1);
  p.latent_dtype = float_dtype(op, "latent", latent);
  p.rope_dtype = float_dtype(op, "rope", rope_keys);
  p.latent_cache = latent_cache.mutable_data_ptr(), p.rope_cache = rope_cache.mutable_data_ptr();
  p.latent_cache_bs = latent_cache.stride(0), p.latent_cache_ts = latent_cache.stride(1);
  p.rope_cache_bs = rope_cache.stride(0), p.rope_cache_ts = rope_cache.stride(1);
  p.latent_cache_dtype = latent_cache.scalar_type() == ScalarType::Char
                             ? DSO_I8
                             : float_dtype(op, "latent_cache", latent_cache);
  p.rope_cache_dtype = float_dtype(op, "rope_cache", rope_cache);
  p.offsets = static_cast<const int64_t *>(starts.const_data_ptr());
  set_scale(op, p, scale_cache, latent_cache);
  check(op, dso_cuda_mla_cache_write(&p, latent_cache.size(1), Launch(latent_cache).stream()));
}

}  // namespace
}  // namespace dso

STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&dso::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&dso::rms_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&dso::add_rms_norm));
  m.impl("rope", TORCH_BOX(&dso::rope));
  m.impl("mla_cache_write", TORCH_BOX(&dso::mla_cache_write));
}
