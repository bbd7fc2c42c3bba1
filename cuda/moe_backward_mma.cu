// moe_experts_backward 的 sm_80 路径：两个分组的矩阵乘，块的划分见 moe_gemm.cuh，操作数与写出见
// moe_backward_product.cuh。
//
// RowGemm：一块是一个专家的 128 行，右边是它的权重；WeightGemm：一块是一个专家的权重梯度的 128 x 256，k 是它的全部行
// （没有行得 0），两边都按 [k][列] 读，其中一边由 token 收集。没有原子操作：各元素的累加次序只由排序决定。
#include "moe_backward_product.cuh"
#include "moe_gemm.cuh"

namespace {

using namespace dso;
using namespace dso::gemm;

constexpr int CHUNKS = TILE / 8;  // 写出时一个 warp 的一行

// ---- 按行的三步 ----

template <class E, bool WIDE>
struct RowGemm : RowOperands<WIDE> {
  using Operands = RowOperands<WIDE>;
  using Operands::depth, Operands::segments, Operands::columns;
  int first, per;  // 这一块的第一列、一段 k 有几级
  uint16_t *shared;
  Copy<DEPTH> lines;
  Copy<COLUMNS> across;
  uint32_t a_at[COPIES],
      b_at[RIGHT];  // 各段在 k = 0 的位置，以 16 字节计；WIDE 的右边是两段里 k 的间隔
  int a_count, b_count, low_count;  // 前几段在范围之内；右边的前几段在 low，其余在 high
  Sums acc = {};

  __device__ __forceinline__ RowGemm(const BackwardParams &params, const dso_cuda_moe_tile &at,
                                     BackwardStep s, int block)
      : Operands(params, at, s),
        first(block * COLUMNS),
        per((depth + DEPTH - 1) / DEPTH),
        shared(reinterpret_cast<uint16_t *>(dynamic_shared())) {}

  __device__ __forceinline__ void locate() {
    a_count = b_count = low_count = 0;
    if (WIDE) {
      b_at[0] = static_cast<uint32_t>(this->low_rs / CHUNK);
      b_at[1] = static_cast<uint32_t>(this->high_rs / CHUNK);
    }
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      int at = this->left_index(lines.line + i * lines.LINES);
      a_at[i] = 0;
      if (at < 0) continue;
      a_at[i] = static_cast<uint32_t>((at * this->left_rs + lines.at) / CHUNK);
      a_count = i + 1;
    }
#pragma unroll
    for (int i = 0; i < RIGHT; i++) {
      int c = first + (WIDE ? across.at : lines.line + i * lines.LINES);
      bool low = c < this->half;
      if (c < columns) b_count = i + 1;
      if (low) low_count = i + 1;
      int64_t from = low ? c * this->low_rs : (c - this->half) * this->high_rs;
      if (!WIDE) b_at[i] = static_cast<uint32_t>((from + lines.at) / CHUNK);
    }
  }

  __device__ __forceinline__ void load(int at, uint16_t *stage, int part) const {
    if (at >= per * segments) return;
    bool second = at >= per;
    int k0 = (second ? at - per : at) * DEPTH;
    bool inside = k0 + lines.at < depth;
    if (part == 0) {
      const uint16_t *left = this->left_base + (second ? this->left_next : 0) + k0;
#pragma unroll
      for (int i = 0; i < COPIES; i++)
        lines.start(stage, i, chunks_after(left, a_at[i]), i < (inside ? a_count : 0));
    } else if (WIDE) {
      const uint16_t *base = (second ? this->high : this->low) + first;
      uint32_t rs = second ? b_at[1] : b_at[0];
      int k = k0 + across.line, left = b_count ? depth - k : 0;
#pragma unroll
      for (int i = (part - 1) * COPIES; i < part * COPIES; i++)
        across.start(stage + A_ELEMS, i,
                     chunks_after(base, (k + i * across.LINES) * rs + across.at / CHUNK),
                     i * across.LINES < left);
    } else {
#pragma unroll
      for (int i = (part - 1) * COPIES; i < part * COPIES; i++) {
        const uint16_t *base = second || i >= low_count ? this->high : this->low;
        lines.start(stage + A_ELEMS, i, chunks_after(base + k0, b_at[i]),
                    i < (inside ? b_count : 0));
      }
    }
  }
  __device__ __forceinline__ void settle(int, uint16_t *) const {}

  __device__ __forceinline__ bool active(int row_end, int column_end) const {
    return warp_row() < row_end && first + warp_column() < column_end;
  }

  __device__ __forceinline__ void run(int stages) {
    locate();
    accumulate<E, false, WIDE>(*this, acc, shared, per * segments, stages,
                               active(this->rows, columns));
  }

  __device__ __forceinline__ void store(const RowResults<E> &to) const {
    int lane = static_cast<int>(threadIdx.x) % WARP, end = warp_row() + TILE;
    int column = first + warp_column(), c = column + lane % CHUNKS * 8;
    int64_t parts = ceil_of(hidden_columns(to.in), TILE);
    typename RowResults<E>::Kept kept;
    float weight;
    auto fetch = [&](int row) {  // 提前一行读：这时没有别的块盖住延迟
      int inside = row < end ? row : to.tile.rows;
      kept = to.fetch(inside, c), weight = to.weight_of(inside);
    };
    bool some = active(to.tile.rows, to.columns);
    if (some) fetch(warp_row() + lane / CHUNKS);
    for_results(acc, shared, some, CHUNKS, [&](int row, int chunk, const float *from) {
      typename RowResults<E>::Kept now = kept;
      float by = weight;
      fetch(row + WARP / CHUNKS);
      float dot = to.finish(row, c, result(from, chunk * 8), now, by);
      if (to.step != HIDDEN_GRAD) return;
#pragma unroll
      for (int other = CHUNKS / 2; other > 0; other /= 2)
        dot += __shfl_xor_sync(ALL_LANES, dot, other);
      if (chunk == 0 && row < to.tile.rows)
        to.p.partial[(to.tile.row + row) * parts + column / TILE] = dot;
    });
  }
};

// 块的次序同前向：相邻的 MOE_GROUP 块行与全部的列块一起做。
template <class E, bool WIDE>
__global__ __launch_bounds__(THREADS, 1) void moe_backward_rows(BackwardParams p, BackwardStep step,
                                                                int column_blocks, int stages) {
  grid_wait();
  const dso_cuda_moe_routing &r = p.in.routing;
  int64_t each = static_cast<int64_t>(MOE_GROUP) * column_blocks, id = blockIdx.x;
  int64_t group = id / each, inside = id % each, left = r.most_tiles - group * MOE_GROUP;
  int tiles = static_cast<int>(left < MOE_GROUP ? left : MOE_GROUP);
  dso_cuda_moe_tile at = r.tiles[group * MOE_GROUP + inside % tiles];
  if (at.rows == 0) return;
  RowGemm<E, WIDE> gemm(p, at, step, static_cast<int>(inside / tiles));
  if (gemm.first >= gemm.columns) return;
  gemm.run(stages);
  gemm.store(RowResults<E>(p, at, step));
}

// ---- 权重的梯度 ----

template <class E>
struct WeightGemm : WeightProduct<E> {
  using Product = WeightProduct<E>;
  using Product::left, Product::right, Product::rows;
  int first_row = 0, first_column = 0;
  uint16_t *shared;
  Copy<ROWS> left_copy;
  Copy<COLUMNS> right_copy;
  const uint16_t *a_column, *b_column;  // 本线程拷的 8 列；越界的为空
  int token[RIGHT];                     // 收集的一边下一级各行的词元
  Sums acc = {};

  __device__ __forceinline__ WeightGemm(const BackwardParams &params, WeightStep s, int64_t e)
      : Product(params, s, e), shared(reinterpret_cast<uint16_t *>(dynamic_shared())) {}

  // 收集的一边各段的词元。
  __device__ __forceinline__ void find_tokens(int at) {
    int line = left.gathered ? left_copy.line : right_copy.line,
        step = left.gathered ? left_copy.LINES : right_copy.LINES;
#pragma unroll
    for (int i = 0; i < RIGHT; i++) {
      int row = at * DEPTH + line + i * step;
      token[i] = row < rows.rows ? this->in.routing.token[rows.begin + row] : 0;
    }
  }

  // 一边的第 [begin, begin + COPIES) 段。
  template <class Lines>
  __device__ __forceinline__ void copy(uint16_t *to, const Lines &lines, const WeightSide &side,
                                       const uint16_t *column, int at, int begin) const {
    int row = at * DEPTH + lines.line, count = column ? rows.rows - row : 0;
    uint32_t rs = static_cast<uint32_t>(side.rs / CHUNK);
#pragma unroll
    for (int i = begin; i < begin + COPIES; i++) {
      uint32_t from = side.gathered ? token[i] : row + i * lines.LINES;
      lines.start(to, i, chunks_after(column, from * rs), i * lines.LINES < count);
    }
  }

  __device__ __forceinline__ void load(int at, uint16_t *stage, int part) {
    if (at * DEPTH >= rows.rows) return;
    if (part == 0)
      copy(stage, left_copy, left, a_column, at, 0);
    else
      copy(stage + A_ELEMS, right_copy, right, b_column, at, (part - 1) * COPIES);
    if (part == PARTS - 1) find_tokens(at + 1);
  }
  __device__ __forceinline__ void settle(int, uint16_t *) const {}

  __device__ __forceinline__ bool active(const Product &to) const {
    return first_row + warp_row() < to.left.columns &&
           first_column + warp_column() < to.right.columns;
  }

  __device__ __forceinline__ void run(int stages) {
    a_column = left.column(first_row + left_copy.at);
    b_column = right.column(first_column + right_copy.at);
    find_tokens(0);
    accumulate<E, true, true>(*this, acc, shared, (rows.rows + DEPTH - 1) / DEPTH, stages,
                              active(*this));
  }

  // to：另取一份，主循环里不占寄存器。
  __device__ __forceinline__ void store(const Product &to) const {
    int row0 = first_row, column0 = first_column + warp_column();
    for_results(acc, shared, active(to), CHUNKS, [&](int row, int chunk, const float *from) {
      to.finish(row0 + row, column0 + chunk * 8, result(from, chunk * 8));
    });
  }
};

// 一个专家的各块相邻：它的行放得进 L2。
template <class E>
__global__ __launch_bounds__(THREADS, 1) void moe_backward_weights(BackwardParams p,
                                                                   WeightStep step, int row_blocks,
                                                                   int column_blocks, int stages) {
  grid_wait();
  int each = row_blocks * column_blocks, at = static_cast<int>(blockIdx.x) % each;
  WeightGemm<E> gemm(p, step, blockIdx.x / each);
  gemm.first_row = at % row_blocks * ROWS, gemm.first_column = at / row_blocks * COLUMNS;
  if (!gemm.wanted(gemm.first_row, gemm.first_column)) return;
  gemm.run(stages);
  gemm.store(WeightProduct<E>(p, step, blockIdx.x / each));
}

// ---- 主机侧 ----

template <class E, bool WIDE>
cudaError_t run(const BackwardParams &p, BackwardStep step, cudaStream_t stream) {
  int64_t blocks = ceil_div(row_step_columns(p.in, step), COLUMNS);
  dim3 grid(static_cast<unsigned>(p.in.routing.most_tiles * blocks));
  if (grid.x == 0) return cudaSuccess;
  Device device;
  if (cudaError_t error = device_of(&device)) return error;
  int stages = stages_of(device.shared_limit);
  return launch(moe_backward_rows<E, WIDE>, grid, dim3(THREADS), pipeline_bytes(stages), stream, p,
                step, static_cast<int>(blocks), stages);
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
  Device device;
  if (cudaError_t error = device_of(&device)) return error;
  int stages = stages_of(device.shared_limit);
  return launch(kernel, grid, dim3(THREADS), pipeline_bytes(stages), stream, p, step,
                static_cast<int>(rows), static_cast<int>(columns), stages);
}
