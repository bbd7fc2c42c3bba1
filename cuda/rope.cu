// 旋转位置编码；约定同 csrc/rope.c。一个线程转 V 对（V = 4：读写都是宽访存）。
#include "dso_cuda.h"
#include "vec.cuh"

namespace {

using namespace dso;

constexpr int THREADS = 256;

// 展平下标 = ((b * T + t) * H + h) * (half / V) + 组号；相邻线程读写相邻地址。
template <int V>
__global__ void rope_kernel(dso_rope_params p) {
  int64_t half = p.d / 2, groups = half / V;
  int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.b * p.t * p.h * groups) return;
  int64_t i = index % groups * V, head = index / groups, token = head / p.h;
  int64_t b = token / p.t, t = token % p.t;
  int64_t from = b * p.x_bs + t * p.x_ts + head % p.h * p.x_hs,
          to = b * p.y_bs + t * p.y_ts + head % p.h * p.y_hs;
  Vec<V> c = load<V>(p.cos, DSO_F32, b * p.cs_bs + t * p.cs_ts + i);
  Vec<V> s = load<V>(p.sin, DSO_F32, b * p.cs_bs + t * p.cs_ts + i);
  Vec<V> first, second;
  bool pairs_in = p.interleaved && !p.inverse, pairs_out = p.interleaved && p.inverse;
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
  int64_t work = p->b * p->t * p->h * (p->d / 2 / (wide ? 4 : 1));
  if (work == 0) return cudaSuccess;
  dim3 grid(static_cast<unsigned>(ceil_div(work, THREADS)));
  if (wide) return DSO_LAUNCH(rope_kernel<4>, grid, dim3(THREADS), stream, *p);
  return DSO_LAUNCH(rope_kernel<1>, grid, dim3(THREADS), stream, *p);
}
