// silu(gate) * up 及其反向，逐元素；矩阵乘由绑定交给 cuBLAS。公式同 csrc/swiglu_mlp.c、swiglu_mlp_backward.c。
#include "dso_cuda.h"
#include "vec.cuh"

namespace {

using namespace dso;

constexpr int THREADS = 256;

template <int V>
__global__ void silu_kernel(dso_cuda_silu_params p) {
  grid_release();
  grid_wait();
  int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * V;
  if (i >= p.count) return;
  Vec<V> g = load<V>(p.gate, p.dtype, i), u = load<V>(p.up, p.dtype, i), h, d;
  if (p.grad) d = load<V>(p.grad, p.dtype, i);
#pragma unroll
  for (int j = 0; j < V; j++) {
    float s = 1.0f / (1.0f + expf(-g.v[j])), a = g.v[j] * s;
    h.v[j] = a * u.v[j];
    if (!p.grad) continue;
    g.v[j] = d.v[j] * u.v[j] * (s + a * (1.0f - s));
    u.v[j] = d.v[j] * a;
  }
  if (!p.grad) {
    store<V>(p.gate, p.dtype, i, h);
    return;
  }
  store<V>(p.gate, p.dtype, i, g);
  store<V>(p.up, p.dtype, i, u);
  store<V>(p.grad, p.dtype, i, h);
}

bool wide(const dso_cuda_silu_params *p) {
  return wide_ok(p->gate, p->dtype, p->count) && wide_ok(p->up, p->dtype, p->count) &&
         wide_ok(p->grad, p->dtype, p->count);
}

}  // namespace

cudaError_t dso_cuda_silu(const dso_cuda_silu_params *p, cudaStream_t stream) {
  if (p->count == 0) return cudaSuccess;
  bool eight = wide(p);
  dim3 grid(static_cast<unsigned>(ceil_div(p->count, THREADS * (eight ? 8 : 1))));
  if (eight) return launch(silu_kernel<8>, grid, dim3(THREADS), 0, stream, *p);
  return launch(silu_kernel<1>, grid, dim3(THREADS), 0, stream, *p);
}
