// sm_80 的分组矩阵乘共用（前向 moe_mma.cu、反向 moe_backward_mma.cu）：一块 128 行 x 128 列、4 个 warp 各 64 x 64，
// cp.async 多级流水，一级 32 个 k。两边的操作数各有两种存法：[行或列][k]，或 [k][行或列]（WIDE，由 ldmatrix 转置）。
#pragma once

#include "config.cuh"
#include "mma.cuh"

namespace dso::gemm {

constexpr int ROWS = MOE_ROWS, COLUMNS = 128, DEPTH = MOE_DEPTH, STAGES = MOE_STAGES;
constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int TILE = 64;                         // 一个 warp 的行数、列数
constexpr int STRIDE = DEPTH + TILE_PAD;         // [行或列][k]
constexpr int WIDE_STRIDE = COLUMNS + TILE_PAD;  // [k][行或列]
constexpr int A_ELEMS = ROWS * STRIDE;
constexpr int B_ELEMS = COLUMNS * STRIDE;  // 不小于 DEPTH * WIDE_STRIDE
constexpr int PIPELINE = STAGES * (A_ELEMS + B_ELEMS) * 2;
constexpr int RESULT_STRIDE = COLUMNS + 4;          // fp32 的结果
constexpr int COPIES = ROWS * DEPTH / 8 / THREADS;  // 每线程每级拷几段（16 字节）
static_assert(ROWS == COLUMNS, "两边的拷贝同样划分");
static_assert(DEPTH * WIDE_STRIDE <= B_ELEMS, "[k][列] 的块放不下");
static_assert(ROWS * RESULT_STRIDE * 4 <= PIPELINE, "结果放不下");

using Sums = float[TILE / 16][TILE / 8][4];

// 一级里本线程拷的第 i 段：[行][k] 的块是第 row 行第 at 个 k 起，[k][列] 的块是第 row 个 k 第 at 列起。
struct Chunk {
  int row, at;
};

__device__ __forceinline__ Chunk row_chunk(int i) {
  int chunk = static_cast<int>(threadIdx.x) + i * THREADS;
  return {chunk / (DEPTH / 8), chunk % (DEPTH / 8) * 8};
}

__device__ __forceinline__ Chunk wide_chunk(int i) {
  int chunk = static_cast<int>(threadIdx.x) + i * THREADS;
  return {chunk / (COLUMNS / 8), chunk % (COLUMNS / 8) * 8};
}

__device__ __forceinline__ uint16_t *a_tile(uint16_t *shared, int stage) {
  return shared + stage * (A_ELEMS + B_ELEMS);
}

__device__ __forceinline__ uint16_t *b_tile(uint16_t *shared, int stage) {
  return a_tile(shared, stage) + A_ELEMS;
}

// sum += 一级的 a b。
template <class E, bool A_WIDE, bool B_WIDE>
__device__ __forceinline__ void multiply(Sums &sum, const uint16_t *a, const uint16_t *b) {
  int warp = static_cast<int>(threadIdx.x) / WARP;
  int row = warp / 2 * TILE, column = warp % 2 * TILE;
#pragma unroll
  for (int k = 0; k < DEPTH; k += 16) {
    uint32_t left[TILE / 16][4];
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) {
      if (A_WIDE)
        load_a_trans(left[i], a, WIDE_STRIDE, row + i * 16, k);
      else
        load_a(left[i], a, STRIDE, row + i * 16, k);
    }
#pragma unroll
    for (int j = 0; j < TILE / 16; j++) {
      uint32_t right[4];
      if (B_WIDE)
        load_b_trans(right, b, WIDE_STRIDE, k, column + j * 16);
      else
        load_b_16x16(right, b, STRIDE, column + j * 16, k);
#pragma unroll
      for (int i = 0; i < TILE / 16; i++) {
        E::mma(sum[i][2 * j], left[i], right[0], right[1]);
        E::mma(sum[i][2 * j + 1], left[i], right[2], right[3]);
      }
    }
  }
}

// fp32 的结果先放进共享内存（流水的缓冲），再逐行成段写。
__device__ __forceinline__ float *result_row(uint16_t *shared, int row) {
  return reinterpret_cast<float *>(shared) + row * RESULT_STRIDE;
}

__device__ __forceinline__ void stage_result(const Sums &sum, uint16_t *shared) {
  int warp = static_cast<int>(threadIdx.x) / WARP;
  int row = warp / 2 * TILE + fragment_row(), column = warp % 2 * TILE + fragment_column();
  __syncthreads();  // 流水的缓冲都读完了
#pragma unroll
  for (int i = 0; i < TILE / 16; i++)
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int j = 0; j < TILE / 8; j++) {
        float *to = result_row(shared, row + i * 16 + half * 8) + column + j * 8;
        to[0] = sum[i][j][2 * half], to[1] = sum[i][j][2 * half + 1];
      }
  __syncthreads();
}

}  // namespace dso::gemm
