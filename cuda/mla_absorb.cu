// 一两行的吸收：各头的 y [m, n] = x [m, k] W [k, n]（W 是 kv_b 里 W_UK 的几行，按 [k][n] 存，所以不能用 linear_small）。
//
// 权重只有几十 KiB 一个头，受限于延迟：一块一个头的 128 列，一个线程 8 列、隔 16 个 k 取一个，先发出全部的读；普通的
// fp32 乘加，部分和按固定的次序相加，结果与网格无关。
#include "config.cuh"
#include "dso_cuda.h"
#include "mma.cuh"

namespace {

using namespace dso;

constexpr int ROWS = ABSORB_ROWS, WARPS = LINEAR_WARPS, THREADS = WARPS * WARP;
constexpr int COLUMNS = 128, EACH = 8, ACROSS = COLUMNS / EACH;              // 16 个线程一行权重
constexpr int GROUPS = THREADS / ACROSS, DEPTH = 8, ROUND = GROUPS * DEPTH;  // 一轮 128 个 k
static_assert(WARP == 2 * ACROSS, "一个 warp 两行权重");

using Params = dso_cuda_heads_params;

template <class E>
__device__ void add_row(float (&sum)[EACH], const Words<4> &w, float x) {
#pragma unroll
  for (int i = 0; i < EACH / 2; i++)
    sum[2 * i] += x * E::low(w.v[i]), sum[2 * i + 1] += x * E::high(w.v[i]);
}

// 本线程的 8 列，隔 GROUPS 取一个 k；x 的这一轮经共享内存，各行只等一次。
template <class E>
__device__ void accumulate(const Params &p, const uint16_t *w, const uint16_t *x,
                           float (&sum)[ROWS][EACH]) {
  __shared__ uint16_t line[ROWS][ROUND];
  int thread = static_cast<int>(threadIdx.x), group = thread / ACROSS;
  for (int64_t begin = 0; begin < p.k; begin += ROUND) {
    Words<4> rows[DEPTH];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      int64_t k = begin + group + d * GROUPS;
      rows[d] = w && k < p.k ? load_once(w + k * p.w_rs) : Words<4>{};
    }
    __syncthreads();  // 上一轮的都读过了
    for (int i = thread; i < p.m * ROUND; i += THREADS) {
      int64_t m = i / ROUND, k = begin + i % ROUND;
      line[m][i % ROUND] = k < p.k ? x[m * p.x_ms + k] : static_cast<uint16_t>(0);
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
      if (m >= p.m) break;
#pragma unroll
      for (int d = 0; d < DEPTH; d++)
        add_row<E>(sum[m], rows[d], E::low(line[m][group + d * GROUPS]));
    }
  }
}

template <class E>
__global__ __launch_bounds__(THREADS, 1) void mla_absorb_kernel(Params p) {
  __shared__ float part[WARPS][ROWS][COLUMNS];
  int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
  int64_t head = blockIdx.y, first = static_cast<int64_t>(blockIdx.x) * COLUMNS;
  int64_t column = first + threadIdx.x % ACROSS * EACH;
  const auto *w = static_cast<const uint16_t *>(p.w) + head * p.w_hs;
  const auto *x = static_cast<const uint16_t *>(p.x) + head * p.x_hs;
  int64_t width = p.n - first < COLUMNS ? p.n - first : COLUMNS;
  if (threadIdx.x < p.k) prefetch_l2(w + threadIdx.x * p.w_rs + first, width * 2);
  grid_wait();
  grid_release();  // 不提早：后面的解码于是可以先读缓存（launch.cuh）
  float sum[ROWS][EACH] = {};
  accumulate<E>(p, column < p.n ? w + column : nullptr, x, sum);
#pragma unroll
  for (int m = 0; m < ROWS; m++) {
    if (m >= p.m) break;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      float both = sum[m][i] + __shfl_xor_sync(ALL_LANES, sum[m][i], ACROSS);
      if (lane < ACROSS) part[warp][m][lane * EACH + i] = both;
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < p.m * COLUMNS; i += THREADS) {
    int m = i / COLUMNS, c = i % COLUMNS;
    if (c >= width) continue;
    float total = 0.0f;
#pragma unroll
    for (int other = 0; other < WARPS; other++) total += part[other][m][c];
    store_one(p.y, p.dtype, m * p.y_ms + head * p.y_hs + first + c, total);
  }
}

}  // namespace

int dso_cuda_absorb_fits(const dso_cuda_heads_params *p) {
  return p->dtype != DSO_F32 && p->m <= ROWS && p->n % EACH == 0 && p->w_hs % EACH == 0 &&
         wide_ok(p->w, p->dtype, p->w_rs);
}

cudaError_t dso_cuda_absorb(const dso_cuda_heads_params *p, cudaStream_t stream) {
  if (p->m * p->heads * p->n == 0) return cudaSuccess;
  dim3 grid(static_cast<unsigned>(ceil_div(p->n, COLUMNS)), static_cast<unsigned>(p->heads));
  auto kernel = p->dtype == DSO_BF16 ? mla_absorb_kernel<Bf16> : mla_absorb_kernel<F16>;
  return launch(kernel, grid, dim3(THREADS), 0, stream, *p);
}
