// moe_experts_backward 的 sm_80 路径：两个分组的矩阵乘，块的划分见 moe_gemm.cuh，操作数与写出见
// moe_backward_product.cuh。
//
// RowGemm：一块是一个专家的 128 行，右边是它的权重；WeightGemm：一块是一个专家的权重梯度的 128 x 128，k 是它的全部行
// （没有行得 0），两边都按 [k][列] 读，其中一边由 token 收集。没有原子操作：各元素的累加次序只由排序决定。
#include "moe_backward_product.cuh"
#include "moe_gemm.cuh"

namespace {

using namespace dso;
using namespace dso::gemm;

constexpr int CHUNKS = COLUMNS / 8;  // 写出时相邻 16 个线程一行

__device__ __forceinline__ Vec<8> result(uint16_t *shared, int row, int column) {
  Vec<8> v;
  const float *from = result_row(shared, row) + column;
#pragma unroll
  for (int j = 0; j < 8; j++) v.v[j] = from[j];
  return v;
}

// ---- 按行的三步 ----

template <class E, bool WIDE>
struct RowGemm : RowOperands<WIDE> {
  using Operands = RowOperands<WIDE>;
  using Operands::depth, Operands::segments;
  int first, block;  // 这一块的第一列、第几块列
  uint16_t *shared;
  const uint16_t *a_row[COPIES], *b_row[COPIES];  // 各段在 k = 0 的地址；越界的为空
  Sums acc = {};

  __device__ __forceinline__ RowGemm(const BackwardParams &params, const dso_cuda_moe_tile &at,
                                     BackwardStep s, int b)
      : Operands(params, at, s),
        first(b * COLUMNS),
        block(b),
        shared(reinterpret_cast<uint16_t *>(dynamic_shared())) {}

  __device__ __forceinline__ void locate() {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      int row = row_chunk(i).row;
      a_row[i] = this->left(row);
      if (!WIDE) b_row[i] = this->right(first + row);
    }
    if (WIDE) b_row[0] = this->right(first + wide_chunk(0).at);  // 各段是同样的 8 列，k 不同
  }

  __device__ __forceinline__ void load(int at, int per) {
    int stage = at % STAGES;
    bool second = at >= per;
    int k0 = (second ? at - per : at) * DEPTH;
    if (at < per * segments) {
      int64_t skip_a = second ? this->left_next : 0, skip_b = second ? this->high - this->low : 0,
              rs = this->right_stride(second);
#pragma unroll
      for (int i = 0; i < COPIES; i++) {
        Chunk c = row_chunk(i);
        bool inside = a_row[i] && k0 + c.at < depth;
        cp_async_16(a_tile(shared, stage) + c.row * STRIDE + c.at,
                    inside ? a_row[i] + skip_a + k0 + c.at : nullptr, inside);
        if (!WIDE) {
          inside = b_row[i] && k0 + c.at < depth;
          cp_async_16(b_tile(shared, stage) + c.row * STRIDE + c.at,
                      inside ? b_row[i] + skip_b + k0 + c.at : nullptr, inside);
        } else {
          c = wide_chunk(i);
          inside = b_row[0] && k0 + c.row < depth;
          cp_async_16(b_tile(shared, stage) + c.row * WIDE_STRIDE + c.at,
                      inside ? b_row[0] + skip_b + (k0 + c.row) * rs : nullptr, inside);
        }
      }
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void store(const RowResults<E> &to) const {
    int64_t blocks = ceil_of(hidden_columns(to.in), COLUMNS);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * CHUNKS; i += THREADS) {
      int row = i / CHUNKS, column = i % CHUNKS * 8;
      float dot = to.finish(row, first + column, result(shared, row, column),
                            to.fetch(row, first + column), to.weight_of(row));
      if (to.step != HIDDEN_GRAD) continue;
#pragma unroll
      for (int other = CHUNKS / 2; other > 0; other /= 2)
        dot += __shfl_xor_sync(ALL_LANES, dot, other);
      if (column == 0 && row < to.tile.rows)
        to.p.partial[(to.tile.row + row) * blocks + block] = dot;
    }
  }

  __device__ __forceinline__ void run() {
    int per = (depth + DEPTH - 1) / DEPTH, blocks = per * segments;
    locate();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) load(s, per);
    for (int at = 0; at < blocks; at++) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      load(at + STAGES - 1, per);
      multiply<E, false, WIDE>(acc, a_tile(shared, at % STAGES), b_tile(shared, at % STAGES));
    }
    cp_async_wait<0>();
    stage_result(acc, shared);
  }
};

// 块的次序同前向：相邻的 MOE_GROUP 块行与全部的列块一起做。
template <class E, bool WIDE>
__global__ __launch_bounds__(THREADS, 2) void moe_backward_rows(BackwardParams p, BackwardStep step,
                                                                int column_blocks) {
  grid_wait();
  const dso_cuda_moe_routing &r = p.in.routing;
  int64_t each = static_cast<int64_t>(MOE_GROUP) * column_blocks, id = blockIdx.x;
  int64_t group = id / each, inside = id % each, left = r.most_tiles - group * MOE_GROUP;
  int tiles = static_cast<int>(left < MOE_GROUP ? left : MOE_GROUP);
  dso_cuda_moe_tile at = r.tiles[group * MOE_GROUP + inside % tiles];
  if (at.rows == 0) return;
  RowGemm<E, WIDE> gemm(p, at, step, static_cast<int>(inside / tiles));
  if (gemm.first >= gemm.columns) return;
  gemm.run();
  gemm.store(RowResults<E>(p, at, step));
}

// ---- 权重的梯度 ----

template <class E>
struct WeightGemm : WeightProduct<E> {
  using Product = WeightProduct<E>;
  using Product::left, Product::right, Product::rows;
  int first_row = 0, first_column = 0;
  uint16_t *shared;
  const uint16_t *a_column, *b_column;  // 本线程拷的 8 列；越界的为空
  int token[COPIES];                    // 下一级各行的词元
  Sums acc = {};

  __device__ __forceinline__ WeightGemm(const BackwardParams &params, WeightStep s, int64_t e)
      : Product(params, s, e), shared(reinterpret_cast<uint16_t *>(dynamic_shared())) {}

  // 第 i 段在第几行（专家之内）。
  __device__ __forceinline__ int row_of(int at, int i) const {
    return at * DEPTH + wide_chunk(i).row;
  }

  __device__ __forceinline__ void find_tokens(int at) {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      int row = row_of(at, i);
      token[i] = row < rows.rows ? this->in.routing.token[rows.begin + row] : 0;
    }
  }

  __device__ __forceinline__ void copy(uint16_t *to, const WeightSide &side, const uint16_t *column,
                                       int at, int i) const {
    Chunk c = wide_chunk(i);
    int row = row_of(at, i);
    bool inside = column && row < rows.rows;
    cp_async_16(to + c.row * WIDE_STRIDE + c.at,
                inside ? column + (side.gathered ? token[i] : row) * side.rs : nullptr, inside);
  }

  __device__ __forceinline__ void load(int at) {
    if (at * DEPTH < rows.rows) {
#pragma unroll
      for (int i = 0; i < COPIES; i++) {
        copy(a_tile(shared, at % STAGES), left, a_column, at, i);
        copy(b_tile(shared, at % STAGES), right, b_column, at, i);
      }
    }
    cp_async_commit();
  }

  __device__ __forceinline__ void run() {
    int blocks = (rows.rows + DEPTH - 1) / DEPTH, c = wide_chunk(0).at;
    a_column = left.column(first_row + c), b_column = right.column(first_column + c);
    find_tokens(0);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
      load(s);
      find_tokens(s + 1);
    }
    for (int at = 0; at < blocks; at++) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      load(at + STAGES - 1);
      find_tokens(at + STAGES);
      multiply<E, true, true>(acc, a_tile(shared, at % STAGES), b_tile(shared, at % STAGES));
    }
    cp_async_wait<0>();
    stage_result(acc, shared);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * CHUNKS; i += THREADS) {
      int row = i / CHUNKS, column = i % CHUNKS * 8;
      this->finish(first_row + row, first_column + column, result(shared, row, column));
    }
  }
};

// 一个专家的各块相邻：它的行放得进 L2。
template <class E>
__global__ __launch_bounds__(THREADS, 2) void moe_backward_weights(BackwardParams p,
                                                                   WeightStep step, int row_blocks,
                                                                   int column_blocks) {
  grid_wait();
  int each = row_blocks * column_blocks, at = static_cast<int>(blockIdx.x) % each;
  WeightGemm<E> gemm(p, step, blockIdx.x / each);
  gemm.first_row = at % row_blocks * ROWS, gemm.first_column = at / row_blocks * COLUMNS;
  if (gemm.wanted(gemm.first_row, gemm.first_column)) gemm.run();
}

// ---- 主机侧 ----

template <class E, bool WIDE>
cudaError_t run(const BackwardParams &p, BackwardStep step, cudaStream_t stream) {
  int64_t blocks = ceil_div(row_step_columns(p.in, step), COLUMNS);
  dim3 grid(static_cast<unsigned>(p.in.routing.most_tiles * blocks));
  if (grid.x == 0) return cudaSuccess;
  return launch(moe_backward_rows<E, WIDE>, grid, dim3(THREADS), PIPELINE, stream, p, step,
                static_cast<int>(blocks));
}

}  // namespace

cudaError_t dso::moe_backward_rows_mma(const BackwardParams &p, BackwardStep step,
                                       cudaStream_t stream) {
  bool wide = is_wide(p.in, step);
  if (p.in.dtype == DSO_BF16)
    return wide ? run<Bf16, true>(p, step, stream) : run<Bf16, false>(p, step, stream);
  return wide ? run<F16, true>(p, step, stream) : run<F16, false>(p, step, stream);
}

cudaError_t dso::moe_backward_weights_mma(const BackwardParams &p, WeightStep step,
                                          cudaStream_t stream) {
  WeightShape shape = weight_shape(p.in, step);
  int64_t rows = ceil_div(shape.rows, ROWS), columns = ceil_div(shape.columns, COLUMNS);
  dim3 grid(static_cast<unsigned>(experts_of(p.in.routing) * rows * columns));
  if (grid.x == 0) return cudaSuccess;
  auto kernel = p.in.dtype == DSO_BF16 ? moe_backward_weights<Bf16> : moe_backward_weights<F16>;
  return launch(kernel, grid, dim3(THREADS), PIPELINE, stream, p, step, static_cast<int>(rows),
                static_cast<int>(columns));
}
