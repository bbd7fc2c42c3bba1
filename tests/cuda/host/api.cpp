// 测试用的扁平 C 接口：ctypes 逐个传参，这里按名字填进参数结构体（布局由编译器检查）。
#include "dso_cuda.h"

namespace {

dso_dtype as_dtype(int code) { return static_cast<dso_dtype>(code); }

dso_mat matrix(const void *data, int64_t stride, int dtype) {
  return {data, stride, as_dtype(dtype)};
}

}  // namespace

extern "C" {

int host_rms_norm(int64_t rows, int64_t dim, const void *x, int64_t x_stride, const void *residual,
                  int64_t residual_stride, int dtype, const void *weight, int weight_dtype, void *y,
                  void *total, float eps) {
  dso_rms_norm_params p = {};
  p.rows = rows, p.dim = dim, p.eps = eps, p.y = y, p.total = total;
  p.x = matrix(x, x_stride, dtype);
  p.residual = matrix(residual, residual_stride, dtype);
  p.weight = weight, p.weight_dtype = as_dtype(weight_dtype);
  return dso_cuda_rms_norm(&p, nullptr);
}

int64_t host_rms_norm_backward_scratch(int64_t rows, int64_t dim) {
  return static_cast<int64_t>(dso_cuda_rms_norm_backward_scratch(rows, dim));
}

int host_rms_norm_backward(int64_t rows, int64_t dim, const void *grad, int64_t grad_stride,
                           const void *x, int64_t x_stride, int dtype, const void *weight,
                           int weight_dtype, void *dx, void *dw, float eps, void *scratch) {
  dso_rms_norm_backward_params p = {};
  p.rows = rows, p.dim = dim, p.eps = eps, p.dx = dx, p.dw = dw;
  p.grad = matrix(grad, grad_stride, dtype);
  p.x = matrix(x, x_stride, dtype);
  p.weight = weight, p.weight_dtype = as_dtype(weight_dtype);
  return dso_cuda_rms_norm_backward(&p, scratch, nullptr);
}

// sizes：b、t、h、d；strides：x 的 b、t、h 与 cos/sin 的 b、t。
int host_rope(const int64_t *sizes, const int64_t *strides, const void *x, int dtype,
              const float *cos, const float *sin, void *y, int interleaved, int inverse) {
  dso_rope_params p = {};
  p.b = sizes[0], p.t = sizes[1], p.h = sizes[2], p.d = sizes[3];
  p.x_bs = strides[0], p.x_ts = strides[1], p.x_hs = strides[2];
  p.cs_bs = strides[3], p.cs_ts = strides[4];
  p.x = x, p.dtype = as_dtype(dtype), p.cos = cos, p.sin = sin, p.y = y;
  p.interleaved = interleaved, p.inverse = inverse;
  p.y_hs = p.d, p.y_ts = p.h * p.d, p.y_bs = p.t * p.h * p.d;
  return dso_cuda_rope(&p, nullptr);
}

// sizes：b、t、rank、rope_dim、capacity；缓存与输入都连续。dtypes：潜变量、旋转键、两个缓存。
int host_mla_cache_write(const int64_t *sizes, const int *dtypes, const void *latent,
                         const void *rope, void *latent_cache, void *rope_cache, float *scale_cache,
                         const int64_t *offsets) {
  dso_mla_cache_write_params p = {};
  int64_t capacity = sizes[4];
  p.b = sizes[0], p.t = sizes[1], p.rank = sizes[2], p.rope_dim = sizes[3];
  p.latent = latent, p.rope = rope, p.latent_cache = latent_cache, p.rope_cache = rope_cache;
  p.latent_ts = p.latent_cache_ts = p.rank;
  p.rope_ts = p.rope_cache_ts = p.rope_dim;
  p.latent_bs = p.t * p.rank, p.rope_bs = p.t * p.rope_dim;
  p.latent_cache_bs = capacity * p.rank, p.rope_cache_bs = capacity * p.rope_dim;
  p.latent_dtype = as_dtype(dtypes[0]), p.rope_dtype = as_dtype(dtypes[1]);
  p.latent_cache_dtype = as_dtype(dtypes[2]), p.rope_cache_dtype = as_dtype(dtypes[3]);
  p.scale_cache = scale_cache, p.scale_cache_bs = capacity, p.offsets = offsets;
  return dso_cuda_mla_cache_write(&p, capacity, nullptr);
}
}
