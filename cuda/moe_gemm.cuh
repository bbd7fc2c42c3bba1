// sm_80 的分组矩阵乘共用（前向 moe_mma.cu、反向 moe_backward_mma.cu）：一块 128 行 x 256 列、8 个 warp 各 64 x 64，
// cp.async 多级流水，一级 64 个 k。两边的操作数各有两种存法：[行或列][k]，或 [k][行或列]（WIDE，由 ldmatrix 转置）。
//
// 共享内存里的行不补齐：每 128 字节的 8 段（16 字节）按行号异或交错，ldmatrix 的 8 行、拷贝的 8 个线程都落在不同的库。
#pragma once

#include "config.cuh"
#include "mma.cuh"

namespace dso::gemm {

constexpr int ROWS = MOE_ROWS, COLUMNS = MOE_COLUMNS, DEPTH = MOE_DEPTH;
constexpr int TILE = 64;  // 一个 warp 的行数、列数
constexpr int ACROSS = COLUMNS / TILE, WARPS = ROWS / TILE * ACROSS, THREADS = WARPS * WARP;
constexpr int STEPS = DEPTH / 16;
constexpr int A_ELEMS = ROWS * DEPTH, B_ELEMS = COLUMNS * DEPTH, STAGE_ELEMS = A_ELEMS + B_ELEMS;
constexpr int CHUNK = 8;  // 一段 16 字节
// 每线程一级拷几段：左边一份，右边几份，分到各步发出，不与 ldmatrix 挤在一处。
constexpr int COPIES = A_ELEMS / CHUNK / THREADS, PARTS = STAGE_ELEMS / A_ELEMS;
constexpr int RIGHT = (PARTS - 1) * COPIES;
static_assert(DEPTH == 64, "一行 k 正好 128 字节");
static_assert(PARTS < STEPS, "一步一份，下一级的屏障之前提交");

constexpr int pipeline_bytes(int stages) { return stages * STAGE_ELEMS * 2; }

// 这块卡上几级。
inline int stages_of(int shared_limit) {
  return pipeline_bytes(MOE_STAGES) <= shared_limit ? MOE_STAGES : MOE_LEAST_STAGES;
}

__device__ __forceinline__ int warp_row() {
  return static_cast<int>(threadIdx.x) / WARP / ACROSS * TILE;
}
__device__ __forceinline__ int warp_column() {
  return static_cast<int>(threadIdx.x) / WARP % ACROSS * TILE;
}

// ---- 拷入：块的一行 WIDTH 个元素 ----

template <int WIDTH>
struct Copy {
  static constexpr int LINES = THREADS * CHUNK / WIDTH;  // 相邻两段隔几行
  int line, at, to;                                      // 第 0 段的行、列、在块里的位置

  __device__ __forceinline__ Copy() {
    int thread = static_cast<int>(threadIdx.x), chunk = thread % (WIDTH / CHUNK);
    line = thread / (WIDTH / CHUNK), at = chunk * CHUNK;
    to = line * WIDTH + (chunk ^ line % 8) * CHUNK;
  }

  __device__ __forceinline__ void start(uint16_t *tile, int i, const void *from, bool valid) const {
    cp_async_16(tile + to + i * LINES * WIDTH, from, valid);
  }
};

// ---- 片段 ----

using Sums = float[TILE / 16][TILE / 8][4];

// 一步（16 个 k）的操作数。
struct Fragments {
  uint32_t a[TILE / 16][4], b[TILE / 16][4];
};

// 本线程在一边的块里读 16 x 16 的位置。
template <bool WIDE, int WIDTH>
struct Lane {
  int at;

  // first：这个 warp 的第一行（列）；tall：前 16 个线程依次是 16 行，否则每 8 个换一段。
  __device__ __forceinline__ Lane(int first, bool tall) {
    int lane = static_cast<int>(threadIdx.x) % WARP;
    int line = tall ? lane % 16 : lane / 16 * 8 + lane % 8;
    int chunk = tall ? lane / 16 : lane / 8 % 2;
    if (WIDE)
      chunk += first / CHUNK;
    else
      line += first;
    at = line * WIDTH + (chunk ^ line % 8) * CHUNK;
  }

  // 从第 base 个元素起的块，第 step 步的第 i 个：沿着行走是异或（交错），换行是固定的间隔。
  __device__ __forceinline__ void load(uint32_t (&r)[4], const uint16_t *shared, int base, int step,
                                       int i) const {
    int line = ((base + at) ^ (WIDE ? i : step) * 16) + (WIDE ? step : i) * 16 * WIDTH;
    if (WIDE)
      ldmatrix_x4_trans(r, shared + line);
    else
      ldmatrix_x4(r, shared + line);
  }
};

template <bool A_WIDE, bool B_WIDE>
struct Reader {
  Lane<A_WIDE, A_WIDE ? ROWS : DEPTH> a;
  Lane<B_WIDE, B_WIDE ? COLUMNS : DEPTH> b;

  __device__ __forceinline__ Reader() : a(warp_row(), !A_WIDE), b(warp_column(), B_WIDE) {}

  __device__ __forceinline__ void load(Fragments &f, const uint16_t *shared, int stage,
                                       int step) const {
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) {
      a.load(f.a[i], shared, stage * STAGE_ELEMS, step, i);
      b.load(f.b[i], shared, stage * STAGE_ELEMS + A_ELEMS, step, i);
    }
  }
};

template <class E>
__device__ __forceinline__ void multiply(Sums &sum, const Fragments &f) {
#pragma unroll
  for (int i = 0; i < TILE / 16; i++)
#pragma unroll
    for (int j = 0; j < TILE / 16; j++) {
      E::mma(sum[i][2 * j], f.a[i], f.b[j][0], f.b[j][1]);
      E::mma(sum[i][2 * j + 1], f.a[i], f.b[j][2], f.b[j][3]);
    }
}

// ---- 流水 ----

// 至多留下 stages - 2 级没有到。
__device__ __forceinline__ void wait_stage(int stages) {
  static_assert(MOE_LEAST_STAGES == 2 && MOE_STAGES == 3, "只有这两种");
  if (stages == MOE_STAGES)
    cp_async_wait<MOE_STAGES - 2>();
  else
    cp_async_wait<0>();
}

__device__ __forceinline__ uint16_t *stage_at(uint16_t *shared, int stage) {
  return shared + stage * STAGE_ELEMS;
}

// 主循环：片段提前一步读，最后一步之前等下一级；腾出的一级从那时起分 PARTS 步拷入。末尾多读的一步没有用。
// source.load(块, 级, 份) 发出 cp.async，source.settle(块, 级) 写完不能异步拷的；块越界时都什么也不做。
template <class E, bool A_WIDE, bool B_WIDE, bool ACTIVE, class Source>
__device__ __forceinline__ void loop(Source &source, Sums &sum, uint16_t *shared, int blocks,
                                     int stages) {
  Reader<A_WIDE, B_WIDE> reader;
  Fragments f[2];
  int read = 0, write = stages - 1;
  if (ACTIVE) reader.load(f[0], shared, read, 0);
#pragma unroll 1
  for (int block = 0; block < blocks; block++) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      bool last = step == STEPS - 1;
      if (last) {
        source.settle(block + stages - 1, stage_at(shared, write));
        wait_stage(stages);
        __syncthreads();
        write = read;
        read = read + 1 == stages ? 0 : read + 1;
      }
      if (ACTIVE) reader.load(f[(step + 1) % 2], shared, read, (step + 1) % STEPS);
      int part = (step + 1) % STEPS;
      if (part < PARTS) source.load(block + stages - 1 + last, stage_at(shared, write), part);
      if (part == PARTS - 1) cp_async_commit();
      if (ACTIVE) multiply<E>(sum, f[step % 2]);
    }
  }
}

// sum = 全部 blocks 级的 a b；active：这个 warp 的行、列在范围之内，否则只拷贝。
template <class E, bool A_WIDE, bool B_WIDE, class Source>
__device__ __forceinline__ void accumulate(Source &source, Sums &sum, uint16_t *shared, int blocks,
                                           int stages, bool active) {
#pragma unroll 1
  for (int s = 0; s < stages - 1; s++) {
#pragma unroll
    for (int part = 0; part < PARTS; part++) source.load(s, stage_at(shared, s), part);
    cp_async_commit();
    source.settle(s, stage_at(shared, s));
  }
  source.load(stages - 1, stage_at(shared, stages - 1), 0);
  wait_stage(stages);
  __syncthreads();
  if (active)
    loop<E, A_WIDE, B_WIDE, true>(source, sum, shared, blocks, stages);
  else
    loop<E, A_WIDE, B_WIDE, false>(source, sum, shared, blocks, stages);
}

// ---- 写出 ----

// 一个 warp 的 fp32 结果分几次经共享内存（流水的缓冲）换成行内连续。行距余 8 个库，每 32 列另隔 4 个：一次写 8 字节的
// 16 个线程、读一行 16 字节的 8 个线程都没有冲突（一行只读 4 段时每两行有两路冲突）。
constexpr int PASS_ROWS = 32, RESULT_STRIDE = TILE + 8;
static_assert(WARPS * PASS_ROWS * RESULT_STRIDE * 4 <= pipeline_bytes(MOE_LEAST_STAGES),
              "结果放不下");

__device__ __forceinline__ constexpr int result_column(int column) {
  return column + column / 32 * 4;
}

// 一行的 8 个结果，从这个 warp 的第 column 列起（8 的倍数）。
__device__ __forceinline__ Vec<8> result(const float *row, int column) {
  const auto *from = reinterpret_cast<const float4 *>(row + result_column(column));
  float4 a = from[0], b = from[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

template <int PASS>
__device__ __forceinline__ void put_results(const Sums &sum, float *to) {
#pragma unroll
  for (int i = 0; i < PASS_ROWS / 16; i++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int j = 0; j < TILE / 8; j++) {
        const float (&from)[4] = sum[PASS * PASS_ROWS / 16 + i][j];
        float *at = to + (fragment_row() + i * 16 + half * 8) * RESULT_STRIDE;
        *reinterpret_cast<float2 *>(at + result_column(j * 8) + fragment_column()) =
            make_float2(from[2 * half], from[2 * half + 1]);
      }
}

// 对这个 warp 的每一行、一行的每一段调用 each(块里的行, 第几段, 这一行的结果)；相邻的线程是相邻的段，一个 warp 一起走。
template <class Each>
__device__ __forceinline__ void for_results(const Sums &sum, uint16_t *shared, bool active,
                                            int chunks, Each each) {
  int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
  float *mine = reinterpret_cast<float *>(shared) + warp * PASS_ROWS * RESULT_STRIDE;
  static_assert(TILE == 2 * PASS_ROWS, "分两次");
  __syncthreads();  // 流水的缓冲都读完了
  if (!active) return;
#pragma unroll 1
  for (int pass = 0; pass < 2; pass++) {
    __syncwarp();
    if (pass == 0)
      put_results<0>(sum, mine);
    else
      put_results<1>(sum, mine);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < PASS_ROWS * chunks; i += WARP) {
      int row = i / chunks;
      each(warp_row() + pass * PASS_ROWS + row, i % chunks, mine + row * RESULT_STRIDE);
    }
  }
}

}  // namespace dso::gemm
