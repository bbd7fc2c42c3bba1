// RMS 归一化（可先加残差）与反向；公式与舍入次序同 csrc/rms_norm.c、csrc/rms_norm_backward.c。
#include "dso_cuda.h"
#include "rms_norm.cuh"

namespace {

using namespace dso;

constexpr int COLUMN_GROUP = 8;      // dweight：一个块 32 列，8 组线程分摊行
constexpr int64_t MAX_CHUNKS = 128;  // dweight 的行块数上限：够占满卡，部分和又小
constexpr int64_t MIN_CHUNK = 32;
constexpr int MOST_KEPT = 4;  // 一行留在寄存器里的次数：短行 1024 列、长行 8192 列以内

template <int V>
__device__ Vec<V> load_input(const dso_rms_norm_params &p, int64_t row, int64_t i) {
  Vec<V> x = load<V>(p.x.data, p.x.dtype, row * p.x.rs + i);
  if (!p.residual.data) return x;
  Vec<V> r = load<V>(p.residual.data, p.x.dtype, row * p.residual.rs + i);
#pragma unroll
  for (int j = 0; j < V; j++) x.v[j] = round_to(p.x.dtype, x.v[j] + r.v[j]);
  return x;
}

// 块 (threads, rows)：threads 个线程一行。第二遍重读 x，此时它还在 L1 里。
template <int V>
__global__ void rms_norm_kernel(dso_rms_norm_params p) {
  grid_release();
  grid_wait();
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;  // 只在一个 warp 一行时发生：整个 warp 一起退出
  int64_t first = static_cast<int64_t>(threadIdx.x) * V,
          step = static_cast<int64_t>(blockDim.x) * V;
  float sum[1] = {0};
  for (int64_t i = first; i < p.dim; i += step) {
    Vec<V> x = load_input<V>(p, row, i);
    if (p.total) store<V>(p.total, p.x.dtype, row * p.dim + i, x);
#pragma unroll
    for (int j = 0; j < V; j++) sum[0] += x.v[j] * x.v[j];
  }
  row_sum(sum);
  float scale = 1.0f / sqrtf(sum[0] / static_cast<float>(p.dim) + p.eps);
  for (int64_t i = first; i < p.dim; i += step) {
    Vec<V> x = load_input<V>(p, row, i), w = load<V>(p.weight, p.weight_dtype, i);
    store<V>(p.y, p.x.dtype, row * p.dim + i, scaled<V>(x, scale, p.x.dtype, w));
  }
}

// 同上，x、残差、权重都是 16 位的 D，一个线程至多 KEPT 个 8：一行只读一遍，留在寄存器里，权重也先读，只等一次显存。
template <dso_dtype D, int KEPT>
__global__ __launch_bounds__(ROW_THREADS) void rms_norm_kept(dso_rms_norm_params p) {
  grid_release();
  if (blockIdx.x == 0 && threadIdx.x + threadIdx.y == 0)
    prefetch_l2(p.weight, static_cast<uint32_t>(p.dim * 2));
  grid_wait();
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;  // 只在一个 warp 一行时发生：整个 warp 一起退出
  const int dim = static_cast<int>(p.dim), first = static_cast<int>(threadIdx.x) * 8;
  const int step = static_cast<int>(blockDim.x) * 8;
  const bool residual = p.residual.data != nullptr;
  const void *second = residual ? p.residual.data : p.x.data;  // 没有时不读
  Words<4> raw[KEPT] = {}, other[KEPT] = {}, weight[KEPT] = {};
#pragma unroll
  for (int n = 0; n < KEPT; n++) {
    int i = first + n * step;
    load_once(raw[n], chunk(p.x.data, row * p.x.rs + i), i < dim);
    load_once(other[n], chunk(second, row * p.residual.rs + i), residual && i < dim);
    if (i < dim) weight[n] = *static_cast<const Words<4> *>(chunk(p.weight, i));  // 留在 L1 里
  }
  Vec<8> x[KEPT];
  float sum[1] = {0};
#pragma unroll
  for (int n = 0; n < KEPT; n++) {
    x[n] = unpack<D>(raw[n]);
    if (residual) {
      Vec<8> r = unpack<D>(other[n]);
#pragma unroll
      for (int j = 0; j < 8; j++) x[n].v[j] = round_to(D, x[n].v[j] + r.v[j]);
    }
    int i = first + n * step;
    if (p.total && i < dim) store<8>(p.total, D, row * dim + i, x[n]);
#pragma unroll
    for (int j = 0; j < 8; j++) sum[0] += x[n].v[j] * x[n].v[j];
  }
  row_sum(sum);
  float scale = 1.0f / sqrtf(sum[0] / static_cast<float>(dim) + p.eps);
#pragma unroll
  for (int n = 0; n < KEPT; n++) {
    int i = first + n * step;
    if (i < dim) store<8>(p.y, D, row * dim + i, scaled<8>(x[n], scale, D, unpack<D>(weight[n])));
  }
}

// dx = s (g - x̂ mean(g x̂))，g = grad * weight，x̂ = x s；顺便留下每行的 s 给 dweight 用。
template <int V>
__global__ void backward_rows(dso_rms_norm_backward_params p, float *inverse_rms) {
  grid_wait();
  int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  int64_t first = static_cast<int64_t>(threadIdx.x) * V,
          step = static_cast<int64_t>(blockDim.x) * V;
  float sum[2] = {0, 0};  // Σ x²、Σ g x
  for (int64_t i = first; i < p.dim; i += step) {
    Vec<V> x = load<V>(p.x.data, p.x.dtype, row * p.x.rs + i);
    Vec<V> g = load<V>(p.grad.data, p.grad.dtype, row * p.grad.rs + i);
    Vec<V> w = load<V>(p.weight, p.weight_dtype, i);
#pragma unroll
    for (int j = 0; j < V; j++) {
      sum[0] += x.v[j] * x.v[j];
      sum[1] += g.v[j] * w.v[j] * x.v[j];
    }
  }
  row_sum(sum);
  float dim = static_cast<float>(p.dim), s = 1.0f / sqrtf(sum[0] / dim + p.eps);
  float mean = sum[1] * s / dim;
  if (threadIdx.x == 0) inverse_rms[row] = s;
  if (!p.dx) return;
  for (int64_t i = first; i < p.dim; i += step) {
    Vec<V> x = load<V>(p.x.data, p.x.dtype, row * p.x.rs + i);
    Vec<V> g = load<V>(p.grad.data, p.grad.dtype, row * p.grad.rs + i);
    Vec<V> w = load<V>(p.weight, p.weight_dtype, i);
#pragma unroll
    for (int j = 0; j < V; j++) x.v[j] = s * (g.v[j] * w.v[j] - x.v[j] * s * mean);
    store<V>(p.dx, p.x.dtype, row * p.dim + i, x);
  }
}

// 块 (32, COLUMN_GROUP)：32 列、一个行块的 Σ grad x̂。
__global__ void backward_columns(dso_rms_norm_backward_params p, const float *inverse_rms,
                                 float *partial, int64_t chunk) {
  __shared__ float part[COLUMN_GROUP][WARP];
  grid_wait();
  int64_t column = static_cast<int64_t>(blockIdx.x) * WARP + threadIdx.x;
  int64_t begin = blockIdx.y * chunk, end = begin + chunk < p.rows ? begin + chunk : p.rows;
  float sum = 0;
  if (column < p.dim) {
    for (int64_t row = begin + threadIdx.y; row < end; row += COLUMN_GROUP) {
      float x = load_one(p.x.data, p.x.dtype, row * p.x.rs + column);
      sum += load_one(p.grad.data, p.grad.dtype, row * p.grad.rs + column) * x * inverse_rms[row];
    }
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= p.dim) return;
  sum = 0;
  for (int g = 0; g < COLUMN_GROUP; g++) sum += part[g][threadIdx.x];
  partial[blockIdx.y * p.dim + column] = sum;
}

__global__ void reduce_chunks(dso_rms_norm_backward_params p, const float *partial,
                              int64_t chunks) {
  grid_wait();
  int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= p.dim) return;
  float sum = 0;
  for (int64_t c = 0; c < chunks; c++) sum += partial[c * p.dim + column];
  store_one(p.dw, p.weight_dtype, column, sum);
}

using NormKernel = void (*)(dso_rms_norm_params);

template <dso_dtype D>
NormKernel pick_depth(int64_t dim, int64_t step) {
  return dim <= step               ? rms_norm_kept<D, 1>
         : dim <= MOST_KEPT * step ? rms_norm_kept<D, MOST_KEPT>
                                   : nullptr;
}

// 一行留得下的核；没有返回空。step：一行的线程一次读几个。
NormKernel pick_kept(const dso_rms_norm_params &p, int64_t step) {
  if (p.weight_dtype != p.x.dtype) return nullptr;
  return p.x.dtype == DSO_BF16  ? pick_depth<DSO_BF16>(p.dim, step)
         : p.x.dtype == DSO_F16 ? pick_depth<DSO_F16>(p.dim, step)
                                : nullptr;
}

int64_t chunk_rows(int64_t rows) {
  int64_t chunk = ceil_div(rows, MAX_CHUNKS);
  return chunk < MIN_CHUNK ? MIN_CHUNK : chunk;
}

}  // namespace

cudaError_t dso_cuda_rms_norm(const dso_rms_norm_params *p, cudaStream_t stream) {
  if (p->rows == 0 || p->dim == 0) return cudaSuccess;
  dim3 grid = row_grid(p->rows, p->dim), block = row_block(p->dim);
  bool wide = aligned(p->x) && aligned(p->residual) &&
              aligned(p->weight, p->weight_dtype, p->dim) && aligned(p->y, p->x.dtype, p->dim) &&
              aligned(p->total, p->x.dtype, p->dim);
  if (auto kernel = wide ? pick_kept(*p, block.x * 8) : nullptr)
    return launch(kernel, grid, block, 0, stream, *p);
  if (wide) return launch(rms_norm_kernel<8>, grid, block, 0, stream, *p);
  return launch(rms_norm_kernel<1>, grid, block, 0, stream, *p);
}

size_t dso_cuda_rms_norm_backward_scratch(int64_t rows, int64_t dim) {
  return static_cast<size_t>(rows + ceil_div(rows, chunk_rows(rows)) * dim) * sizeof(float);
}

cudaError_t dso_cuda_rms_norm_backward(const dso_rms_norm_backward_params *p, void *scratch,
                                       cudaStream_t stream) {
  if (p->dim == 0) return cudaSuccess;
  float *inverse_rms = static_cast<float *>(scratch), *partial = inverse_rms + p->rows;
  int64_t chunk = chunk_rows(p->rows), chunks = ceil_div(p->rows, chunk);
  cudaError_t error = cudaSuccess;
  if (p->rows > 0) {
    dim3 grid = row_grid(p->rows, p->dim), block = row_block(p->dim);
    bool wide = aligned(p->x) && aligned(p->grad) && aligned(p->weight, p->weight_dtype, p->dim) &&
                aligned(p->dx, p->x.dtype, p->dim);
    error = wide ? launch(backward_rows<8>, grid, block, 0, stream, *p, inverse_rms)
                 : launch(backward_rows<1>, grid, block, 0, stream, *p, inverse_rms);
  }
  if (error != cudaSuccess || !p->dw) return error;
  unsigned columns = static_cast<unsigned>(ceil_div(p->dim, WARP));
  if (chunks > 0) {
    error = launch(backward_columns, dim3(columns, static_cast<unsigned>(chunks)),
                   dim3(WARP, COLUMN_GROUP), 0, stream, *p, inverse_rms, partial, chunk);
    if (error != cudaSuccess) return error;
  }
  return launch(reduce_chunks, dim3(columns), dim3(WARP), 0, stream, *p, partial, chunks);
}
