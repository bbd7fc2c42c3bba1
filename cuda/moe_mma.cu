// moe_experts 的 sm_80 路径：分组的矩阵乘，cp.async 多级流水加 mma；h、o 两步是同一个核。
//
// 块的划分见 moe_gemm.cuh。x 的行由 token 直接收集；有门时 128 列是 64 列 gate 加
// 对应的 64 列 up（每个 warp 32 + 32 列），激活在写出时，没有 gate、up 的中间结果。权重的三种存法只差读入：
// [列][k]（nn.Linear）、[k][列]（转置，交错的成对）、量化的（读进寄存器，反量化后写进共享内存）。
#include "moe_act.cuh"
#include "moe_experts.cuh"
#include "moe_gemm.cuh"

namespace {

using namespace dso;
using namespace dso::gemm;

static_assert(DEPTH == 32, "int4 一行一级正好一段");
static_assert(128 % DEPTH == 0, "fp8 的一级在一组里");

enum Weights { ROW_MAJOR, TRANSPOSED, INT8, INT4, FP8 };

// 一列权重所在的矩阵。
struct Column {
  const void *data;
  int64_t rs;
  const float *scale;
  const uint8_t *zero;
  int64_t groups;
  int group;
};

template <class T>
__device__ __forceinline__ T pick(bool condition, T yes, T no) {
  return condition ? yes : no;
}

template <class E, Weights W>
struct Gemm {
  const dso_cuda_moe_experts_params &p;
  dso_cuda_moe_tile tile;
  bool hidden, paired;  // hidden：算 h；否则算 o
  bool split;           // 一半的列是 gate，一半是 up
  dso_expert expert;
  Column gate, up;            // gate：也是没有门的、算 o 时的那一个
  int first, columns, depth;  // 这一块的第一列、专家的列数、K
  int thread, warp;
  uint16_t *shared;

  const uint16_t *a_row[COPIES];  // 各段在 k = 0 的地址；越界的为空
  const uint16_t *b_row[COPIES];
  uint4 codes[2];  // 量化的：下一级的码（int4 只用一个）
  Sums acc = {};

  // 共享内存里的第 r 列是专家的第几列；有门时还分 gate、up。
  __device__ int column_of(int r) const {
    return split ? first + r / TILE * 32 + r % 32 : first + r;
  }
  __device__ bool is_up(int r) const { return split && r % TILE >= 32; }

  __device__ __forceinline__ Gemm(const dso_cuda_moe_experts_params &params,
                                  const dso_cuda_moe_tile &at, bool h, int block)
      : p(params),
        tile(at),
        hidden(h),
        expert(expert_at(params.w, params.routing.experts, at.expert)),
        thread(static_cast<int>(threadIdx.x)),
        warp(static_cast<int>(threadIdx.x) / WARP),
        shared(reinterpret_cast<uint16_t *>(dynamic_shared())) {
    paired = W == TRANSPOSED && hidden && p.w.paired;
    split = hidden && p.w.gated && !paired;
    first = block * (hidden && p.w.gated ? COLUMNS / 2 : COLUMNS);
    columns = columns_of(p, expert, hidden);
    depth = static_cast<int>(hidden ? p.k : expert.inner);
    gate = hidden ? of(expert.gate, expert.gate_quant) : of(expert.down, expert.down_quant);
    up = of(expert.up, expert.up_quant);
  }

  __device__ static Column of(const dso_mat &mat, const dso_quant &quant) {
    return {mat.data, mat.rs, quant.scale, quant.zero, quant.groups, static_cast<int>(quant.group)};
  }

  // 逐个字段按值选：取地址会把整个对象放进局部内存。
  __device__ __forceinline__ Column column_from(bool second) const {
    Column a = gate, b = up;
    return {pick(second, b.data, a.data),     pick(second, b.rs, a.rs),
            pick(second, b.scale, a.scale),   pick(second, b.zero, a.zero),
            pick(second, b.groups, a.groups), pick(second, b.group, a.group)};
  }

  __device__ __forceinline__ void locate() {
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      int row = (thread + i * THREADS) / (DEPTH / 8);
      int64_t at = tile.row + row;
      a_row[i] = nullptr;
      if (row < tile.rows)
        a_row[i] = hidden ? static_cast<const uint16_t *>(p.x.data) + p.routing.token[at] * p.x.rs
                          : static_cast<const uint16_t *>(p.h) + hidden_at(p, at);
    }
    if (W == ROW_MAJOR) {
#pragma unroll
      for (int i = 0; i < COPIES; i++) {
        int r = (thread + i * THREADS) / (DEPTH / 8), n = column_of(r);
        Column from = column_from(is_up(r));
        b_row[i] = n < columns ? static_cast<const uint16_t *>(from.data) + n * from.rs : nullptr;
      }
    } else if (W == TRANSPOSED) {  // 各段是同样的 8 列，k 不同
      int r = thread % (COLUMNS / 8) * 8, n = paired ? 2 * first + r : column_of(r);
      Column from = column_from(is_up(r));
      bool inside = n < (paired ? 2 * columns : columns);
      b_row[0] = inside ? static_cast<const uint16_t *>(from.data) + n : nullptr;
    }
  }

  __device__ __forceinline__ void load(int block) {
    int stage = block % STAGES, k0 = block * DEPTH;
    if (k0 < depth) {
#pragma unroll
      for (int i = 0; i < COPIES; i++) {
        int chunk = thread + i * THREADS, row = chunk / (DEPTH / 8), k = chunk % (DEPTH / 8) * 8;
        bool inside = a_row[i] && k0 + k < depth;
        cp_async_16(a_tile(shared, stage) + row * STRIDE + k, inside ? a_row[i] + k0 + k : nullptr,
                    inside);
        if (W == ROW_MAJOR) {
          inside = b_row[i] && k0 + k < depth;
          cp_async_16(b_tile(shared, stage) + row * STRIDE + k,
                      inside ? b_row[i] + k0 + k : nullptr, inside);
        } else if (W == TRANSPOSED) {
          int at = chunk / (COLUMNS / 8), r = chunk % (COLUMNS / 8) * 8;
          inside = b_row[0] && k0 + at < depth;
          cp_async_16(b_tile(shared, stage) + at * WIDE_STRIDE + r,
                      inside ? b_row[0] + (k0 + at) * gate.rs : nullptr, inside);
        }
      }
    }
    cp_async_commit();
  }

  // ---- 量化的权重：一个线程一列 ----

  __device__ __forceinline__ void fetch(int block) {
    int k0 = block * DEPTH, n = column_of(thread);
    Column from = column_from(is_up(thread));
    codes[0] = codes[1] = make_uint4(0, 0, 0, 0);
    if (n >= columns || k0 >= depth) return;
    const auto *row = static_cast<const unsigned char *>(from.data) + n * from.rs;
    if (W == INT4) {
      codes[0] = *reinterpret_cast<const uint4 *>(row + k0 / 2);
    } else {
      codes[0] = *reinterpret_cast<const uint4 *>(row + k0);
      if (k0 + 16 < depth) codes[1] = *reinterpret_cast<const uint4 *>(row + k0 + 16);
    }
  }

  // 一个字（4 个码）的第 byte 个：int8 的数值；int4 的低、高 4 位。
  __device__ static float int8_of(uint32_t word, int byte) {
    return static_cast<float>(static_cast<int8_t>(word >> (8 * byte)));
  }

  // codes 的第 i 个字。
  __device__ __forceinline__ uint32_t word_of(int i) const {
    const uint4 c = codes[i / 4];
    return i % 4 == 0 ? c.x : i % 4 == 1 ? c.y : i % 4 == 2 ? c.z : c.w;
  }

  // 第 n 列从 k0 起的一级在哪个尺度；越界的列尺度为 0，码也都是 0。
  __device__ __forceinline__ float scale_of(const Column &from, int n, int k0) const {
    if (n >= columns) return 0.0f;
    return from.scale[n * from.groups + (from.group ? k0 / from.group : 0)];
  }

  __device__ __forceinline__ void put(int block) {
    int k0 = block * DEPTH, n = column_of(thread);
    if (k0 >= depth) return;
    uint16_t *to = b_tile(shared, block % STAGES) + thread * STRIDE;
    uint32_t out[DEPTH / 2];
    if (W == INT8) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        uint32_t word = word_of(i);
        out[2 * i] = E::pack(int8_of(word, 0), int8_of(word, 1));
        out[2 * i + 1] = E::pack(int8_of(word, 2), int8_of(word, 3));
      }
    } else if (W == FP8) {  // 组的尺度在这里乘，不另要累加器
      float scale = scale_of(column_from(is_up(thread)), n, k0);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        float2 low = e4m3_pair(word_of(i)), high = e4m3_pair(word_of(i) >> 16);
        out[2 * i] = E::pack(scale * low.x, scale * low.y);
        out[2 * i + 1] = E::pack(scale * high.x, scale * high.y);
      }
    } else {
      Column from = column_from(is_up(thread));
      float scale = scale_of(from, n, k0), zero = 8.0f;
      if (n < columns && from.zero)
        zero = static_cast<float>(from.zero[n * from.groups + k0 / from.group]);
      uint32_t words[4] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w};
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int high = 0; high < 2; high++) {
          float v[4];
#pragma unroll
          for (int b = 0; b < 4; b++)
            v[b] = scale * (static_cast<float>(words[i] >> (8 * b + 4 * high) & 15) - zero);
          out[high * 8 + 2 * i] = E::pack(v[0], v[1]);
          out[high * 8 + 2 * i + 1] = E::pack(v[2], v[3]);
        }
    }
#pragma unroll
    for (int i = 0; i < DEPTH / 8; i++)
      reinterpret_cast<uint4 *>(to)[i] =
          make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
  }

  // ---- 写出 ----

  // 第 i 列（从 first 起）的 gate（或普通的一列）、up 在共享内存的第几列。
  __device__ int gate_at(int i) const {
    return paired ? 2 * i : split ? i / 32 * TILE + i % 32 : i;
  }
  __device__ int up_at(int i) const { return paired ? 2 * i + 1 : gate_at(i) + 32; }

  __device__ __forceinline__ float value(const float *row, int i) const {
    int n = first + i;
    float x = row[gate_at(i)];
    if (W == INT8) x *= gate.scale[n];
    if (!hidden) return x + bias_at(expert.down_bias, expert.bias_dtype, n);
    x += bias_at(expert.gate_bias, expert.bias_dtype, n * expert.bias_step);
    if (!p.w.gated) return activate<true>(p.act, false, x, 0.0f);
    float u = row[up_at(i)];
    if (W == INT8) u *= up.scale[n];
    return activate<true>(p.act, true, x,
                          u + bias_at(expert.up_bias, expert.bias_dtype, n * expert.bias_step));
  }

  // 第 column 列起的 8 个 gate、up（加了偏置）留给反向。
  __device__ __forceinline__ void save(const float *row, int64_t at, int column) const {
    SavedRow to = saved_row(p, at);
#pragma unroll 1
    for (int up = 0; up <= (p.w.gated ? 1 : 0); up++) {
      const void *bias = up ? expert.up_bias : expert.gate_bias;
      Vec<8> v;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        int i = column + j;
        float x = row[up ? up_at(i) : gate_at(i)] +
                  bias_at(bias, expert.bias_dtype, (first + i) * expert.bias_step);
        v.v[j] = kept_value(p.act, up != 0, E::dtype, x);
      }
      dso::store<8>(p.saved, E::dtype, to.at + up * to.up + first + column, v);
    }
  }

  __device__ __forceinline__ void store() {
    int width = split || paired ? COLUMNS / 2 : COLUMNS, chunks = width / 8;
    stage_result(acc, shared);
#pragma unroll 1
    for (int i = thread; i < tile.rows * chunks; i += THREADS) {
      int row = i / chunks, column = i % chunks * 8;
      if (first + column >= columns) continue;
      uint4 out = make_uint4(0, 0, 0, 0);  // 依次从末尾推进来
#pragma unroll 1
      for (int j = 0; j < 8; j += 2) {
        float x = value(result_row(shared, row), column + j),
              y = value(result_row(shared, row), column + j + 1);
        out = make_uint4(out.y, out.z, out.w, E::pack(x, y));
      }
      int64_t at = tile.row + row;
      if (hidden && p.saved) save(result_row(shared, row), at, column);
      uint16_t *to = hidden ? static_cast<uint16_t *>(p.h) + hidden_at(p, at)
                            : static_cast<uint16_t *>(p.o) + at * p.n;
      *reinterpret_cast<uint4 *>(to + first + column) = out;
    }
  }

  __device__ __forceinline__ void run() {
    constexpr bool QUANTIZED = W == INT8 || W == INT4 || W == FP8;
    int blocks = (depth + DEPTH - 1) / DEPTH;
    locate();
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
      load(s);
      if (QUANTIZED) fetch(s), put(s);
    }
    for (int block = 0; block < blocks; block++) {
      cp_async_wait<STAGES - 2>();
      __syncthreads();
      int next = block + STAGES - 1;
      load(next);
      if (QUANTIZED) fetch(next);
      multiply<E, false, W == TRANSPOSED>(acc, a_tile(shared, block % STAGES),
                                          b_tile(shared, block % STAGES));
      if (QUANTIZED) put(next);
    }
    cp_async_wait<0>();
    store();
  }
};

// 相邻的 MOE_GROUP 块行与全部的列块一起做：权重与 x 都在 L2 里。
template <class E, Weights W>
__global__ __launch_bounds__(THREADS, 2) void moe_mma_kernel(dso_cuda_moe_experts_params p,
                                                             bool hidden, int column_blocks,
                                                             Part part) {
  grid_wait();
  int64_t each = static_cast<int64_t>(MOE_GROUP) * column_blocks, id = blockIdx.x;
  int64_t group = id / each, inside = id % each, left = p.routing.most_tiles - group * MOE_GROUP;
  int tiles = static_cast<int>(left < MOE_GROUP ? left : MOE_GROUP);
  dso_cuda_moe_tile at = p.routing.tiles[group * MOE_GROUP + inside % tiles];
  if (skips(p, at, part)) return;
  Gemm<E, W> gemm(p, at, hidden, static_cast<int>(inside / tiles));
  if (gemm.first < gemm.columns) gemm.run();
}

struct Call {
  const dso_cuda_moe_experts_params &p;
  bool hidden;
  Part part;
  cudaStream_t stream;
};

template <class E, Weights W>
cudaError_t run(const Call &c) {
  int64_t wide = c.hidden ? hidden_columns(c.p) : c.p.n;
  int64_t blocks = ceil_div(wide, c.hidden && c.p.w.gated ? COLUMNS / 2 : COLUMNS);
  dim3 grid(static_cast<unsigned>(c.p.routing.most_tiles * blocks));
  if (grid.x == 0) return cudaSuccess;
  return launch(moe_mma_kernel<E, W>, grid, dim3(THREADS), PIPELINE, c.stream, c.p, c.hidden,
                static_cast<int>(blocks), c.part);
}

Weights kind_of(const dso_expert &e, bool transposed) {
  if (e.down.dtype == DSO_I8) return INT8;
  if (e.down.dtype == DSO_I4) return INT4;
  if (e.down.dtype == DSO_F8) return FP8;
  return transposed ? TRANSPOSED : ROW_MAJOR;
}

template <class E>
cudaError_t choose(const Call &c, Weights kind) {
  switch (kind) {
    case INT8:
      return run<E, INT8>(c);
    case INT4:
      return run<E, INT4>(c);
    case FP8:
      return run<E, FP8>(c);
    case TRANSPOSED:
      return run<E, TRANSPOSED>(c);
    default:
      return run<E, ROW_MAJOR>(c);
  }
}

cudaError_t choose(const Call &c, Weights kind) {
  return c.p.dtype == DSO_BF16 ? choose<Bf16>(c, kind) : choose<F16>(c, kind);
}

}  // namespace

cudaError_t dso::moe_mma(const dso_cuda_moe_experts_params &p, bool hidden, cudaStream_t stream) {
  Weights routed = kind_of(p.w.first, p.w.transposed);
  Weights shared = p.routing.shared ? kind_of(p.w.shared, false) : routed;
  if (routed == shared) return choose({p, hidden, ALL, stream}, routed);
  cudaError_t error = choose({p, hidden, ROUTED, stream}, routed);
  return error == cudaSuccess ? choose({p, hidden, SHARED, stream}, shared) : error;
}
