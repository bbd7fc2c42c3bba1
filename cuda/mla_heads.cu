// 词元不多时 mla_decode 前后各头的矩阵乘：吸收 y = x W（W 按 [k][n] 存）与 W_UV 的 y = x Wᵀ（按 [n][k] 存）。
//
// 一个头只有一百多 KiB 权重，cuBLAS 的时间大半在启动与第一次读的延迟上，也不能提前启动。一块是一个头的 32 或 64 行、64
// 列：cp.async 分段读进共享内存，到一段算一段（r 一般不超过 512，全部的读一开始就都发出去）；各 warp 32 x 32，两组 warp 轮着
// 做 16 个 k，最后依次相加：次序只看 k，与网格、与一块几行无关。
//
// W_UV 前面是合并，再前面是注意力（不提早放行）：启动时权重已经写好了（launch.cuh），在 grid_wait 之前读进来，之后只读 x。
// 吸收前面都是短核，权重只能先取进 L2。
#include "config.cuh"
#include "dso_cuda.h"
#include "mma.cuh"

namespace {

using namespace dso;

using Params = dso_cuda_heads_params;

constexpr int COLUMNS = HEADS_COLUMNS, HALVES = 2, WARP_TILE = 32;
constexpr int SUM_PITCH = COLUMNS + 8;  // fp32：半个 warp 写 8 字节一个，没有库冲突

static_assert(COLUMNS == 2 * WARP_TILE, "一行块两个 warp");

// 共享内存：x [ROWS][STAGES 段 k]；权重 [COLUMNS][STAGES 段 k] 或 [STAGES 段 k][COLUMNS]。算完之后改放部分和。
template <bool BY_ROW, int ROWS>
struct Shape {
  static constexpr int DEPTH = BY_ROW ? HEADS_VALUE_DEPTH : HEADS_ABSORB_DEPTH;
  static constexpr int STAGES = BY_ROW ? HEADS_VALUE_STAGES : HEADS_ABSORB_STAGES;
  static constexpr int THREADS = ROWS / WARP_TILE * 2 * HALVES * WARP;
  static constexpr int X_PITCH = STAGES * DEPTH + TILE_PAD;
  static constexpr int W_ROWS = BY_ROW ? COLUMNS : STAGES * DEPTH;
  static constexpr int W_PITCH = BY_ROW ? X_PITCH : COLUMNS + TILE_PAD;
  static constexpr int TILES = (ROWS * X_PITCH + W_ROWS * W_PITCH) * 2;
  static constexpr int SUMS = HALVES * ROWS * SUM_PITCH * 4;
  static constexpr int BYTES = TILES > SUMS ? TILES : SUMS;
};

template <class E, bool BY_ROW, int ROWS>
struct Block {
  using S = Shape<BY_ROW, ROWS>;
  static constexpr int DEPTH = S::DEPTH, STAGES = S::STAGES, THREADS = S::THREADS;

  const Params &p;
  int thread = static_cast<int>(threadIdx.x), warp = thread / WARP;
  int row = warp / 4 * WARP_TILE, column = warp / 2 % 2 * WARP_TILE, half = warp % 2;
  // 本块的第一行、第一列，还有几行、几列
  int first_row = static_cast<int>(blockIdx.z) * ROWS;
  int first_column = static_cast<int>(blockIdx.x) * COLUMNS;
  int rows = static_cast<int>(p.m) - first_row, columns = static_cast<int>(p.n) - first_column;
  int depth = static_cast<int>(p.k);
  const uint16_t *x = static_cast<const uint16_t *>(p.x) + blockIdx.y * p.x_hs + first_row * p.x_ms;
  const uint16_t *w = static_cast<const uint16_t *>(p.w) + blockIdx.y * p.w_hs +
                      first_column * (BY_ROW ? p.w_rs : 1);
  uint16_t *x_tile = reinterpret_cast<uint16_t *>(dynamic_shared());
  uint16_t *w_tile = x_tile + ROWS * S::X_PITCH;
  float acc[2][4][4] = {};

  __device__ explicit Block(const Params &params) : p(params) {}

  // 第 chunk 段（DEPTH 个 k）的 x；没有的行、k 填 0。
  __device__ void load_x(int chunk) const {
    constexpr int ACROSS = DEPTH / 8, STEP = THREADS / ACROSS;
    int at = thread % ACROSS * 8, k = chunk * DEPTH + at, first = thread / ACROSS;
    const uint16_t *from = x + first * p.x_ms + k;
    uint16_t *to = x_tile + first * S::X_PITCH + chunk % STAGES * DEPTH + at;
#pragma unroll
    for (int r = 0; r < ROWS; r += STEP)
      cp_async_16(to + r * S::X_PITCH, from + r * p.x_ms, k < depth && first + r < rows);
  }

  // 同一段的权重；EARLY：还没有 grid_wait。
  template <bool EARLY>
  __device__ void load_w(int chunk) const {
    constexpr int ACROSS = (BY_ROW ? DEPTH : COLUMNS) / 8, STEP = THREADS / ACROSS;
    int at = thread % ACROSS * 8, first = thread / ACROSS, slot = chunk % STAGES * DEPTH;
    int line = BY_ROW ? first : chunk * DEPTH + first, inside = BY_ROW ? chunk * DEPTH + at : at;
    int lines = BY_ROW ? columns : depth, width = BY_ROW ? depth : columns;
    const uint16_t *from = w + line * p.w_rs + inside;
    uint16_t *to = w_tile + (BY_ROW ? first * S::W_PITCH + slot : (slot + first) * S::W_PITCH) + at;
#pragma unroll
    for (int r = 0; r < (BY_ROW ? COLUMNS : DEPTH); r += STEP) {
      bool valid = inside < width && line + r < lines;
      if constexpr (EARLY)
        cp_async_16_early(to + r * S::W_PITCH, from + r * p.w_rs, valid);
      else
        cp_async_16(to + r * S::W_PITCH, from + r * p.w_rs, valid);
    }
  }

  // 吸收的权重，请 L2 先取；同样的只由第一块行的取。
  __device__ void prefetch() const {
    if (blockIdx.z > 0) return;
    int width = columns < COLUMNS ? columns : COLUMNS;
    for (int k = thread; k < depth; k += THREADS)
      prefetch_l2(w + k * p.w_rs, static_cast<uint32_t>(width * 2));
  }

  // 本 warp 的 32 行 x 与 32 列权重，从第 k 个起的 16 个 k。
  struct Fragments {
    uint32_t a[2][4], b[2][4];
  };

  __device__ void load(Fragments &f, int k) const {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      load_a(f.a[i], x_tile, S::X_PITCH, row + i * 16, k);
      if constexpr (BY_ROW)
        load_b_16x16(f.b[i], w_tile, S::W_PITCH, column + i * 16, k);
      else
        load_b_trans(f.b[i], w_tile, S::W_PITCH, k, column + i * 16);
    }
  }

  // 一段：两组 warp 各做一半的 k16；下一步的片段先读，一个调度器上只有一个 warp 时也盖住延迟。
  __device__ void multiply(int slot) {
    constexpr int STEPS = DEPTH / 16 / HALVES;
    int begin = slot * DEPTH + half * 16;
    Fragments f[2];
    load(f[0], begin);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      if (step + 1 < STEPS) load(f[(step + 1) % 2], begin + (step + 1) * 16 * HALVES);
      const Fragments &now = f[step % 2];
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          E::mma(acc[i][j], now.a[i], now.b[j / 2][j % 2 * 2], now.b[j / 2][j % 2 * 2 + 1]);
    }
  }

  // 两组的部分和依次相加，一个线程写 8 列。
  __device__ void store() const {
    auto *sums = reinterpret_cast<float *>(dynamic_shared());
    float *mine = sums + (half * ROWS + row) * SUM_PITCH + column;
    __syncthreads();  // 都算完了才改写
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        *reinterpret_cast<float2 *>(mine + (fragment_row() + i * 8) * SUM_PITCH + j * 8 +
                                    fragment_column()) =
            make_float2(acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]);
    __syncthreads();
    auto *y =
        static_cast<uint16_t *>(p.y) + blockIdx.y * p.y_hs + first_row * p.y_ms + first_column;
#pragma unroll
    for (int i = thread; i < ROWS * COLUMNS / 8; i += THREADS) {
      int r = i / (COLUMNS / 8), c = i % (COLUMNS / 8) * 8;
      if (r >= rows || c >= columns) continue;
      Words<4> out;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float *one = sums + r * SUM_PITCH + c + 2 * j, *other = one + ROWS * SUM_PITCH;
        out.v[j] = E::pack(one[0] + other[0], one[1] + other[1]);
      }
      *reinterpret_cast<Words<4> *>(y + r * p.y_ms + c) = out;
    }
  }
};

// 至少两块：不写时 ptxas 只给 64 个寄存器，下一步的片段放不下；两块时约 100 个，与合并的两块还能同在一个 SM 上。
template <class E, bool BY_ROW, int ROWS>
__global__ __launch_bounds__(Shape<BY_ROW, ROWS>::THREADS, 2) void mla_heads_kernel(Params p) {
  constexpr int DEPTH = Shape<BY_ROW, ROWS>::DEPTH, STAGES = Shape<BY_ROW, ROWS>::STAGES;
  Block<E, BY_ROW, ROWS> block(p);
  const int chunks = (block.depth + DEPTH - 1) / DEPTH;
  if constexpr (BY_ROW)
    grid_release();
  else
    block.prefetch();
  const bool early = BY_ROW && p.settled;
#pragma unroll
  for (int c = 0; c < STAGES; c++)
    if (early && c < chunks) block.template load_w<true>(c);
  grid_wait();
  if constexpr (!BY_ROW) grid_release();  // 吸收：不提早，后面的解码于是可以先读缓存（launch.cuh）
#pragma unroll
  for (int c = 0; c < STAGES; c++) {
    if (!early && c < chunks) block.template load_w<false>(c);
    if (c < chunks) block.load_x(c);
    cp_async_commit();
  }
#pragma unroll(STAGES)
  for (int c = 0; c < chunks; c++) {
    cp_async_wait<STAGES - 1>();
    __syncthreads();
    block.multiply(c % STAGES);
    if (c + STAGES < chunks) {
      __syncthreads();  // 都读过了才覆盖
      block.template load_w<false>(c + STAGES);
      block.load_x(c + STAGES);
    }
    cp_async_commit();
  }
  block.store();
}

template <class E, bool BY_ROW, int ROWS>
cudaError_t run(const Params &p, cudaStream_t stream) {
  using S = Shape<BY_ROW, ROWS>;
  dim3 grid(static_cast<unsigned>(ceil_div(p.n, COLUMNS)), static_cast<unsigned>(p.heads),
            static_cast<unsigned>(ceil_div(p.m, ROWS)));
  return launch(mla_heads_kernel<E, BY_ROW, ROWS>, grid, dim3(S::THREADS), S::BYTES, stream, p);
}

// 32 行一块时一个 SM 摊不到一块的，就 32 行；否则 64 行，权重少读一遍。
template <class E, bool BY_ROW>
cudaError_t pick_rows(const Params &p, const Device &device, cudaStream_t stream) {
  int64_t blocks = ceil_div(p.m, 32) * ceil_div(p.n, COLUMNS) * p.heads;
  bool narrow = p.m <= 32 || blocks <= device.sms || Shape<BY_ROW, 64>::BYTES > device.shared_limit;
  return narrow ? run<E, BY_ROW, 32>(p, stream) : run<E, BY_ROW, 64>(p, stream);
}

}  // namespace

int dso_cuda_heads_fits(const dso_cuda_heads_params *p) {
  return p->dtype != DSO_F32 && p->m * p->heads <= HEADS_PRODUCTS && p->k % 8 == 0 &&
         p->n % 8 == 0 && p->x_hs % 8 == 0 && p->w_hs % 8 == 0 && p->y_hs % 8 == 0 &&
         wide_ok(p->x, p->dtype, p->x_ms) && wide_ok(p->w, p->dtype, p->w_rs) &&
         wide_ok(p->y, p->dtype, p->y_ms);
}

cudaError_t dso_cuda_heads(const dso_cuda_heads_params *p, cudaStream_t stream) {
  if (p->m * p->heads * p->n == 0) return cudaSuccess;
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  bool bf16 = p->dtype == DSO_BF16;
  if (p->by_row)
    return bf16 ? pick_rows<Bf16, true>(*p, device, stream)
                : pick_rows<F16, true>(*p, device, stream);
  return bf16 ? pick_rows<Bf16, false>(*p, device, stream)
              : pick_rows<F16, false>(*p, device, stream);
}
