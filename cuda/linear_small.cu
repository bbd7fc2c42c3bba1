// 行极少时的 y = x Wᵀ + b：受限于读权重，带宽之外的时间都在启动与第一次读的延迟上，所以不交给 cuBLAS（它的核不能提前
// 启动，K 分段时还多一个核）。
//
// 一块 16 列，各 warp 分 K；权重的行直接读进 mma 的片段：一个线程连续的 16 字节（8 个数）当作两个 k16 的片段的一半，
// x 按同样的次序读，不经过共享内存。各 warp 的部分和按次序相加，结果与网格无关。等前一个核时权重已在往 L2 里取：前面多是
// 受限于延迟的短核，显存正闲着。一次可以有两个权重（同一个 x）：各自写出，少一个核；或 gated，写出 silu(第一个) * 第二个。
#include "config.cuh"
#include "dso_cuda.h"
#include "mma.cuh"

namespace {

using namespace dso;

constexpr int ROWS = LINEAR_ROWS, WARPS = LINEAR_WARPS, THREADS = WARPS * WARP;
constexpr int COLUMNS = 16, STEP = 32;  // 一个 warp 一次 32 个 k：4 个线程各 8 个
constexpr int ROUND = WARPS * STEP;
static_assert(WARPS == COLUMNS / 2, "一个 warp 预取两行");

using Part = dso_cuda_linear_part;

// 一份权重的 16 列：本线程的两行（越界的读最后一行，不写），与累加器。
template <class E>
struct Strip {
  const uint16_t *top, *bottom;
  float acc[4] = {};

  __device__ Strip(const Part &part, int64_t first) {
    int64_t last = part.n - 1, g = first + threadIdx.x % WARP / 4;
    const auto *w = static_cast<const uint16_t *>(part.weight.data) + blockIdx.y * part.weight_step;
    top = w + (g < last ? g : last) * part.weight.rs;
    bottom = w + (g + 8 < last ? g + 8 : last) * part.weight.rs;
  }

  // 一行由一个线程请 L2 取，至多 most 字节；这条指令逐个线程执行，所以各 warp 分着做。
  __device__ void prefetch(int64_t k, int most) const {
    if (threadIdx.x / WARP != threadIdx.x % WARP / 4 || threadIdx.x % 4 > 1) return;
    int64_t bytes = k * 2 < most ? k * 2 : most;
    if (bytes > 0) prefetch_l2(threadIdx.x % 4 == 0 ? top : bottom, static_cast<uint32_t>(bytes));
  }
};

// 先发出 UNROLL 步的全部读，再算：一块的权重大多同时在路上。
template <class E, int SETS>
__device__ __forceinline__ void accumulate(const dso_cuda_linear_params &p,
                                           Strip<E> (&strips)[SETS]) {
  constexpr int UNROLL = LINEAR_UNROLL / SETS;
  int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  const auto *x =
      static_cast<const uint16_t *>(p.x.data) + blockIdx.y * p.x_step + lane / 4 * p.x.rs;
  bool real = lane / 4 < p.m;
  const Words<4> zero = {};
  for (int64_t begin = 0; begin < p.k; begin += UNROLL * ROUND) {
    Words<4> a[UNROLL][SETS], b[UNROLL][SETS], in[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      int64_t k = begin + u * ROUND + warp * STEP + lane % 4 * 8;
      bool inside = k < p.k;
#pragma unroll
      for (int s = 0; s < SETS; s++) {
        a[u][s] = inside ? load_once(strips[s].top + k) : Words<4>{};
        b[u][s] = inside ? load_once(strips[s].bottom + k) : Words<4>{};
      }
      in[u] = inside && real ? *reinterpret_cast<const Words<4> *>(x + k) : zero;
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int s = 0; s < SETS; s++) mma_rows<E>(strips[s].acc, a[u][s], b[u][s], in[u]);
  }
}

using Sums = float[WARPS][ROWS][COLUMNS + 1];

template <class E>
__device__ void put(Sums &sums, const Strip<E> &strip) {
  int warp = static_cast<int>(threadIdx.x) / WARP;
#pragma unroll
  for (int i = 0; i < 4; i++)
    sums[warp][fragment_column() + i % 2][fragment_row() + i / 2 * 8] = strip.acc[i];
}

// 结果在 y 里的位置。
__device__ int64_t place(const Part &part, int row, int64_t n) {
  return blockIdx.y * part.y_step + row * part.y_rs + n;
}

__device__ float total(const Sums &sums, const Part &part, dso_dtype dtype, int row, int column,
                       int64_t n) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) sum += sums[w][row][column];
  return part.bias ? sum + load_one(part.bias, dtype, n) : sum;
}

// 前 first_blocks 块是第一个权重的，其余是第二个的；blockIdx.y 是 batch 里的第几个。
template <class E>
__global__ __launch_bounds__(THREADS, 3) void linear_small_kernel(dso_cuda_linear_params p,
                                                                  int first_blocks) {
  __shared__ Sums sums;
  int block = static_cast<int>(blockIdx.x);
  Part part = block < first_blocks ? p.part[0] : p.part[1];
  int64_t first =
      static_cast<int64_t>(block < first_blocks ? block : block - first_blocks) * COLUMNS;
  Strip<E> strips[1] = {{part, first}};
  strips[0].prefetch(p.k, LINEAR_PREFETCH);
  grid_release();  // 后面多是短核
  grid_wait();
  accumulate<E, 1>(p, strips);
  put(sums, strips[0]);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * COLUMNS; i += THREADS) {
    int row = i / COLUMNS, column = i % COLUMNS;
    int64_t n = first + column;
    if (row < p.m && n < part.n)
      store_one(part.y, p.x.dtype, place(part, row, n),
                total(sums, part, p.x.dtype, row, column, n));
  }
}

// 两个权重的同样 16 列：第一个的 y 写出激活之后的积。
template <class E>
__global__ __launch_bounds__(THREADS, 3) void linear_gated_kernel(dso_cuda_linear_params p) {
  __shared__ Sums gates, ups;
  int64_t first = static_cast<int64_t>(blockIdx.x) * COLUMNS;
  Strip<E> strips[2] = {{p.part[0], first}, {p.part[1], first}};
#pragma unroll
  for (const Strip<E> &strip : strips) strip.prefetch(p.k, LINEAR_PREFETCH / 2);
  grid_wait();  // 后面是 down，占满整张卡的：不 grid_release
  accumulate<E, 2>(p, strips);
  put(gates, strips[0]);
  put(ups, strips[1]);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * COLUMNS; i += THREADS) {
    int row = i / COLUMNS, column = i % COLUMNS;
    int64_t n = first + column;
    if (row >= p.m || n >= p.part[0].n) continue;
    float g = total(gates, p.part[0], p.x.dtype, row, column, n),
          u = total(ups, p.part[1], p.x.dtype, row, column, n);
    store_one(p.part[0].y, p.x.dtype, place(p.part[0], row, n), g / (1.0f + expf(-g)) * u);
  }
}

template <class E>
cudaError_t run(const dso_cuda_linear_params &p, cudaStream_t stream) {
  auto blocks = [&](int i) { return static_cast<unsigned>(ceil_div(p.part[i].n, COLUMNS)); };
  auto batch = static_cast<unsigned>(p.batch);
  if (p.gated)
    return launch(linear_gated_kernel<E>, dim3(blocks(0), batch), dim3(THREADS), 0, stream, p);
  dim3 grid(blocks(0) + blocks(1), batch);
  return launch(linear_small_kernel<E>, grid, dim3(THREADS), 0, stream, p,
                static_cast<int>(blocks(0)));
}

bool part_fits(const Part &part, dso_dtype dtype) {
  return part.n == 0 || (part.weight.dtype == dtype && part.weight_step % 8 == 0 &&
                         wide_ok(part.weight.data, dtype, part.weight.rs));
}

}  // namespace

int dso_cuda_linear_fits(const dso_cuda_linear_params *p) {
  dso_dtype dtype = p->x.dtype;
  return dtype != DSO_F32 && p->m <= LINEAR_ROWS && p->k % 8 == 0 && p->x_step % 8 == 0 &&
         wide_ok(p->x.data, dtype, p->x.rs) && part_fits(p->part[0], dtype) &&
         part_fits(p->part[1], dtype);
}

cudaError_t dso_cuda_linear(const dso_cuda_linear_params *p, cudaStream_t stream) {
  if (p->m * p->batch == 0 || p->part[0].n + p->part[1].n == 0) return cudaSuccess;
  return p->x.dtype == DSO_BF16 ? run<Bf16>(*p, stream) : run<F16>(*p, stream);
}
