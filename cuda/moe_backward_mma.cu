// moe_experts_backward 的 sm_80 路径：两个分组的矩阵乘，块的划分见 moe_gemm.cuh。
//
// RowGemm：一块是一个专家的 128 行，右边是它的权重（[列][k] 或 [k][列]），三步见 moe_backward.cuh；WeightGemm：一块是一个
// 专家的权重梯度的 128 x 128，k 是它的全部行（没有行得 0），两边都按 [k][列] 读，其中一边由 token 收集。都没有原子
// 操作：各元素的累加次序只由排序决定。
#include "moe_act.cuh"
#include "moe_backward.cuh"
#include "moe_gemm.cuh"

namespace {

using namespace dso;
using namespace dso::gemm;

__device__ __forceinline__ const uint16_t *elements(const void *p) {
  return static_cast<const uint16_t *>(p);
}

__device__ __forceinline__ uint16_t *writable(const void *p) {
  return const_cast<uint16_t *>(elements(p));
}

// ---- 按行的三步 ----

template <class E, bool WIDE>
struct RowGemm {
  const BackwardParams &p;
  const dso_cuda_moe_experts_params &in;
  dso_cuda_moe_tile tile;
  BackwardStep step;
  dso_expert expert;
  bool paired;
  int inner, first, block, columns;  // 这一块的第一列、第几块列、专家的列数
  int depth, segments;               // k 分几段：dg、du 各一段
  uint16_t *shared;

  const uint16_t *a_row[COPIES], *b_row[COPIES];  // 各段在 k = 0 的地址；越界的为空
  int64_t a_next, b_next;                         // 下一段在哪里
  Sums acc = {};

  __device__ __forceinline__ RowGemm(const BackwardParams &params, const dso_cuda_moe_tile &at,
                                     BackwardStep s, int b)
      : p(params),
        in(params.in),
        tile(at),
        step(s),
        expert(expert_at(params.in.w, params.in.routing.experts, at.expert)),
        block(b),
        shared(reinterpret_cast<uint16_t *>(dynamic_shared())) {
    paired = in.w.paired && at.expert < in.routing.experts;
    inner = static_cast<int>(expert.inner), first = block * COLUMNS;
    int both = in.w.gated ? 2 * inner : inner;
    columns = step == GATE_UP ? both : step == HIDDEN_GRAD ? inner : static_cast<int>(in.k);
    bool apart = step == INPUT_GRAD && in.w.gated && !paired;
    segments = apart ? 2 : 1;
    depth = static_cast<int>(step == GATE_UP ? in.k : step == HIDDEN_GRAD ? in.n : both / segments);
  }

  __device__ __forceinline__ const uint16_t *left_row(int row) const {
    int64_t at = tile.row + row;
    if (step == GATE_UP) return elements(in.x.data) + in.routing.token[at] * in.x.rs;
    if (step == HIDDEN_GRAD) return elements(p.dy.data) + in.routing.token[at] * p.dy.rs;
    return elements(p.gu) + gradient_row(p, at).at;
  }

  // WIDE 时第 c 列的地址（k = 0），否则第 c 列那一行的；GATE_UP 的列是 gate 的全部、再 up 的全部。
  __device__ __forceinline__ const uint16_t *right_column(int c) const {
    if (step == HIDDEN_GRAD) return elements(expert.down.data) + (WIDE ? c : c * expert.down.rs);
    bool up = step == GATE_UP && !paired && c >= inner;
    int n = up ? c - inner : c;
    const uint16_t *base = elements(up ? expert.up.data : expert.gate.data);
    return base + (WIDE ? n : n * (up ? expert.up.rs : expert.gate.rs));
  }

  __device__ __forceinline__ int64_t right_stride(bool second) const {
    if (step == HIDDEN_GRAD) return expert.down.rs;
    return second ? expert.up.rs : expert.gate.rs;
  }

  __device__ __forceinline__ void locate() {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      int row = row_chunk(i).row, c = first + row;
      a_row[i] = row < tile.rows ? left_row(row) : nullptr;
      if (!WIDE) b_row[i] = c < columns ? right_column(c) : nullptr;
    }
    int c = first + wide_chunk(0).at;  // 各段是同样的 8 列，k 不同
    if (WIDE) b_row[0] = c < columns ? right_column(c) : nullptr;
    a_next = segments == 2 ? gradient_row(p, tile.row).up : 0;
    b_next = segments == 2 ? elements(expert.up.data) - elements(expert.gate.data) : 0;
  }

  __device__ __forceinline__ void load(int at, int per) {
    int stage = at % STAGES;
    bool second = at >= per;
    int k0 = (second ? at - per : at) * DEPTH;
    if (at < per * segments) {
      int64_t skip_a = second ? a_next : 0, skip_b = second ? b_next : 0, rs = right_stride(second);
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

  // ---- 写出：一个线程一行的 8 列 ----

  __device__ __forceinline__ Vec<8> result(int row, int column) const {
    Vec<8> v;
    const float *from = result_row(shared, row) + column;
#pragma unroll
    for (int j = 0; j < 8; j++) v.v[j] = from[j];
    return v;
  }

  // 第 c 列（8 列在同一边）：加偏置，写进 gu。
  __device__ __forceinline__ void store_gate_up(int row, int column) const {
    int c = first + column;
    bool up = !paired && c >= inner;
    int n = up ? c - inner : c;
    int64_t bias_step = paired ? 1 : expert.bias_step;
    const void *bias = up ? expert.up_bias : expert.gate_bias;
    Vec<8> v = result(row, column);
#pragma unroll
    for (int j = 0; j < 8; j++) v.v[j] += bias_at(bias, expert.bias_dtype, (n + j) * bias_step);
    GradientRow to = gradient_row(p, tile.row + row);
    dso::store<8>(p.gu, E::dtype, to.at + (up ? to.up : 0) + n, v);
  }

  // A 的 8 列：gu 换成梯度，写 w h；返回 <A, h>。
  __device__ __forceinline__ float store_hidden(int row, int column) const {
    int64_t at = tile.row + row;
    int c = first + column;
    GradientRow to = gradient_row(p, at);
    Vec<8> a = result(row, column), h;
    float weight = row_weight(in, at), dot = 0.0f;
    auto one = [&](int j, float &gate, float &up) {
      Activated d = activate_backward<true>(in.act, in.w.gated, gate, up, weight * a.v[j]);
      dot += a.v[j] * d.h;
      h.v[j] = weight * d.h, gate = d.gate, up = d.up;
    };
    if (paired) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int64_t pairs = to.at + 2 * c + 8 * half;
        Vec<8> both = dso::load<8>(p.gu, E::dtype, pairs);
#pragma unroll
        for (int j = 0; j < 4; j++) one(4 * half + j, both.v[2 * j], both.v[2 * j + 1]);
        dso::store<8>(p.gu, E::dtype, pairs, both);
      }
    } else {
      Vec<8> gate = dso::load<8>(p.gu, E::dtype, to.at + c), up = {};
      if (in.w.gated) up = dso::load<8>(p.gu, E::dtype, to.at + to.up + c);
#pragma unroll
      for (int j = 0; j < 8; j++) one(j, gate.v[j], up.v[j]);
      dso::store<8>(p.gu, E::dtype, to.at + c, gate);
      if (in.w.gated) dso::store<8>(p.gu, E::dtype, to.at + to.up + c, up);
    }
    dso::store<8>(in.h, E::dtype, hidden_at(in, at) + c, h);
    return dot;
  }

  __device__ __forceinline__ void store() const {
    constexpr int CHUNKS = COLUMNS / 8;  // 相邻 16 个线程一行，整个 warp 一起走
    int64_t blocks = ceil_of(hidden_columns(in), COLUMNS);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * CHUNKS; i += THREADS) {
      int row = i / CHUNKS, column = i % CHUNKS * 8;
      bool inside = row < tile.rows && first + column < columns;
      float dot = 0.0f;
      if (inside && step == GATE_UP) store_gate_up(row, column);
      if (inside && step == HIDDEN_GRAD) dot = store_hidden(row, column);
      if (inside && step == INPUT_GRAD)
        dso::store<8>(in.o, E::dtype, (tile.row + row) * in.k + first + column,
                      result(row, column));
      if (step != HIDDEN_GRAD) continue;
#pragma unroll
      for (int other = CHUNKS / 2; other > 0; other /= 2)
        dot += __shfl_xor_sync(ALL_LANES, dot, other);
      if (inside && column == 0) p.partial[(tile.row + row) * blocks + block] = dot;
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
    store();
  }
};

// 块的次序同前向：相邻的 MOE_GROUP 块行与全部的列块一起做。
template <class E, bool WIDE>
__global__ __launch_bounds__(THREADS, 2) void moe_backward_rows(BackwardParams p, BackwardStep step,
                                                                int column_blocks) {
  const dso_cuda_moe_routing &r = p.in.routing;
  int64_t each = static_cast<int64_t>(MOE_GROUP) * column_blocks, id = blockIdx.x;
  int64_t group = id / each, inside = id % each, left = r.most_tiles - group * MOE_GROUP;
  int tiles = static_cast<int>(left < MOE_GROUP ? left : MOE_GROUP);
  dso_cuda_moe_tile at = r.tiles[group * MOE_GROUP + inside % tiles];
  if (at.rows == 0) return;
  RowGemm<E, WIDE> gemm(p, at, step, static_cast<int>(inside / tiles));
  if (gemm.first < gemm.columns) gemm.run();
}

// ---- 权重的梯度 ----

// 一边：[专家的行][列]。
struct Side {
  const uint16_t *data;  // 不收集时是专家的第一行
  int64_t rs;
  bool gathered;
  int columns, half, skip;  // 第 half 列起另隔 skip 个元素
};

template <class E>
struct WeightGemm {
  const BackwardParams &p;
  const dso_cuda_moe_experts_params &in;
  WeightStep step;
  bool transposed, paired;
  int inner;
  ExpertRows rows;
  dso_expert grad;
  Side left, right;
  int first_row, first_column;
  uint16_t *shared;

  const uint16_t *a_column, *b_column;  // 本线程拷的 8 列；越界的为空
  int token[COPIES];                    // 下一级各行的词元
  Sums acc = {};

  __device__ __forceinline__ WeightGemm(const BackwardParams &params, WeightStep s, int64_t e)
      : p(params),
        in(params.in),
        step(s),
        rows(rows_of(params.in.routing, e)),
        grad(expert_at(params.grad, params.in.routing.experts, e)),
        shared(reinterpret_cast<uint16_t *>(dynamic_shared())) {
    bool routed = e < in.routing.experts;
    transposed = in.w.transposed && routed, paired = in.w.paired && routed;
    inner = static_cast<int>(expert_at(in.w, in.routing.experts, e).inner);
    GradientRow g = gradient_row(p, rows.begin);
    Side gu = {elements(p.gu) + g.at,          g.stride, false,
               in.w.gated ? 2 * inner : inner, inner,    g.up - inner};
    if (paired) gu.skip = 0;
    Side h = {elements(in.h) + hidden_at(in, rows.begin),
              routed ? in.h_rs : in.w.shared.inner,
              false,
              inner,
              inner,
              0};
    Side x = whole(in.x, in.k), dy = whole(p.dy, in.n);
    left = step == GATE_UP_WEIGHT ? gu : dy, right = step == GATE_UP_WEIGHT ? x : h;
    if (transposed) {
      Side other = left;
      left = right, right = other;
    }
  }

  __device__ static Side whole(const dso_mat &m, int64_t columns) {
    return {elements(m.data), m.rs, true, static_cast<int>(columns), static_cast<int>(columns), 0};
  }

  __device__ __forceinline__ static const uint16_t *column_of(const Side &side, int c) {
    return c < side.columns ? side.data + c + (c >= side.half ? side.skip : 0) : nullptr;
  }

  __device__ __forceinline__ bool wanted() const {
    return (step == DOWN_WEIGHT ? grad.down.data : grad.gate.data) != nullptr;
  }

  // 第 i 段在第几行（专家之内）。
  __device__ __forceinline__ int row_of(int at, int i) const {
    return at * DEPTH + wide_chunk(i).row;
  }

  __device__ __forceinline__ void find_tokens(int at) {
#pragma unroll
    for (int i = 0; i < COPIES; i++)
      token[i] = row_of(at, i) < rows.rows ? in.routing.token[rows.begin + row_of(at, i)] : 0;
  }

  __device__ __forceinline__ void copy(uint16_t *to, const Side &side, const uint16_t *column,
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

  // 第 (m, n) 个在哪里；m、n 所在的 8 个都在 gate 或 up 的同一边。
  __device__ __forceinline__ uint16_t *place(int m, int n) const {
    if (step == DOWN_WEIGHT) return writable(grad.down.data) + m * grad.down.rs + n;
    int at = transposed ? n : m;
    bool up = in.w.gated && !paired && at >= inner;
    if (up && transposed) n -= inner;
    if (up && !transposed) m -= inner;
    const dso_mat &to = up ? grad.up : grad.gate;
    return writable(to.data) + m * to.rs + n;
  }

  __device__ __forceinline__ void store() const {
    constexpr int CHUNKS = COLUMNS / 8;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * CHUNKS; i += THREADS) {
      int m = first_row + i / CHUNKS, n = first_column + i % CHUNKS * 8;
      if (m >= left.columns || n >= right.columns) continue;
      const float *from = result_row(shared, i / CHUNKS) + i % CHUNKS * 8;
      uint16_t *to = place(m, n);
      Vec<8> v = {};
      if (p.add) v = dso::load<8>(to, E::dtype, 0);
#pragma unroll
      for (int j = 0; j < 8; j++) v.v[j] += from[j];
      dso::store<8>(to, E::dtype, 0, v);
    }
  }

  __device__ __forceinline__ void run() {
    int blocks = (rows.rows + DEPTH - 1) / DEPTH, c = wide_chunk(0).at;
    a_column = column_of(left, first_row + c), b_column = column_of(right, first_column + c);
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
    store();
  }
};

// 一个专家的各块相邻：它的行放得进 L2。
template <class E>
__global__ __launch_bounds__(THREADS, 2) void moe_backward_weights(BackwardParams p,
                                                                   WeightStep step, int row_blocks,
                                                                   int column_blocks) {
  int each = row_blocks * column_blocks, at = static_cast<int>(blockIdx.x) % each;
  WeightGemm<E> gemm(p, step, blockIdx.x / each);
  gemm.first_row = at % row_blocks * ROWS, gemm.first_column = at / row_blocks * COLUMNS;
  if (!gemm.wanted() || gemm.first_row >= gemm.left.columns ||
      gemm.first_column >= gemm.right.columns || (p.add && gemm.rows.rows == 0))
    return;
  gemm.run();
}

// ---- 主机侧 ----

struct Call {
  const BackwardParams &p;
  BackwardStep step;
  cudaStream_t stream;
};

template <class E, bool WIDE>
cudaError_t run(const Call &c) {
  const dso_cuda_moe_experts_params &in = c.p.in;
  int64_t columns = c.step == GATE_UP       ? gate_up_columns(in)
                    : c.step == HIDDEN_GRAD ? hidden_columns(in)
                                            : in.k;
  int64_t blocks = ceil_div(columns, COLUMNS);
  dim3 grid(static_cast<unsigned>(in.routing.most_tiles * blocks));
  if (grid.x == 0) return cudaSuccess;
  return launch(moe_backward_rows<E, WIDE>, grid, dim3(THREADS), PIPELINE, c.stream, c.p, c.step,
                static_cast<int>(blocks));
}

// nn.Linear 的权重：x [gate, up] 时是 [列][k]，另两步反过来。
cudaError_t choose(const Call &c, bool transposed) {
  bool wide = (c.step == GATE_UP) == transposed;
  if (c.p.in.dtype == DSO_BF16) return wide ? run<Bf16, true>(c) : run<Bf16, false>(c);
  return wide ? run<F16, true>(c) : run<F16, false>(c);
}

}  // namespace

cudaError_t dso::moe_backward_rows_mma(const BackwardParams &p, BackwardStep step,
                                       cudaStream_t stream) {
  return choose({p, step, stream}, p.in.w.transposed);  // 转置的没有共享专家
}

cudaError_t dso::moe_backward_weights_mma(const BackwardParams &p, WeightStep step,
                                          cudaStream_t stream) {
  const dso_cuda_moe_experts_params &in = p.in;
  int64_t wide = step == GATE_UP_WEIGHT ? gate_up_columns(in) : in.n,
          other = step == GATE_UP_WEIGHT ? in.k : hidden_columns(in);
  int64_t rows = ceil_div(in.w.transposed ? other : wide, ROWS),
          columns = ceil_div(in.w.transposed ? wide : other, COLUMNS);
  dim3 grid(static_cast<unsigned>(experts_of(in.routing) * rows * columns));
  if (grid.x == 0) return cudaSuccess;
  auto kernel = in.dtype == DSO_BF16 ? moe_backward_weights<Bf16> : moe_backward_weights<F16>;
  return launch(kernel, grid, dim3(THREADS), PIPELINE, stream, p, step, static_cast<int>(rows),
                static_cast<int>(columns));
}
