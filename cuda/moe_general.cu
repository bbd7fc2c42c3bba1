// moe_experts 的通用路径：fp32 计算，任何类型、维度、布局与量化格式；一块 64 行、64 列。
#include "config.cuh"
#include "moe_act.cuh"
#include "moe_experts.cuh"

namespace {

using namespace dso;

constexpr int ROWS = MOE_GENERAL_ROWS, COLUMNS = 64, DEPTH = MOE_GENERAL_DEPTH;
constexpr int THREADS = 256, SIDE = 16;  // 16 x 16 个线程各 4 行 4 列
constexpr int STRIDE = ROWS + 1;

// 一个专家的一个权重矩阵，看成 [列][k]。
struct Weight {
  dso_mat mat;
  dso_quant quant;
  bool transposed;
  int step;  // 列的间隔，paired 时是 2

  __device__ float at(int64_t n, int64_t k) const {
    if (is_quantized(mat.dtype)) return quantized_at(mat, quant, n, k);
    return load_one(mat.data, mat.dtype, transposed ? k * mat.rs + n * step : n * mat.rs + k);
  }
};

struct Tile {
  const dso_cuda_moe_experts_params &p;
  dso_cuda_moe_tile tile;
  bool hidden;
  dso_expert expert;
  int column, columns, depth;  // 第一列、专家的列数、K
  float (*a)[STRIDE], (*b)[STRIDE], (*c)[STRIDE];

  __device__ Weight weight(bool up) const {
    bool shared = tile.expert >= p.routing.experts, transposed = p.w.transposed && !shared;
    if (!hidden) return {expert.down, expert.down_quant, transposed, 1};
    int step = p.w.paired && !shared ? 2 : 1;
    if (up) return {expert.up, expert.up_quant, transposed, step};
    return {expert.gate, expert.gate_quant, transposed, step};
  }

  __device__ bool gated() const { return hidden && p.w.gated; }

  __device__ float left(int row, int k) const {
    int64_t at = tile.row + row;
    if (hidden) return load_one(p.x.data, p.x.dtype, p.routing.token[at] * p.x.rs + k);
    return static_cast<const float *>(p.h)[hidden_at(p, at) + k];
  }

  __device__ void load_left(int k0) {
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * DEPTH; i += THREADS) {
      int row = i / DEPTH, k = i % DEPTH;
      a[k][row] = row < tile.rows && k0 + k < depth ? left(row, k0 + k) : 0.0f;
    }
  }

  // 相邻线程读相邻的地址。
  __device__ void load_right(float (*to)[STRIDE], const Weight &w, int k0) {
    for (int i = static_cast<int>(threadIdx.x); i < COLUMNS * DEPTH; i += THREADS) {
      int n = w.transposed ? i % COLUMNS : i / DEPTH, k = w.transposed ? i / COLUMNS : i % DEPTH;
      bool inside = column + n < columns && k0 + k < depth;
      to[k][n] = inside ? w.at(column + n, k0 + k) : 0.0f;
    }
  }

  __device__ void multiply(const float (*right)[STRIDE], float (&sum)[4][4]) const {
    int row = static_cast<int>(threadIdx.x) / SIDE, n = static_cast<int>(threadIdx.x) % SIDE;
    float part[4][4] = {};
#pragma unroll 4
    for (int k = 0; k < DEPTH; k++) {
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) part[i][j] += a[k][row + i * SIDE] * right[k][n + j * SIDE];
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) sum[i][j] += part[i][j];
  }

  __device__ void store(const float (&g)[4][4], const float (&u)[4][4]) const {
    int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int row = thread / SIDE + i * SIDE, n = column + thread % SIDE + j * SIDE;
        if (row >= tile.rows || n >= columns) continue;
        int64_t at = tile.row + row;
        if (hidden) {
          int64_t bias = n * expert.bias_step;
          float gate = g[i][j] + bias_at(expert.gate_bias, expert.bias_dtype, bias),
                up = u[i][j] + bias_at(expert.up_bias, expert.bias_dtype, bias);
          static_cast<float *>(p.h)[hidden_at(p, at) + n] =
              activate<false>(p.act, p.w.gated, gate, up);
        } else {
          static_cast<float *>(p.o)[at * p.n + n] =
              g[i][j] + bias_at(expert.down_bias, expert.bias_dtype, n);
        }
      }
  }

  __device__ void run() {
    float g[4][4] = {}, u[4][4] = {};
    Weight first = weight(false), second = weight(true);
    for (int k0 = 0; k0 < depth; k0 += DEPTH) {
      load_left(k0);
      load_right(b, first, k0);
      if (gated()) load_right(c, second, k0);
      __syncthreads();
      multiply(b, g);
      if (gated()) multiply(c, u);
      __syncthreads();
    }
    store(g, u);
  }
};

__global__ __launch_bounds__(THREADS, 2) void moe_general_kernel(dso_cuda_moe_experts_params p,
                                                                 bool hidden) {
  __shared__ float a[DEPTH][STRIDE], b[DEPTH][STRIDE], c[DEPTH][STRIDE];
  dso_cuda_moe_tile at = p.routing.tiles[blockIdx.x];
  if (at.rows == 0) return;
  Tile tile{p, at, hidden, expert_at(p.w, p.routing.experts, at.expert), 0, 0, 0, a, b, c};
  tile.column = static_cast<int>(blockIdx.y) * COLUMNS;
  tile.columns = columns_of(p, tile.expert, hidden);
  tile.depth = static_cast<int>(hidden ? p.k : tile.expert.inner);
  if (tile.column < tile.columns) tile.run();
}

}  // namespace

cudaError_t dso::moe_general(const dso_cuda_moe_experts_params &p, bool hidden,
                             cudaStream_t stream) {
  dim3 grid(static_cast<unsigned>(p.routing.most_tiles),
            static_cast<unsigned>(ceil_div(hidden ? hidden_columns(p) : p.n, COLUMNS)));
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  return launch(moe_general_kernel, grid, dim3(THREADS), 0, stream, p, hidden);
}
