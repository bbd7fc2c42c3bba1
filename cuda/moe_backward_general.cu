// moe_experts_backward 的通用路径：fp32 计算，任何类型、维度、布局；步骤见 moe_backward.cuh，块的划分见
// moe_general.cuh。
#include "moe_act.cuh"
#include "moe_backward.cuh"
#include "moe_general.cuh"

namespace {

using namespace dso;
using namespace dso::general;

// 专家 e 的三个矩阵：权重或它的梯度。
struct Matrices {
  dso_expert expert;
  Weight gate, up, down;

  __device__ Matrices(const dso_cuda_moe_weights &w, int64_t experts, int64_t e)
      : expert(expert_at(w, experts, e)) {
    bool transposed = w.transposed && e < experts;
    int step = w.paired && e < experts ? 2 : 1;
    gate = {expert.gate, expert.gate_quant, transposed, step};
    up = {expert.up, expert.up_quant, transposed, step};
    down = {expert.down, expert.down_quant, transposed, 1};
  }
};

__device__ float gathered(const dso_cuda_moe_routing &r, const dso_mat &m, int64_t row, int c) {
  return load_one(m.data, m.dtype, r.token[row] * m.rs + c);
}

// gu 的第 c 个：先是 gate 的全部，再是 up 的。
__device__ float *gate_up(const BackwardParams &p, int64_t row, int c, int inner) {
  GradientRow g = gradient_row(p, row);
  return static_cast<float *>(p.gu) + g.at + (c < inner ? c : g.up + c - inner);
}

template <class Left, class Right>
__device__ void product(Block a, Block b, int depth, bool left_k_first, bool right_k_first,
                        Sums &sum, Left left, Right right) {
  for (int k0 = 0; k0 < depth; k0 += DEPTH) {
    load_block(a, k0, depth, left_k_first, left);
    load_block(b, k0, depth, right_k_first, right);
    __syncthreads();
    multiply(a, b, sum);
    __syncthreads();
  }
}

// ---- 按行的三步 ----

struct RowTile {
  const BackwardParams &p;
  const dso_cuda_moe_experts_params &in;
  dso_cuda_moe_tile tile;
  BackwardStep step;
  Matrices w;
  int inner, both, first, columns, depth;
  Block a, b;

  __device__ RowTile(const BackwardParams &params, const dso_cuda_moe_tile &at, BackwardStep s,
                     int column, Block left, Block right)
      : p(params),
        in(params.in),
        tile(at),
        step(s),
        w(params.in.w, params.in.routing.experts, at.expert),
        first(column),
        a(left),
        b(right) {
    inner = static_cast<int>(w.expert.inner), both = in.w.gated ? 2 * inner : inner;
    columns = step == GATE_UP ? both : step == HIDDEN_GRAD ? inner : static_cast<int>(in.k);
    depth = static_cast<int>(step == GATE_UP ? in.k : step == HIDDEN_GRAD ? in.n : both);
  }

  __device__ float left(int row, int k) const {
    if (row >= tile.rows) return 0.0f;
    int64_t at = tile.row + row;
    if (step == GATE_UP) return gathered(in.routing, in.x, at, k);
    if (step == HIDDEN_GRAD) return gathered(in.routing, p.dy, at, k);
    return *gate_up(p, at, k, inner);
  }

  __device__ float right(int n, int k) const {
    int c = first + n;
    if (c >= columns) return 0.0f;
    if (step == HIDDEN_GRAD) return w.down.at(k, c);
    int i = step == GATE_UP ? c : k, other = step == GATE_UP ? k : c;
    return i < inner ? w.gate.at(i, other) : w.up.at(i - inner, other);
  }

  __device__ void store_gate_up(int row, int c, float x) const {
    const dso_expert &e = w.expert;
    bool up = c >= inner;
    int64_t bias = (up ? c - inner : c) * e.bias_step;
    *gate_up(p, tile.row + row, c, inner) =
        x + bias_at(up ? e.up_bias : e.gate_bias, e.bias_dtype, bias);
  }

  __device__ float store_hidden(int row, int c, float x) const {
    int64_t at = tile.row + row;
    float *gate = gate_up(p, at, c, inner), *up = gate_up(p, at, inner + c, inner);
    float weight = row_weight(in, at), g, u = 1.0f;
    if (in.saved) {
      SavedRow from = saved_row(in, at);
      g = load_one(in.saved, in.x.dtype, from.at + c);
      if (in.w.gated) u = load_one(in.saved, in.x.dtype, from.at + from.up + c);
    } else {
      g = *gate;
      if (in.w.gated) u = *up;
    }
    Activated d = activate_backward<false>(in.act, in.w.gated, g, u, weight * x);
    *gate = d.gate;
    if (in.w.gated) *up = d.up;
    static_cast<float *>(in.h)[hidden_at(in, at) + c] = weight * d.h;
    return x * d.h;
  }

  __device__ void store(const Sums &sum) const {
    int64_t blocks = ceil_of(hidden_columns(in), COLUMNS);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int row = row_at(i);
      float dot = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int c = first + column_at(j);
        if (row >= tile.rows || c >= columns) continue;
        if (step == GATE_UP)
          store_gate_up(row, c, sum[i][j]);
        else if (step == HIDDEN_GRAD)
          dot += store_hidden(row, c, sum[i][j]);
        else
          static_cast<float *>(in.o)[(tile.row + row) * in.k + c] = sum[i][j];
      }
      if (step != HIDDEN_GRAD) continue;
      // 一行是相邻的 16 个线程
#pragma unroll
      for (int other = SIDE / 2; other > 0; other /= 2)
        dot += __shfl_xor_sync(ALL_LANES, dot, other);
      if (row < tile.rows && column_at(0) == 0)
        p.partial[(tile.row + row) * blocks + first / COLUMNS] = dot;
    }
  }

  __device__ void run() {
    Sums sum = {};
    bool k_first = (step == GATE_UP) != w.gate.transposed;
    product(
        a, b, depth, true, k_first, sum, [&](int row, int k) { return left(row, k); },
        [&](int n, int k) { return right(n, k); });
    store(sum);
  }
};

__global__ __launch_bounds__(THREADS, 2) void moe_rows_general(BackwardParams p,
                                                               BackwardStep step) {
  __shared__ float a[DEPTH][STRIDE], b[DEPTH][STRIDE];
  grid_wait();
  dso_cuda_moe_tile at = p.in.routing.tiles[blockIdx.x];
  if (at.rows == 0) return;
  RowTile tile(p, at, step, static_cast<int>(blockIdx.y) * COLUMNS, a, b);
  if (tile.first < tile.columns) tile.run();
}

// ---- 权重的梯度：[gate、up 的全部, k] 或 [n, inner] ----

struct WeightTile {
  const BackwardParams &p;
  const dso_cuda_moe_experts_params &in;
  WeightStep step;
  bool add;
  ExpertRows rows;
  Matrices to;
  int inner, first_row, first_column, height, width;
  Block a, b;

  __device__ WeightTile(const BackwardParams &params, WeightStep s, int64_t e, int row, int column,
                        Block left, Block right)
      : p(params),
        in(params.in),
        step(s),
        add(adds(params, e)),
        rows(rows_of(params.in.routing, e)),
        to(params.grad, params.in.routing.experts, e),
        first_row(row),
        first_column(column),
        a(left),
        b(right) {
    inner = static_cast<int>(expert_at(in.w, in.routing.experts, e).inner);
    height = step == DOWN_WEIGHT ? static_cast<int>(in.n) : in.w.gated ? 2 * inner : inner;
    width = step == DOWN_WEIGHT ? inner : static_cast<int>(in.k);
  }

  __device__ bool wanted() const {
    return (step == DOWN_WEIGHT ? to.down.mat.data : to.gate.mat.data) && first_row < height &&
           first_column < width && !(add && rows.rows == 0);
  }

  __device__ float left(int m, int k) const {
    int64_t at = rows.begin + k;
    m += first_row;
    if (m >= height) return 0.0f;
    return step == DOWN_WEIGHT ? gathered(in.routing, p.dy, at, m) : *gate_up(p, at, m, inner);
  }

  __device__ float right(int n, int k) const {
    int64_t at = rows.begin + k;
    n += first_column;
    if (n >= width) return 0.0f;
    if (step == GATE_UP_WEIGHT) return gathered(in.routing, in.x, at, n);
    return static_cast<const float *>(in.h)[hidden_at(in, at) + n];
  }

  __device__ void store(int m, int n, float x) const {
    // 逐个字段按值选：取地址会把整个对象放进局部内存。
    bool down = step == DOWN_WEIGHT, up = !down && m >= inner;
    const void *data = down ? to.down.mat.data : up ? to.up.mat.data : to.gate.mat.data;
    int64_t rs = down ? to.down.mat.rs : up ? to.up.mat.rs : to.gate.mat.rs;
    int columns_step = down ? 1 : to.gate.step;
    if (up) m -= inner;
    int64_t at = to.gate.transposed ? n * rs + m * columns_step : m * rs + n;
    dso_dtype dtype = to.gate.mat.dtype;  // 三个相同
    if (add) x += load_one(data, dtype, at);
    store_one(const_cast<void *>(data), dtype, at, x);
  }

  __device__ void run() {
    Sums sum = {};
    product(
        a, b, rows.rows, false, false, sum, [&](int m, int k) { return left(m, k); },
        [&](int n, int k) { return right(n, k); });
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int m = first_row + row_at(i), n = first_column + column_at(j);
        if (m < height && n < width) store(m, n, sum[i][j]);
      }
  }
};

__global__ __launch_bounds__(THREADS, 2) void moe_weights_general(BackwardParams p, WeightStep step,
                                                                  int row_blocks,
                                                                  int column_blocks) {
  __shared__ float a[DEPTH][STRIDE], b[DEPTH][STRIDE];
  grid_wait();
  int each = row_blocks * column_blocks, at = static_cast<int>(blockIdx.x) % each;
  WeightTile tile(p, step, blockIdx.x / each, at % row_blocks * ROWS, at / row_blocks * COLUMNS, a,
                  b);
  if (tile.wanted()) tile.run();
}

}  // namespace

cudaError_t dso::moe_backward_rows_general(const BackwardParams &p, BackwardStep step,
                                           cudaStream_t stream) {
  dim3 grid(static_cast<unsigned>(p.in.routing.most_tiles),
            static_cast<unsigned>(ceil_div(row_step_columns(p.in, step), COLUMNS)));
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  return launch(moe_rows_general, grid, dim3(THREADS), 0, stream, p, step);
}

cudaError_t dso::moe_backward_weights_general(const BackwardParams &p, WeightStep step,
                                              cudaStream_t stream) {
  const dso_cuda_moe_experts_params &in = p.in;
  int64_t height = step == GATE_UP_WEIGHT ? gate_up_columns(in) : in.n,
          width = step == GATE_UP_WEIGHT ? in.k : hidden_columns(in);
  int64_t rows = ceil_div(height, ROWS), columns = ceil_div(width, COLUMNS);
  dim3 grid(static_cast<unsigned>(experts_of(in.routing) * rows * columns));
  if (grid.x == 0) return cudaSuccess;
  return launch(moe_weights_general, grid, dim3(THREADS), 0, stream, p, step,
                static_cast<int>(rows), static_cast<int>(columns));
}
