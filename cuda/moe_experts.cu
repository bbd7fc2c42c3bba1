// moe_experts：选路径；各词元的加权和；专家表。
//
// 三步：h（收集在读入时，gate、up 一次算完，激活在写出时）、o、按词元求和。没有原子操作：一个词元的
// 各个 o 由一个线程按 j 的次序相加。
#include "config.cuh"
#include "moe_experts.cuh"

namespace {

using namespace dso;

constexpr int THREADS = 256;

// y[t] 的 V 列：Σ_j weights[t, j] o[行]，再加共享专家的。
template <int V>
__global__ __launch_bounds__(THREADS) void moe_combine_kernel(dso_cuda_moe_experts_params p) {
  const dso_cuda_moe_routing &r = p.routing;
  int64_t chunks = p.n / V, flat = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (flat >= r.tokens * chunks) return;
  int64_t token = flat / chunks, column = flat % chunks * V;
  Vec<V> sum = {};
  auto add = [&](int64_t row, float weight) {
    Vec<V> o = load<V>(p.o, p.dtype, row * p.n + column);
#pragma unroll
    for (int i = 0; i < V; i++) sum.v[i] += weight * o.v[i];
  };
#pragma unroll 4
  for (int64_t slot = token * r.top_k; slot < (token + 1) * r.top_k; slot++)
    if (r.row[slot] >= 0) add(r.row[slot], p.weights[slot]);
  if (r.shared) add(r.tokens * r.top_k + token, p.w.shared_scale ? p.w.shared_scale[token] : 1.0f);
  store<V>(p.y, p.x.dtype, token * p.n + column, sum);
}

cudaError_t combine(const dso_cuda_moe_experts_params &p, cudaStream_t stream) {
  bool wide = wide_ok(p.o, p.dtype, p.n) && wide_ok(p.y, p.x.dtype, p.n);
  int64_t count = p.routing.tokens * p.n / (wide ? 8 : 1);
  dim3 grid(static_cast<unsigned>(ceil_div(count, THREADS)));
  if (wide) return launch(moe_combine_kernel<8>, grid, dim3(THREADS), 0, stream, p);
  return launch(moe_combine_kernel<1>, grid, dim3(THREADS), 0, stream, p);
}

// 一次带过去的专家数：核的参数 CUDA 12.1 起至多 32764 字节（torch 2.10 要的更新）。
constexpr int TABLE = 128;

struct Table {
  dso_expert expert[TABLE];
};

__global__ void moe_table_kernel(Table table, int count, dso_expert *to) {
  int i = static_cast<int>(threadIdx.x);
  if (i < count) to[i] = table.expert[i];
}

}  // namespace

int dso_cuda_moe_fits(const dso_cuda_moe_experts_params *p, dso_dtype dtype) {
  return dtype == DSO_F32 ? p != nullptr : 0;
}

int64_t dso_cuda_moe_tile_rows(const dso_cuda_moe_experts_params *) { return MOE_GENERAL_ROWS; }

cudaError_t dso_cuda_moe_experts(const dso_cuda_moe_experts_params *p, cudaStream_t stream) {
  if (p->routing.tokens == 0 || p->n == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  for (int step = 0; step < 2 && error == cudaSuccess; step++)
    error = moe_general(*p, step == 0, stream);
  return error == cudaSuccess ? combine(*p, stream) : error;
}

cudaError_t dso_cuda_moe_table(const dso_expert *from, int64_t count, dso_expert *to,
                               cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < count && error == cudaSuccess; first += TABLE) {
    Table table = {};
    int many = static_cast<int>(count - first < TABLE ? count - first : TABLE);
    for (int i = 0; i < many; i++) table.expert[i] = from[first + i];
    error = launch(moe_table_kernel, dim3(1), dim3(TABLE), 0, stream, table, many, to + first);
  }
  return error;
}
