// 旋转位置编码；约定同 csrc/rope.c。一个线程转 V 对（V = 4：读写都是宽访存）。
#include "dso_cuda.h"
#include "vec.cuh"

namespace {

using namespace dso;

constexpr int THREADS = 256;
constexpr int64_t MOST_THREADS = 1024;

// 块 (d / 2 / V, 几个头)：一个头的 d 个数都在同一块里，全部读完才写，所以 y 可以就是 x（成对读、分两半写）。
// 相邻线程读写相邻地址。
template <int V>
__global__ void rope_kernel(dso_rope_params p) {
  grid_release();
  grid_wait();
  int64_t half = p.d / 2, i = static_cast<int64_t>(threadIdx.x) * V;
  int64_t head = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  bool inside = head < p.b * p.t * p.h;
  if (!inside) head = 0;  // 多出的线程照样走到屏障
  int64_t token = head / p.h, b = token / p.t, t = token % p.t;
  int64_t from = b * p.x_bs + t * p.x_ts + head % p.h * p.x_hs,
          to = b * p.y_bs + t * p.y_ts + head % p.h * p.y_hs;
  Vec<V> c = load<V>(p.cos, DSO_F32, b * p.cs_bs + t * p.cs_ts + i);
  Vec<V> s = load<V>(p.sin, DSO_F32, b * p.cs_bs + t * p.cs_ts + i);
  Vec<V> first, second;
  bool pairs_in = p.inverse ? p.keep_pairs : p.interleaved,
       pairs_out = p.inverse ? p.interleaved : p.keep_pairs;
  if (pairs_in) {
    Vec<2 * V> x = load<2 * V>(p.x, p.dtype, from + 2 * i);
#pragma unroll
    for (int j = 0; j < V; j++) first.v[j] = x.v[2 * j], second.v[j] = x.v[2 * j + 1];
  } else {
    first = load<V>(p.x, p.dtype, from + i);
    second = load<V>(p.x, p.dtype, from + half + i);
  }
  Vec<2 * V> both;
#pragma unroll
  for (int j = 0; j < V; j++) {
    float sine = p.inverse ? -s.v[j] : s.v[j];  // 转置就是反向转
    float a = first.v[j] * c.v[j] - second.v[j] * sine;
    float d = second.v[j] * c.v[j] + first.v[j] * sine;
    first.v[j] = both.v[2 * j] = a;
    second.v[j] = both.v[2 * j + 1] = d;
  }
  __syncthreads();
  if (!inside) return;
  if (pairs_out) {
    store<2 * V>(p.y, p.dtype, to + 2 * i, both);
  } else {
    store<V>(p.y, p.dtype, to + i, first);
    store<V>(p.y, p.dtype, to + half + i, second);
  }
}

bool can_widen(const dso_rope_params *p) {
  constexpr int WIDE = 8;  // 成对时一次读 2V = 8 个元素
  return p->d % WIDE == 0 && wide_ok(p->x, p->dtype, p->x_bs, WIDE) && p->x_ts % WIDE == 0 &&
         p->x_hs % WIDE == 0 && wide_ok(p->y, p->dtype, p->y_bs, WIDE) && p->y_ts % WIDE == 0 &&
         p->y_hs % WIDE == 0 && wide_ok(p->cos, DSO_F32, p->cs_bs, 4) &&
         wide_ok(p->sin, DSO_F32, p->cs_ts, 4);
}

}  // namespace

cudaError_t dso_cuda_rope(const dso_rope_params *p, cudaStream_t stream) {
  bool wide = can_widen(p);
  int64_t heads = p->b * p->t * p->h, groups = p->d / 2 / (wide ? 4 : 1);
  if (heads * groups == 0) return cudaSuccess;
  if (groups > MOST_THREADS) return cudaErrorInvalidValue;
  int64_t rows = groups < THREADS ? THREADS / groups : 1;
  dim3 block(static_cast<unsigned>(groups), static_cast<unsigned>(rows));
  dim3 grid(static_cast<unsigned>(ceil_div(heads, rows)));
  if (wide) return launch(rope_kernel<4>, grid, block, 0, stream, *p);
  return launch(rope_kernel<1>, grid, block, 0, stream, *p);
}
