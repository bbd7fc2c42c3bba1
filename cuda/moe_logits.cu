// moe_route 在词元少时的 logits = x Wᵀ：受限于读权重与延迟，不交给 cuBLAS（它分 K 时多一个核，也不能提前启动）。
//
// 16 位的同一种类型：一块 32 个专家、K 的一份、全部词元，各 warp 再分 K，权重与 x 直接读进 mma 的片段（同 linear_small.cu），
// 一次发出全部的读。各份写进 parts，由 moe_route 的核依次相加。怎样分只看 K，所以一个词元的结果与别的词元无关。
// 其余（fp32、混合类型、对不齐）：一块一个专家，普通的乘加。
#include "config.cuh"
#include "dso_cuda.h"
#include "mma.cuh"

namespace {

using namespace dso;

// ---- mma ----

constexpr int WARPS = MOE_LOGITS_WARPS, THREADS = WARPS * WARP;
constexpr int EXPERTS = 32, STEP = 32;  // 一个 warp 一次 32 个 k：4 个线程各 8 个
constexpr int UNROLL = 2;               // 一次发出两步的读
constexpr int PITCH = EXPERTS + 4;      // 一个词元的部分和：写片段时没有库冲突

static_assert(WARPS == 8, "写出时一个 warp 一组 8 个里的一个词元");

int64_t steps_of(int64_t k) { return ceil_div(k, STEP); }

// 一份几步：各 warp 一样多。
int64_t steps_per_part(int64_t k) {
  return ceil_div(ceil_div(steps_of(k), MOE_LOGITS_PARTS), WARPS) * WARPS;
}

// TILES 组 8 个词元；out [parts][tokens][experts]。
template <class E, int TILES>
__global__ __launch_bounds__(THREADS) void moe_logits_mma(dso_moe_route_params p, float *out,
                                                          int steps) {
  int thread = static_cast<int>(threadIdx.x), lane = thread % WARP, warp = thread / WARP;
  int64_t first = static_cast<int64_t>(blockIdx.x) * EXPERTS, part = blockIdx.y;
  int64_t begin = part * steps * STEP,
          end = begin + steps * STEP < p.k ? begin + steps * STEP : p.k;
  const auto *weight = static_cast<const uint16_t *>(p.weight.data);
  // 等前一个核时，权重先取进 L2；这条指令逐个线程执行，所以各 warp 分着做。
  int64_t ahead = first + warp * (EXPERTS / WARPS) + lane;
  if (lane < EXPERTS / WARPS && ahead < p.experts)
    prefetch_l2(weight + ahead * p.weight.rs + begin, static_cast<uint32_t>(end - begin) * 2);
  grid_release();
  grid_wait();
  // 下一个核要累加，不必另排一次清零。
  if (part == 0 && thread < EXPERTS && first + thread < p.experts) p.counts[first + thread] = 0;

  const uint16_t *w[4], *x = static_cast<const uint16_t *>(p.x.data) + lane / 4 * p.x.rs;
#pragma unroll
  for (int i = 0; i < 4; i++) {  // 越界的读最后一个专家，不写
    int64_t e = first + lane / 4 + 8 * i;
    w[i] = weight + (e < p.experts ? e : p.experts - 1) * p.weight.rs;
  }
  float acc[2][TILES][4] = {};
#pragma unroll 1
  for (int64_t k = begin + warp * STEP; k < end; k += UNROLL * WARPS * STEP) {
    Words<4> a[UNROLL][4] = {}, b[UNROLL][TILES] = {};
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      int64_t at = k + u * WARPS * STEP + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 4; i++) load_once(a[u][i], w[i] + at, at < end);
#pragma unroll
      for (int t = 0; t < TILES; t++)
        load_once(b[u][t], x + t * 8 * p.x.rs + at, at < end && t * 8 + lane / 4 < p.tokens);
    }
    __syncwarp();  // 全部读都发出了再算
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
          mma_rows<E>(acc[m][t], a[u][2 * m], a[u][2 * m + 1], b[u][t]);
  }

  // 各 warp 的部分和 [WARPS][词元][PITCH]，按次序相加。
  auto *sums = reinterpret_cast<float *>(dynamic_shared());
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[(warp * TILES * 8 + t * 8 + fragment_column() + i % 2) * PITCH + m * 16 +
             fragment_row() + i / 2 * 8] = acc[m][t][i];
  __syncthreads();
  if (first + lane >= p.experts) return;
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    int token = t * WARPS + warp;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += sums[(i * TILES * 8 + token) * PITCH + lane];
    if (token < p.tokens) out[(part * p.tokens + token) * p.experts + first + lane] = total;
  }
}

template <class E, int TILES>
cudaError_t run_mma(const dso_moe_route_params &p, float *out, cudaStream_t stream) {
  int64_t steps = steps_per_part(p.k);
  dim3 grid(static_cast<unsigned>(ceil_div(p.experts, EXPERTS)),
            static_cast<unsigned>(ceil_div(steps_of(p.k), steps)));
  return launch(moe_logits_mma<E, TILES>, grid, dim3(THREADS), WARPS * TILES * 8 * PITCH * 4,
                stream, p, out, static_cast<int>(steps));
}

template <class E>
cudaError_t run_mma(const dso_moe_route_params &p, float *out, cudaStream_t stream) {
  if (p.tokens <= 8) return run_mma<E, 1>(p, out, stream);
  if (p.tokens <= 16) return run_mma<E, 2>(p, out, stream);
  if (p.tokens <= 32) return run_mma<E, 4>(p, out, stream);
  return run_mma<E, 8>(p, out, stream);
}

bool is_wide(const dso_moe_route_params &p) {
  return p.k % 8 == 0 && wide_ok(p.x.data, p.x.dtype, p.x.rs) &&
         wide_ok(p.weight.data, p.weight.dtype, p.weight.rs);
}

bool mma_fits(const dso_moe_route_params &p) {
  return p.tokens > 0 && p.tokens <= MOE_LOGITS_MMA_TOKENS && p.k > 0 && p.experts > 0 &&
         is_wide(p) && p.x.dtype == p.weight.dtype && p.x.dtype != DSO_F32;
}

// ---- 任意类型：一块一个专家、ROWS 个词元；各 warp 分 K，读权重的请求才够多 ----

constexpr int ROWS = 8, ROW_WARPS = 4, ROW_THREADS = ROW_WARPS * WARP;

template <int V>
__global__ __launch_bounds__(ROW_THREADS) void moe_logits_kernel(dso_moe_route_params p) {
  __shared__ float sums[ROW_WARPS][ROWS];
  int thread = static_cast<int>(threadIdx.x);
  int64_t expert = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * ROWS;
  int64_t bytes = p.k * bytes_of(p.weight.dtype);
  if (V > 1 && thread == 0 && bytes > 0)  // 等前一个核时，这一行权重先取进 L2
    prefetch_l2(
        static_cast<const char *>(p.weight.data) + expert * p.weight.rs * bytes_of(p.weight.dtype),
        static_cast<uint32_t>(bytes));
  grid_release();
  grid_wait();
  if (blockIdx.y == 0 && thread == 0) p.counts[expert] = 0;
  float sum[ROWS] = {};
#pragma unroll(V == 1 ? 1 : 4)
  for (int64_t k = static_cast<int64_t>(thread) * V; k < p.k; k += ROW_THREADS * V) {
    Vec<V> w = load<V>(p.weight.data, p.weight.dtype, expert * p.weight.rs + k);
#pragma unroll
    for (int t = 0; t < ROWS; t++) {
      if (first + t >= p.tokens) break;
      Vec<V> x = load<V>(p.x.data, p.x.dtype, (first + t) * p.x.rs + k);
#pragma unroll
      for (int i = 0; i < V; i++) sum[t] += w.v[i] * x.v[i];
    }
  }
#pragma unroll
  for (int t = 0; t < ROWS; t++) {
    float total = warp_sum(sum[t]);
    if (thread % WARP == 0) sums[thread / WARP][t] = total;
  }
  __syncthreads();
  if (thread >= ROWS || first + thread >= p.tokens) return;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < ROW_WARPS; w++) total += sums[w][thread];
  p.logits[(first + thread) * p.experts + expert] = total;
}

}  // namespace

int64_t dso_cuda_moe_logits_parts(const dso_moe_route_params *p) {
  if (!p->has_weight) return 0;
  if (mma_fits(*p)) return ceil_div(steps_of(p->k), steps_per_part(p->k));
  return p->tokens <= MOE_LOGITS_TOKENS ? 1 : 0;
}

cudaError_t dso_cuda_moe_logits(const dso_moe_route_params *p, float *parts, cudaStream_t stream) {
  if (mma_fits(*p)) {
    float *out = dso_cuda_moe_logits_parts(p) > 1 ? parts : p->logits;
    return p->x.dtype == DSO_BF16 ? run_mma<Bf16>(*p, out, stream) : run_mma<F16>(*p, out, stream);
  }
  dim3 grid(static_cast<unsigned>(p->experts), static_cast<unsigned>(ceil_div(p->tokens, ROWS)));
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  auto kernel = is_wide(*p) ? moe_logits_kernel<8> : moe_logits_kernel<1>;
  return launch(kernel, grid, dim3(ROW_THREADS), 0, stream, *p);
}
