// moe_experts 的 sm_80 路径：分组的矩阵乘，cp.async 多级流水加 mma；h、o 两步是同一个核。
//
// 块的划分见 moe_gemm.cuh。x 的行由 token 直接收集；有门时 256 列是 128 列 gate 加对应的 128 列 up（每个 warp
// 32 + 32 列），激活在写出时，没有 gate、up 的中间结果。权重的三种存法只差读入：[列][k]（nn.Linear）、
// [k][列]（转置，交错的成对）、量化的（读进寄存器，反量化后写进共享内存）。
#include "moe_act.cuh"
#include "moe_experts.cuh"
#include "moe_gemm.cuh"

namespace {

using namespace dso;
using namespace dso::gemm;

constexpr int CODES = 32;  // 量化的一级分几段解开：int4 的一组至少这么长
static_assert(COLUMNS == THREADS, "量化的一个线程一列");
static_assert(128 % DEPTH == 0, "fp8 的一级在一组里");

enum Weights { ROW_MAJOR, TRANSPOSED, INT8, INT4, FP8 };

template <class E, Weights W>
struct Gemm {
  static constexpr bool QUANTIZED = W == INT8 || W == INT4 || W == FP8;

  const dso_cuda_moe_experts_params &p;
  dso_cuda_moe_tile tile;
  bool hidden, paired;        // hidden：算 h；否则算 o
  bool split;                 // 一半的列是 gate，一半是 up
  int first, columns, depth;  // 这一块的第一列、专家的列数、K
  int thread;
  uint16_t *shared;

  Copy<DEPTH> lines;                          // 左边的各段；[列][k] 的权重也是
  const uint16_t *a_base, *b_base[2];         // 右边的各段轮流取自两处（gate、up，或相隔的列）
  uint32_t a_at[COPIES], b_at[2], b_step[2];  // 以 16 字节计
  int a_count, b_count;                       // 前几段在范围之内
  // 量化的：本线程的一列（越界的 code 为空）、下一级的码（int4 只用一半）。
  const unsigned char *code;
  const float *scale;
  const uint8_t *zero;
  int group;
  uint4 codes[DEPTH / 16];
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
        thread(static_cast<int>(threadIdx.x)),
        shared(reinterpret_cast<uint16_t *>(dynamic_shared())) {
    paired = W == TRANSPOSED && hidden && p.w.paired;
    split = hidden && p.w.gated && !paired;
    first = block * (hidden && p.w.gated ? COLUMNS / 2 : COLUMNS);
    dso_expert e = expert();
    columns = columns_of(p, e, hidden);
    depth = static_cast<int>(hidden ? p.k : e.inner);
  }

  // 用到时再取：主循环里不占寄存器。
  __device__ __forceinline__ dso_expert expert() const {
    return expert_at(p.w, p.routing.experts, tile.expert);
  }
  // 共享内存里的第 r 列所在的矩阵（没有门的、算 o 时只有一个）、量化的尺度。
  __device__ __forceinline__ dso_mat matrix_of(const dso_expert &e, int r) const {
    return !hidden ? e.down : is_up(r) ? e.up : e.gate;
  }
  __device__ __forceinline__ dso_quant quant_of(const dso_expert &e, int r) const {
    return !hidden ? e.down_quant : is_up(r) ? e.up_quant : e.gate_quant;
  }

  __device__ __forceinline__ void locate() {
    a_base = hidden ? static_cast<const uint16_t *>(p.x.data)
                    : static_cast<const uint16_t *>(p.h) + hidden_at(p, tile.row);
    int64_t rs = hidden ? p.x.rs : hidden_at(p, tile.row + 1) - hidden_at(p, tile.row);
    a_count = b_count = 0;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      int row = lines.line + i * lines.LINES;
      a_at[i] = 0;
      if (row >= tile.rows) continue;
      int64_t from = hidden ? p.routing.token[tile.row + row] : row;
      a_at[i] = static_cast<uint32_t>((from * rs + lines.at) / CHUNK);
      a_count = i + 1;
    }
    dso_expert e = expert();
    if (W == ROW_MAJOR) locate_rows(e);
    if (W == TRANSPOSED) locate_columns(e);
    if (QUANTIZED) locate_codes(e);
  }

  // 第 i 段是共享内存里的第 line + 32 i 列：有门时 i 是偶数的在 gate 里，奇数的在 up 里。
  __device__ __forceinline__ void locate_rows(const dso_expert &e) {
    static_assert(Copy<DEPTH>::LINES == 32, "一段一半");
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int r = lines.line + i * 32;
      dso_mat from = matrix_of(e, r);
      b_base[i] = static_cast<const uint16_t *>(from.data);
      b_at[i] = static_cast<uint32_t>((column_of(r) * from.rs + lines.at) / CHUNK);
      b_step[i] = static_cast<uint32_t>((column_of(TILE) - column_of(0)) * (from.rs / CHUNK));
    }
#pragma unroll
    for (int i = 0; i < RIGHT; i++)
      if (column_of(lines.line + i * 32) < columns) b_count = i + 1;
  }

  // 各段是同样的 8 列，k 不同。
  __device__ __forceinline__ void locate_columns(const dso_expert &e) {
    Copy<COLUMNS> across;
    int n = paired ? 2 * first + across.at : column_of(across.at);
    dso_mat from = matrix_of(e, across.at);
    b_base[0] = static_cast<const uint16_t *>(from.data) + n;
    b_step[0] = static_cast<uint32_t>(from.rs / CHUNK * across.LINES);
    b_at[0] = static_cast<uint32_t>(from.rs / CHUNK * across.line);
    if (n < (paired ? 2 * columns : columns)) b_count = RIGHT;
  }

  __device__ __forceinline__ void locate_codes(const dso_expert &e) {
    int n = column_of(thread);
    dso_mat from = matrix_of(e, thread);
    dso_quant quant = quant_of(e, thread);
    code = nullptr;
    if (n >= columns) return;
    code = static_cast<const unsigned char *>(from.data) + n * from.rs;
    scale = quant.scale + n * quant.groups;
    zero = quant.zero ? quant.zero + n * quant.groups : nullptr;
    group = static_cast<int>(quant.group);
  }

  __device__ __forceinline__ void load_left(uint16_t *to, int k0) const {
    int count = k0 + lines.at < depth ? a_count : 0;
#pragma unroll
    for (int i = 0; i < COPIES; i++)
      lines.start(to, i, chunks_after(a_base + k0, a_at[i]), i < count);
  }

  // 右边的第 part 份（从 0 起）。
  __device__ __forceinline__ void load_right(uint16_t *to, int k0, int part) const {
    Copy<COLUMNS> across;
    int count = k0 + lines.at < depth ? b_count : 0;
    int left = b_count ? depth - k0 - across.line : 0;
#pragma unroll
    for (int i = part * COPIES; i < (part + 1) * COPIES; i++) {
      if (W == ROW_MAJOR)
        lines.start(to, i, chunks_after(b_base[i % 2] + k0, b_at[i % 2] + i / 2 * b_step[i % 2]),
                    i < count);
      else
        across.start(to, i, chunks_after(b_base[0], b_at[0] + (k0 / across.LINES + i) * b_step[0]),
                     i * across.LINES < left);
    }
  }

  __device__ __forceinline__ void load(int block, uint16_t *stage, int part) {
    int k0 = block * DEPTH;
    if (k0 >= depth) return;
    if (part == 0)
      load_left(stage, k0);
    else if (!QUANTIZED)
      load_right(stage + A_ELEMS, k0, part - 1);
    else if (part == 1)
      fetch(k0);
  }

  __device__ __forceinline__ void settle(int block, uint16_t *stage) {
    int k0 = block * DEPTH;
    if (QUANTIZED && k0 < depth) put(k0, stage + A_ELEMS);
  }

  // ---- 量化的权重：一个线程一列 ----

  __device__ __forceinline__ void fetch(int k0) {
    constexpr int WIDTH = W == INT4 ? CODES : 16;  // 一次读几个码
#pragma unroll
    for (int i = 0; i < DEPTH / WIDTH; i++) {
      int k = k0 + i * WIDTH;
      codes[i] = make_uint4(0, 0, 0, 0);
      if (code && k < depth)
        codes[i] = *reinterpret_cast<const uint4 *>(code + (W == INT4 ? k / 2 : k));
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

  // 从 k 起的一段的尺度；越界的尺度为 0，码也都是 0。
  __device__ __forceinline__ int group_of(int k) const { return group ? k / group : 0; }
  __device__ __forceinline__ float scale_of(int k) const {
    return code && k < depth ? scale[group_of(k)] : 0.0f;
  }

  // 一段 CODES 个码（从第 word 个字起）解成 16 位。
  __device__ __forceinline__ void decode(uint32_t (&out)[CODES / 2], int k, int word) const {
    if (W == INT8) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        uint32_t codes4 = word_of(word + i);
        out[2 * i] = E::pack(int8_of(codes4, 0), int8_of(codes4, 1));
        out[2 * i + 1] = E::pack(int8_of(codes4, 2), int8_of(codes4, 3));
      }
    } else if (W == FP8) {  // 组的尺度在这里乘，不另要累加器
      float by = scale_of(k);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        uint32_t codes4 = word_of(word + i);
        float2 low = e4m3_pair(codes4), high = e4m3_pair(codes4 >> 16);
        out[2 * i] = E::pack(by * low.x, by * low.y);
        out[2 * i + 1] = E::pack(by * high.x, by * high.y);
      }
    } else {
      float by = scale_of(k), middle = 8.0f;
      if (code && k < depth && zero) middle = static_cast<float>(zero[group_of(k)]);
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int high = 0; high < 2; high++) {
          float v[4];
#pragma unroll
          for (int b = 0; b < 4; b++)
            v[b] = by * (static_cast<float>(word_of(word + i) >> (8 * b + 4 * high) & 15) - middle);
          out[high * 8 + 2 * i] = E::pack(v[0], v[1]);
          out[high * 8 + 2 * i + 1] = E::pack(v[2], v[3]);
        }
    }
  }

  __device__ __forceinline__ void put(int k0, uint16_t *tile) const {
#pragma unroll
    for (int part = 0; part < DEPTH / CODES; part++) {
      uint32_t out[CODES / 2];
      decode(out, k0 + part * CODES, part * (W == INT4 ? 4 : 8));
#pragma unroll
      for (int i = 0; i < CODES / CHUNK; i++) {
        int chunk = (part * CODES / CHUNK + i) ^ thread % 8;
        *reinterpret_cast<uint4 *>(tile + thread * DEPTH + chunk * CHUNK) =
            make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
      }
    }
  }

  // ---- 写出 ----

  __device__ __forceinline__ static void add_bias(Vec<8> &x, const void *bias, const dso_expert &e,
                                                  int n, int64_t step) {
    if (!bias) return;
#pragma unroll
    for (int j = 0; j < 8; j++) x.v[j] += bias_at(bias, e.bias_dtype, (n + j) * step);
  }

  __device__ __forceinline__ static void multiply_by(Vec<8> &x, const float *by) {
#pragma unroll
    for (int j = 0; j < 8; j++) x.v[j] *= by[j];
  }

  // 第 at 行第 n 列起的 8 个 gate、up（加了偏置）留给反向。
  __device__ __forceinline__ void save(int64_t at, int n, Vec<8> gate, Vec<8> up) const {
    SavedRow to = saved_row(p, at);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      gate.v[j] = kept_value(p.act, false, E::dtype, gate.v[j]);
      up.v[j] = kept_value(p.act, true, E::dtype, up.v[j]);
    }
    dso::store<8>(p.saved, E::dtype, to.at + n, gate);
    if (p.w.gated) dso::store<8>(p.saved, E::dtype, to.at + to.up + n, up);
  }

  // 第 at 行第 n 列起的 8 个结果；row 的第 column 列起是它的 gate（或普通的列）。
  __device__ __forceinline__ Vec<8> value(const dso_expert &e, const float *row, int column,
                                          int64_t at, int n) const {
    Vec<8> x = result(row, column);
    if (W == INT8) multiply_by(x, (hidden ? e.gate_quant : e.down_quant).scale + n);
    if (!hidden) {
      add_bias(x, e.down_bias, e, n, 1);
      return x;
    }
    Vec<8> u = x;
    if (p.w.gated) {
      u = result(row, column + (paired ? 8 : 32));
      if (paired) part_pairs(x, u);
      if (W == INT8) multiply_by(u, e.up_quant.scale + n);
      add_bias(u, e.up_bias, e, n, e.bias_step);
    }
    add_bias(x, e.gate_bias, e, n, e.bias_step);
    if (p.saved) save(at, n, x, u);
    activate_all(p.act, p.w.gated, x, u);
    return x;
  }

  // 交错的 16 个分成 8 个 gate、8 个 up。
  __device__ static void part_pairs(Vec<8> &low, Vec<8> &high) {
    Vec<8> gates, ups;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      gates.v[j] = low.v[2 * j], gates.v[j + 4] = high.v[2 * j];
      ups.v[j] = low.v[2 * j + 1], ups.v[j + 4] = high.v[2 * j + 1];
    }
    low = gates, high = ups;
  }

  // 这个 warp 有没有要算的行、列。
  __device__ __forceinline__ bool active(int end) const {
    int r = warp_column();
    return warp_row() < tile.rows && (paired ? first + r / 2 : column_of(r)) < end;
  }

  __device__ __forceinline__ void store() {
    bool halved = split || paired;  // 一个 warp 的 64 列得 32 个 h
    int start = first + (halved ? warp_column() / 2 : warp_column());
    dso_expert e = expert();
    int end = columns_of(p, e, hidden);
    for_results(acc, shared, active(end), (halved ? TILE / 2 : TILE) / 8,
                [&](int row, int chunk, const float *from) {
                  int n = start + chunk * 8;
                  if (row >= tile.rows || n >= end) return;
                  int64_t at = tile.row + row;
                  Vec<8> x = value(e, from, chunk * (paired ? 16 : 8), at, n);
                  uint16_t *to = hidden ? static_cast<uint16_t *>(p.h) + hidden_at(p, at)
                                        : static_cast<uint16_t *>(p.o) + at * p.n;
                  *reinterpret_cast<uint4 *>(to + n) =
                      make_uint4(E::pack(x.v[0], x.v[1]), E::pack(x.v[2], x.v[3]),
                                 E::pack(x.v[4], x.v[5]), E::pack(x.v[6], x.v[7]));
                });
  }

  __device__ __forceinline__ void run(int stages) {
    locate();
    accumulate<E, false, W == TRANSPOSED>(*this, acc, shared, (depth + DEPTH - 1) / DEPTH, stages,
                                          active(columns));
    store();
  }
};

// 相邻的 MOE_GROUP 块行与全部的列块一起做：权重与 x 都在 L2 里。
template <class E, Weights W>
__global__ __launch_bounds__(THREADS, 1) void moe_mma_kernel(dso_cuda_moe_experts_params p,
                                                             bool hidden, int column_blocks,
                                                             int stages, Part part) {
  grid_wait();
  int64_t each = static_cast<int64_t>(MOE_GROUP) * column_blocks, id = blockIdx.x;
  int64_t group = id / each, inside = id % each, left = p.routing.most_tiles - group * MOE_GROUP;
  int tiles = static_cast<int>(left < MOE_GROUP ? left : MOE_GROUP);
  dso_cuda_moe_tile at = p.routing.tiles[group * MOE_GROUP + inside % tiles];
  if (skips(p, at, part)) return;
  Gemm<E, W> gemm(p, at, hidden, static_cast<int>(inside / tiles));
  if (gemm.first < gemm.columns) gemm.run(stages);
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
  Device device;
  if (cudaError_t error = device_of(&device)) return error;
  int stages = stages_of(device.shared_limit);
  return launch(moe_mma_kernel<E, W>, grid, dim3(THREADS), pipeline_bytes(stages), c.stream, c.p,
                c.hidden, static_cast<int>(blocks), stages, c.part);
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
