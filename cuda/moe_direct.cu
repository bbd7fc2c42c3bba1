// moe_experts 词元极少、不排序时的 o 与求和：一个 CTA 一个词元的 16 列，全部专家。
//
// 各专家的步排成一列平分给各 warp；一个 warp 的部分和按专家的次序加，各 warp 的再按次序加。
#include "moe_direct.cuh"
#include "moe_small.cuh"

namespace {

using namespace dso;
using namespace dso::small;

// 一块几个 warp：一个 SM 上两块；只有一个词元时一般只够每个 SM 一块，12 个（16 位的）寄存器也只放得下一块，提前启动时
// 各块不会挤在先空出来的几个 SM 上。
constexpr int MANY_WARPS = 8, ALONE_WARPS = 12;

// x 在寄存器里交换，见 Stream；INT4_32 一次只用半段，INT4_128 的寄存器不够，照旧直接读。
template <Kind K>
constexpr bool ONE = K != INT4_32 && K != INT4_128;

// 一个 SM 上只有一两块，多发几步的读：8 个 warp 各 2 到 8 KiB，寄存器放得下的；一个线程一段 x 时一圈至多 256 个 k。
template <Kind K>
constexpr int AHEAD = K == PLAIN || K == INT4_32 ? 8 : 4;

// 第 lane 个专家：编号（没有为 -1）、系数、到第几步为止。
struct Chosen {
  int expert = -1, steps = 0, end = 0;
  float weight = 0.0f;
};

template <int STEP_K>
__device__ __forceinline__ Chosen chosen(const dso_cuda_moe_experts_params &p, int token) {
  const dso_cuda_moe_routing &r = p.routing;
  int lane = static_cast<int>(threadIdx.x) % WARP, top_k = static_cast<int>(r.top_k);
  Chosen c;
  if (lane < top_k + (r.shared ? 1 : 0)) {
    bool routed = lane < top_k;
    int row = routed ? token * top_k + lane : static_cast<int>(r.tokens) * top_k + token;
    c.weight = routed ? p.weights[row] : p.w.shared_scale ? p.w.shared_scale[token] : 1.0f;
    dso_cuda_moe_tile at = tile_at(r, row);
    if (at.rows > 0) {
      c.expert = at.expert;
      int depth = static_cast<int>(expert_at(p.w, r.experts, c.expert).inner);
      c.steps = (depth + STEP_K - 1) / STEP_K;
    }
  }
  c.end = c.steps;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    int other = __shfl_up_sync(ALL_LANES, c.end, static_cast<unsigned>(step));
    if (lane >= step) c.end += other;
  }
  return c;
}

template <class E, Kind K, int WARPS>
__global__ __launch_bounds__(WARPS *WARP, WARPS == ALONE_WARPS ? 1 : 2) void moe_direct_kernel(
    dso_cuda_moe_experts_params p) {
  using S = Step<K>;
  __shared__ float sums[WARPS][16];
  const dso_cuda_moe_routing &r = p.routing;
  int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  int token = static_cast<int>(blockIdx.y), top_k = static_cast<int>(r.top_k);
  int first = static_cast<int>(blockIdx.x) * 16, last = static_cast<int>(p.n) - 1;
  Chosen own = chosen<S::k>(p, token);
  int all = __shfl_sync(ALL_LANES, own.end, WARP - 1), each = (all + WARPS - 1) / WARPS;
  int from = warp * each, to = min_of(all, from + each);
  float total[2] = {};
  int g = lane / 4, column[2] = {min_of(first + g, last), min_of(first + g + 8, last)};
  for (int j = 0; j < top_k + (r.shared ? 1 : 0); j++) {
    int stop = __shfl_sync(ALL_LANES, own.end, j);
    int start = stop - __shfl_sync(ALL_LANES, own.steps, j);
    int id = __shfl_sync(ALL_LANES, own.expert, j);
    float factor = __shfl_sync(ALL_LANES, own.weight, j);
    // 这一段在专家里的起止；按组对齐，相邻的两个 warp 算法相同，所以不重不漏
    int begin = (from > start ? from - start : 0) / S::per_group * S::per_group;
    int end = to >= stop ? stop - start : (to - start) / S::per_group * S::per_group;
    if (id < 0 || from >= stop || begin >= end) continue;
    dso_expert expert = expert_at(p.w, r.experts, id);
    Rows rows[1];
#pragma unroll
    for (int side = 0; side < 2; side++)
      rows[0].put(side, source_of<K>(expert.down, expert.down_quant), column[side]);
    int depth = static_cast<int>(expert.inner);
    Stream<E, K, 1, 1, AHEAD<K>, ONE<K>> stream(rows, begin, end - begin, depth);
    grid_wait();  // 在此之前只读下标、系数、权重
    int row = j < top_k ? token * top_k + j : static_cast<int>(r.tokens) * top_k + token;
    const uint16_t *x[1] = {static_cast<const uint16_t *>(p.h) + hidden_at(p, row)};
    stream.run(x);
#pragma unroll
    for (int side = 0; side < 2; side++) {
      float sum = stream.acc[0][0][2 * side];  // 各列都是这个词元
      if (S::shrunk) sum *= E::CODES;
      if (S::row_scale) sum *= expert.down_quant.scale[column[side]];
      if (begin == 0) sum += bias_at(expert.down_bias, expert.bias_dtype, column[side]);
      total[side] += factor * sum;
    }
  }
  grid_wait();
  if (lane % 4 == 0) sums[warp][g] = total[0], sums[warp][g + 8] = total[1];
  __syncthreads();
  int i = static_cast<int>(threadIdx.x);
  if (i >= 16 || first + i > last) return;
  float y = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) y += sums[w][i];
  store_one(p.y, p.x.dtype, static_cast<int64_t>(token) * p.n + first + i, y);
}

}  // namespace

cudaError_t dso::moe_direct(const dso_cuda_moe_experts_params &p, Kind kind, cudaStream_t stream) {
  dim3 grid(static_cast<unsigned>(ceil_div(p.n, 16)), static_cast<unsigned>(p.routing.tokens));
  return with_types(p.dtype, kind, [&](auto element, auto k) {
    using E = decltype(element);
    if constexpr (k() == PLAIN) {
      if (grid.y == 1)
        return launch(moe_direct_kernel<E, k(), ALONE_WARPS>, grid, dim3(ALONE_WARPS * WARP), 0,
                      stream, p);
    }
    return launch(moe_direct_kernel<E, k(), MANY_WARPS>, grid, dim3(MANY_WARPS * WARP), 0, stream,
                  p);
  });
}

bool dso::moe_direct_fits(const dso_cuda_moe_experts_params &p) {
  return p.routing.tokens <= MOE_DIRECT_TOKENS && p.routing.top_k < WARP &&
         (!p.routing.shared || p.routing.experts == 0 || kind_of(p.w.first) == kind_of(p.w.shared));
}
