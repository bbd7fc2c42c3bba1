// 通用路径共用（前向 moe_general.cu、反向 moe_backward_general.cu）：fp32 计算的 64 x 64 的块，任何类型、布局。
#pragma once

#include "config.cuh"
#include "moe_common.cuh"

namespace dso::general {

constexpr int ROWS = MOE_GENERAL_ROWS, COLUMNS = 64, DEPTH = MOE_GENERAL_DEPTH;
constexpr int THREADS = 256, SIDE = 16;  // 16 x 16 个线程各 4 行 4 列
constexpr int STRIDE = ROWS + 1;
static_assert(ROWS == COLUMNS, "两边的读入同样划分");

// 一级的一边：[k][行或列]。
using Block = float (*)[STRIDE];
using Sums = float[4][4];

// 一个专家的一个权重矩阵，看成 [列][k]。
struct Weight {
  dso_mat mat;
  dso_quant quant;
  bool transposed;
  int step;  // 列的间隔，paired 时是 2

  __device__ int64_t offset(int64_t n, int64_t k) const {
    return transposed ? k * mat.rs + n * step : n * mat.rs + k;
  }
  __device__ float at(int64_t n, int64_t k) const {
    if (is_quantized(mat.dtype)) return quantized_at(mat, quant, n, k);
    return load_one(mat.data, mat.dtype, offset(n, k));
  }
};

// 第 k0 个 k 起的一级；value(行或列, k)，越界的由它给 0。k_first：相邻的线程读相邻的 k，否则相邻的行或列。
template <class Value>
__device__ void load_block(Block to, int k0, int depth, bool k_first, Value value) {
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * DEPTH; i += THREADS) {
    int n = k_first ? i / DEPTH : i % ROWS, k = k_first ? i % DEPTH : i / ROWS;
    to[k][n] = k0 + k < depth ? value(n, k0 + k) : 0.0f;
  }
}

// 本线程的第 i 行、第 j 列在块里的位置。
__device__ inline int row_at(int i) { return static_cast<int>(threadIdx.x) / SIDE + i * SIDE; }
__device__ inline int column_at(int j) { return static_cast<int>(threadIdx.x) % SIDE + j * SIDE; }

// 各级另起一个部分和：误差不随 K 增长。
__device__ inline void multiply(const float (*left)[STRIDE], const float (*right)[STRIDE],
                                Sums &sum) {
  Sums part = {};
#pragma unroll 4
  for (int k = 0; k < DEPTH; k++) {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) part[i][j] += left[k][row_at(i)] * right[k][column_at(j)];
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) sum[i][j] += part[i][j];
}

}  // namespace dso::general
