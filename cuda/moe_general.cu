// moe_experts 的通用路径：fp32 计算，任何类型、维度、布局与量化格式；一块 64 行、64 列。
#include "moe_act.cuh"
#include "moe_experts.cuh"
#include "moe_general.cuh"

namespace {

using namespace dso;
using namespace dso::general;

struct Tile {
  const dso_cuda_moe_experts_params &p;
  dso_cuda_moe_tile tile;
  bool hidden;
  dso_expert expert;
  int column, columns, depth;  // 第一列、专家的列数、K
  Block a, b, c;

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
    load_block(a, k0, depth, true,
               [&](int row, int k) { return row < tile.rows ? left(row, k) : 0.0f; });
  }

  __device__ void load_right(Block to, const Weight &w, int k0) {
    load_block(to, k0, depth, !w.transposed,
               [&](int n, int k) { return column + n < columns ? w.at(column + n, k) : 0.0f; });
  }

  // 留给反向。
  __device__ void save(int64_t row, int n, float gate, float up) const {
    SavedRow to = saved_row(p, row);
    store_one(p.saved, p.x.dtype, to.at + n, kept_value(p.act, false, p.x.dtype, gate));
    if (p.w.gated)
      store_one(p.saved, p.x.dtype, to.at + to.up + n, kept_value(p.act, true, p.x.dtype, up));
  }

  __device__ void store(const Sums &g, const Sums &u) const {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int row = row_at(i), n = column + column_at(j);
        if (row >= tile.rows || n >= columns) continue;
        int64_t at = tile.row + row;
        if (hidden) {
          int64_t bias = n * expert.bias_step;
          float gate = g[i][j] + bias_at(expert.gate_bias, expert.bias_dtype, bias),
                up = u[i][j] + bias_at(expert.up_bias, expert.bias_dtype, bias);
          if (p.saved) save(at, n, gate, up);
          static_cast<float *>(p.h)[hidden_at(p, at) + n] =
              activate<false>(p.act, p.w.gated, gate, up);
        } else {
          static_cast<float *>(p.o)[at * p.n + n] =
              g[i][j] + bias_at(expert.down_bias, expert.bias_dtype, n);
        }
      }
  }

  __device__ void run() {
    Sums g = {}, u = {};
    Weight first = weight(false), second = weight(true);
    for (int k0 = 0; k0 < depth; k0 += DEPTH) {
      load_left(k0);
      load_right(b, first, k0);
      if (gated()) load_right(c, second, k0);
      __syncthreads();
      multiply(a, b, g);
      if (gated()) multiply(a, c, u);
      __syncthreads();
    }
    store(g, u);
  }
};

__global__ __launch_bounds__(THREADS, 2) void moe_general_kernel(dso_cuda_moe_experts_params p,
                                                                 bool hidden) {
  __shared__ float a[DEPTH][STRIDE], b[DEPTH][STRIDE], c[DEPTH][STRIDE];
  grid_wait();
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
