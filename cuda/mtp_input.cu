// mtp_input 的归一化与相接：[norm(embedding), norm(hidden)]，各步的舍入同 rms_norm.cu；其后的投影由绑定交给 cuBLAS。
#include "dso_cuda.h"
#include "rms_norm.cuh"

namespace {

using namespace dso;

// 块同 rms_norm：threadIdx.x 分一行的列。blockIdx.y 为 0 是前一半（embedding），为 1 是后一半（hidden）。
template <int V>
__global__ void mtp_input_kernel(dso_mtp_input_params p, void *rows) {
  grid_release();
  grid_wait();
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.m) return;  // 只在一个 warp 一行时发生：整个 warp 一起退出
  bool second = blockIdx.y == 1;
  const dso_mat &x = second ? p.hidden : p.embedding;
  const void *weight = second ? p.hidden_norm : p.embedding_norm;
  dso_dtype weight_dtype = second ? p.hidden_norm_dtype : p.embedding_norm_dtype;
  int64_t first = static_cast<int64_t>(threadIdx.x) * V,
          step = static_cast<int64_t>(blockDim.x) * V;
  float sum[1] = {0};
  for (int64_t i = first; i < p.k; i += step) {
    Vec<V> v = load<V>(x.data, x.dtype, row * x.rs + i);
#pragma unroll
    for (int j = 0; j < V; j++) sum[0] += v.v[j] * v.v[j];
  }
  row_sum(sum);
  float scale = 1.0f / sqrtf(sum[0] / static_cast<float>(p.k) + p.eps);
  int64_t to = (2 * row + (second ? 1 : 0)) * p.k;
  for (int64_t i = first; i < p.k; i += step) {
    Vec<V> v = load<V>(x.data, x.dtype, row * x.rs + i), w = load<V>(weight, weight_dtype, i);
    store<V>(rows, x.dtype, to + i, scaled<V>(v, scale, x.dtype, w));
  }
}

}  // namespace

cudaError_t dso_cuda_mtp_input(const dso_mtp_input_params *p, void *rows, cudaStream_t stream) {
  if (p->m == 0 || p->k == 0) return cudaSuccess;
  dim3 grid = row_grid(p->m, p->k), block = row_block(p->k);
  grid.y = 2;
  bool wide = aligned(p->embedding) && aligned(p->hidden) &&
              aligned(p->embedding_norm, p->embedding_norm_dtype, p->k) &&
              aligned(p->hidden_norm, p->hidden_norm_dtype, p->k) &&
              aligned(rows, p->embedding.dtype, p->k);
  if (wide) return launch(mtp_input_kernel<8>, grid, block, 0, stream, *p, rows);
  return launch(mtp_input_kernel<1>, grid, block, 0, stream, *p, rows);
}
