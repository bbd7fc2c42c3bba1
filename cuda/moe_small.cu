// moe_experts 词元少时的路径：受限于读权重的带宽，所以权重不经过共享内存，直接从显存读成 mma 的左操作数。
//
// 一个 warp 管 16 行权重（有门时 8 行 gate 与对应的 8 行 up，于是同一个线程得到一对，当场激活）、一块至多 32 个词元：
// 权重是 mma 的 M，词元是 N。k 在一步里怎样排列无关紧要，只要两个操作数相同：每个线程连续读 16 字节，
// 就当作它在片段里的那几个 k。一个 CTA 的 4 个 warp 各管 K 的一段，最后按次序相加。
// int8、fp8 的码在 16 位里是精确的，整行的尺度最后乘；int4 一步正好一组，码减零点之后是精确的整数，尺度乘在一组的
// 和上；fp8 按组时同样，两步一组。
#include <assert.h>

#include "config.cuh"
#include "mma.cuh"
#include "moe_act.cuh"
#include "moe_experts.cuh"

namespace {

using namespace dso;

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// FP8 整行一个尺度，FP8_128 每 128 个一个。
enum Kind { PLAIN, INT8, FP8, FP8_128, INT4_32, INT4_64, INT4_128 };

// 一步里每个线程读多少个字（4 字节）、多少个 k；int4 一步就是一组。
template <Kind K>
struct Step {
  static constexpr bool int4 = K >= INT4_32;
  static constexpr bool grouped = int4 || K == FP8_128, row_scale = K == INT8 || K == FP8;
  static constexpr int words = K == INT4_32 ? 1 : K == INT4_64 ? 2 : 4;
  static constexpr int lane_k = K == PLAIN ? 8 : int4 ? 8 * words : 16;
  static constexpr int k = 4 * lane_k;
  static constexpr int per_group = K == FP8_128 ? 128 / k : 1;  // 几步一组
  // 一次发出几步的读（连同尺度），占 32 个寄存器左右：每个 SM 上 64 到 100 KiB 在途。sets 份 16 行一起读时减半
  __host__ __device__ static constexpr int unroll(int sets) {
    return !int4 ? 4 : (K == INT4_128 ? 4 : 8) / sets;
  }
};

template <int WORDS>
struct Words {
  uint32_t v[WORDS];
};

template <int WORDS>
__device__ __forceinline__ Words<WORDS> load_words(const void *from) {
  Words<WORDS> r;
  if constexpr (WORDS == 4) {
    uint4 x = load_once_16(from);
    r.v[0] = x.x, r.v[1] = x.y, r.v[2] = x.z, r.v[3] = x.w;
  } else if constexpr (WORDS == 2) {
    uint2 x = load_once_8(from);
    r.v[0] = x.x, r.v[1] = x.y;
  } else {
    r.v[0] = *static_cast<const uint32_t *>(from);
  }
  return r;
}

// 一份 16 行：片段里的第 g 行（上）、第 g + 8 行（下）。
struct Rows {
  const unsigned char *top, *bottom;  // k = 0 处
  const float *top_scale, *bottom_scale;
  const uint8_t *top_zero, *bottom_zero;
};

// 不排序（tile_rows 为 0）：每个 slot 自己一块，行就是 slot；共享专家每个词元一块。
__device__ __forceinline__ dso_cuda_moe_tile tile_at(const dso_cuda_moe_routing &r, int64_t i) {
  if (r.tile_rows > 0) return r.tiles[i];
  int64_t e = i < r.tokens * r.top_k ? r.index[i] : r.experts;
  assert(e >= 0);
  bool real = e < r.experts || i >= r.tokens * r.top_k;
  return {static_cast<int32_t>(real ? e : r.experts), static_cast<int32_t>(i), real, 0};
}

__device__ __forceinline__ int64_t token_of(const dso_cuda_moe_routing &r, int64_t row) {
  if (r.tile_rows > 0) return r.token[row];
  int64_t slots = r.tokens * r.top_k;
  return row < slots ? row / r.top_k : row - slots;
}

struct Work {
  const dso_cuda_moe_experts_params &p;
  dso_cuda_moe_tile tile;
  bool hidden, paired;  // paired：上是 gate，下是 up
  int first, columns, depth;

  // 第 row 个词元（块内）的 x 或 h；没有为空。
  __device__ __forceinline__ const uint16_t *input(int row) const {
    if (row >= tile.rows) return nullptr;
    int64_t at = tile.row + row;
    if (hidden) return static_cast<const uint16_t *>(p.x.data) + token_of(p.routing, at) * p.x.rs;
    return static_cast<const uint16_t *>(p.h) + hidden_at(p, at);
  }
};

// 从 k 起的 2 WORDS 个 16 位元素；越过 depth 的是 0（depth 是 8 的倍数）。
template <int WORDS>
__device__ __forceinline__ Words<WORDS> load_input(const uint16_t *row, int k, int depth) {
  Words<WORDS> r = {};
  if (!row || k >= depth) return r;
  if constexpr (WORDS == 2) {
    uint2 x = *reinterpret_cast<const uint2 *>(row + k);
    r.v[0] = x.x, r.v[1] = x.y;
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      if (k + 2 * i >= depth) break;
      uint4 x = *reinterpret_cast<const uint4 *>(row + k + 2 * i);
      r.v[i] = x.x, r.v[i + 1] = x.y, r.v[i + 2] = x.z, r.v[i + 3] = x.w;
    }
  }
  return r;
}

// ---- 各种权重的一步：acc [词元 8 个一份] += 权重 · x ----

template <class E, int NT>
__device__ __forceinline__ void multiply_plain(float (&acc)[NT][4], const Words<4> &top,
                                               const Words<4> &bottom, const Words<4> (&x)[NT]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint32_t a[4] = {top.v[i], bottom.v[i], top.v[i + 1], bottom.v[i + 1]};
#pragma unroll
    for (int t = 0; t < NT; t++) E::mma(acc[t], a, x[t].v[i], x[t].v[i + 1]);
  }
}

// 一个字里的 4 个一字节的码：(0, 1)、(2, 3) 两对。
template <class E, Kind K>
__device__ __forceinline__ uint32_t code_pair(uint32_t word, int first) {
  if constexpr (K == INT8)
    return E::pack(static_cast<float>(static_cast<int8_t>(word >> (8 * first))),
                   static_cast<float>(static_cast<int8_t>(word >> (8 * first + 8))));
  float2 pair = e4m3_pair(word >> (8 * first));
  return E::pack(pair.x, pair.y);
}

template <class E, Kind K, int NT>
__device__ __forceinline__ void multiply_codes(float (&acc)[NT][4], const Words<4> &top,
                                               const Words<4> &bottom, const Words<8> (&x)[NT]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t a[4] = {code_pair<E, K>(top.v[i], 0), code_pair<E, K>(bottom.v[i], 0),
                     code_pair<E, K>(top.v[i], 2), code_pair<E, K>(bottom.v[i], 2)};
#pragma unroll
    for (int t = 0; t < NT; t++) E::mma(acc[t], a, x[t].v[2 * i], x[t].v[2 * i + 1]);
  }
}

// 一个字（8 个 int4）里低（高）4 位的 4 个码减零点：(0, 1)、(2, 3) 两对。
template <class E>
__device__ __forceinline__ void int4_pairs(uint32_t (&pair)[2], uint32_t word, int high,
                                           uint32_t zero, bool has_zero) {
  uint32_t mixed = swap_middle_bytes(word) >> (4 * high);  // 字节 0、1、2、3 排成 0、2、1、3
#pragma unroll
  for (int i = 0; i < 2; i++) {
    uint32_t biased = E::biased_codes(mixed >> (8 * i));
    // 零点不大时一次减去；任意的零点加上偏移在 bf16 里不精确，分两次
    pair[i] = has_zero ? E::subtract(E::subtract(biased, E::pack_pair(E::CODE_BIAS)), zero)
                       : E::subtract(biased, zero);
  }
}

// 一组的尺度与零点：上、下两行。
struct Group {
  float top, bottom;
  uint32_t zeros;  // 上的在低 8 位，下的在第 8 位起；没有零点时不用
};

// 一个线程在一步里的第一个 k：int4 的一段 32 个，低、高 4 位相隔 16。
template <Kind K>
__device__ __forceinline__ int lane_offset(int c) {
  if (K == INT4_64) return c / 2 * 32 + c % 2 * 8;
  if (K == INT4_32) return c * 4;
  return c * Step<K>::lane_k;
}

// 一个 warp 的累加：SETS 份 16 行权重，NT 份 8 个词元。
template <class E, Kind K, int NT, int SETS, int UNROLL>
struct Stream {
  using S = Step<K>;

  int lane = static_cast<int>(threadIdx.x) % WARP, depth;
  float acc[SETS][NT][4] = {};

  __device__ __forceinline__ explicit Stream(int k) : depth(k) {}

  // 没有量化的、一个码一字节的一步：w [份][上、下]。按组的先求这一步的和，再乘组的尺度。
  __device__ __forceinline__ void step(const Words<S::words> (&w)[SETS][2], const Group &group,
                                       const uint16_t *const (&x)[NT], int k0) {
    int k = k0 + lane_offset<K>(lane % 4);
    if constexpr (K == PLAIN) {
      Words<4> in[NT];
#pragma unroll
      for (int t = 0; t < NT; t++) in[t] = load_input<4>(x[t], k, depth);
      multiply_plain<E, NT>(acc[0], w[0][0], w[0][1], in);
    } else if constexpr (!S::int4) {
      Words<8> in[NT];
#pragma unroll
      for (int t = 0; t < NT; t++) in[t] = load_input<8>(x[t], k, depth);
      if constexpr (S::grouped) {
        float part[NT][4] = {};
        multiply_codes<E, K, NT>(part, w[0][0], w[0][1], in);
        add_scaled(acc[0], part, group);
      } else {
        multiply_codes<E, K, NT>(acc[0], w[0][0], w[0][1], in);
      }
    }
  }

  __device__ static __forceinline__ void add_scaled(float (&to)[NT][4], const float (&part)[NT][4],
                                                    const Group &group) {
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) to[t][i] += (i < 2 ? group.top : group.bottom) * part[t][i];
  }

  // int4 的一步：x 的低、高两段（相隔 16 个 k）配码的低、高 4 位。
  __device__ __forceinline__ void step_int4(const Words<S::words> (&w)[SETS][2],
                                            const Group (&group)[SETS], bool has_zero,
                                            const uint16_t *const (&x)[NT], int k0) {
    int k = k0 + lane_offset<K>(lane % 4);
    float part[SETS][NT][4] = {};
#pragma unroll
    for (int i = 0; i < S::words; i++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        Words<2> in[NT];
#pragma unroll
        for (int t = 0; t < NT; t++) in[t] = load_input<2>(x[t], k + 4 * i + 16 * h, depth);
#pragma unroll
        for (int s = 0; s < SETS; s++) {
          uint32_t u[2], d[2];
          int4_pairs<E>(u, w[s][0].v[i], h, zero_of(group[s].zeros & 255, has_zero), has_zero);
          int4_pairs<E>(d, w[s][1].v[i], h, zero_of(group[s].zeros >> 8, has_zero), has_zero);
          uint32_t a[4] = {u[0], d[0], u[1], d[1]};
#pragma unroll
          for (int t = 0; t < NT; t++) E::mma(part[s][t], a, in[t].v[0], in[t].v[1]);
        }
      }
#pragma unroll
    for (int s = 0; s < SETS; s++) add_scaled(acc[s], part[s], group[s]);
  }

  __device__ static __forceinline__ uint32_t zero_of(uint32_t zero, bool has_zero) {
    return has_zero ? E::pack_pair(static_cast<float>(zero)) : E::pack_pair(E::CODE_BIAS + 8.0f);
  }

  __device__ __forceinline__ static Group load_group(const Rows &r, int i) {
    Group g = {r.top_scale[i], r.bottom_scale[i], 0};
    if (r.top_zero) g.zeros = r.top_zero[i] | static_cast<uint32_t>(r.bottom_zero[i]) << 8;
    return g;
  }

  // 第 [begin, end) 步；x [t] 是第 8 t + lane / 4 个词元。
  __device__ __forceinline__ void run(const Rows (&rows)[SETS], const uint16_t *const (&x)[NT],
                                      int begin, int end) {
    // 一步的字节：16 位的 4 x 16；码同样（int4 每线程 4 words 字节）
    constexpr int BYTES = 4 * S::words;
    int at = lane % 4 * BYTES;
    bool has_zero = rows[0].top_zero != nullptr;
    for (int i = begin; i < end; i += UNROLL) {
      Words<S::words> w[UNROLL][SETS][2];
      Group group[UNROLL][SETS];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        bool inside = i + u < end;
        int64_t byte = static_cast<int64_t>(i + u) * 4 * BYTES + at;
#pragma unroll
        for (int s = 0; s < SETS; s++) {
          w[u][s][0] = w[u][s][1] = {}, group[u][s] = {};
          if (!inside) continue;
          // 尺度是结果那一行的：末一步里自己的 k 越过的线程也要
          if (S::grouped) group[u][s] = load_group(rows[s], (i + u) / S::per_group);
          if (!tail_ok(i + u)) continue;
          w[u][s][0] = load_words<S::words>(rows[s].top + byte);
          w[u][s][1] = load_words<S::words>(rows[s].bottom + byte);
        }
      }
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        if (i + u >= end) break;
        if constexpr (S::int4)
          step_int4(w[u], group[u], has_zero, x, (i + u) * S::k);
        else
          step(w[u], group[u][0], x, (i + u) * S::k);
      }
    }
  }

  // 16 位与一个码一字节的行正好 depth 个：最后一步里越过的不读。int4 补齐到组。
  __device__ __forceinline__ bool tail_ok(int i) const {
    return S::int4 || i * S::k + lane_offset<K>(lane % 4) < depth;
  }
};

// 各 warp 的部分和按次序相加，激活或加偏置，写出。
template <class E, Kind K, int NT, int SETS>
__device__ __forceinline__ void finish(const float (&acc)[SETS][NT][4], const Work &work,
                                       const dso_expert &expert, float *sums) {
  constexpr int EACH = SETS * NT * 4 * WARP;
  const dso_cuda_moe_experts_params &p = work.p;
  int warp = static_cast<int>(threadIdx.x) / WARP, self = static_cast<int>(threadIdx.x) % WARP;
#pragma unroll
  for (int s = 0; s < SETS; s++)
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[warp * EACH + ((s * NT + t) * 4 + i) * WARP + self] = acc[s][t][i];
  __syncthreads();
  auto total = [&](int set, int t, int i, int lane) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[w * EACH + ((set * NT + t) * 4 + i) * WARP + lane];
    return sum;
  };
  // 一份里每个线程 2 个（成对的 gate、up）或 4 个结果
  int each = work.paired ? 2 : 4;
#pragma unroll 1
  for (int index = static_cast<int>(threadIdx.x); index < SETS * NT * each * WARP;
       index += THREADS) {
    int lane = index % WARP, i = index / WARP % each, part = index / WARP / each;
    int set = part / NT, t = part % NT, row = t * 8 + lane % 4 * 2 + i % 2;
    int n = work.first + (work.paired ? set * 8 : set * 16 + i / 2 * 8) + lane / 4;
    if (row >= work.tile.rows || n >= work.columns) continue;
    float x = total(set, t, i, lane);
    int64_t at = work.tile.row + row;
    if (Step<K>::row_scale) x *= (work.hidden ? expert.gate_quant : expert.down_quant).scale[n];
    if (!work.hidden) {
      x += bias_at(expert.down_bias, expert.bias_dtype, n);
      static_cast<uint16_t *>(p.o)[at * p.n + n] = static_cast<uint16_t>(E::pack(x, 0.0f));
      continue;
    }
    x += bias_at(expert.gate_bias, expert.bias_dtype, n * expert.bias_step);
    float u = 0.0f;
    if (work.paired) {
      u = total(set, t, i + 2, lane);
      if (Step<K>::row_scale) u *= expert.up_quant.scale[n];
      u += bias_at(expert.up_bias, expert.bias_dtype, n * expert.bias_step);
    }
    x = activate<true>(p.act, work.paired, x, u);
    static_cast<uint16_t *>(p.h)[hidden_at(p, at) + n] = static_cast<uint16_t>(E::pack(x, 0.0f));
  }
}

__device__ __forceinline__ const unsigned char *row_of(const dso_mat &w, int64_t row) {
  int64_t bytes = is_quantized(w.dtype) ? 1 : 2;
  return static_cast<const unsigned char *>(w.data) + row * w.rs * bytes;
}

__device__ __forceinline__ Rows rows_of(const dso_mat &top, const dso_quant &top_quant,
                                        int64_t top_row, const dso_mat &bottom,
                                        const dso_quant &bottom_quant, int64_t bottom_row) {
  Rows r = {row_of(top, top_row), row_of(bottom, bottom_row), top_quant.scale, bottom_quant.scale,
            top_quant.zero,       bottom_quant.zero};
  r.top_scale += top_row * top_quant.groups, r.bottom_scale += bottom_row * bottom_quant.groups;
  if (r.top_zero) r.top_zero += top_row * top_quant.groups;
  if (r.bottom_zero) r.bottom_zero += bottom_row * bottom_quant.groups;
  return r;
}

template <class E, Kind K, int NT, int SETS>
__device__ __forceinline__ void compute(const Work &work, const dso_expert &expert, float *sums) {
  int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  int g = lane / 4, last = work.columns - 1;
  Rows rows[SETS];
#pragma unroll
  for (int s = 0; s < SETS; s++) {
    if (work.paired) {
      int n = min_of(work.first + s * 8 + g, last);  // 越界的算了不写
      rows[s] = rows_of(expert.gate, expert.gate_quant, n, expert.up, expert.up_quant, n);
    } else {
      int n = work.first + s * 16 + g, top = min_of(n, last), bottom = min_of(n + 8, last);
      dso_mat mat = work.hidden ? expert.gate : expert.down;
      dso_quant quant = work.hidden ? expert.gate_quant : expert.down_quant;
      rows[s] = rows_of(mat, quant, top, mat, quant, bottom);
    }
  }
  const uint16_t *x[NT];
#pragma unroll
  for (int t = 0; t < NT; t++) x[t] = work.input(t * 8 + g);
  int steps = (work.depth + Step<K>::k - 1) / Step<K>::k, each = (steps + WARPS - 1) / WARPS;
  Stream<E, K, NT, SETS, Step<K>::unroll(SETS)> stream(work.depth);
  stream.run(rows, x, warp * each, min_of(steps, (warp + 1) * each));
  finish<E, K, NT, SETS>(stream.acc, work, expert, sums);
}

// MOST：一块至多多少份（8 个）词元。一个 warp 管几份 16 行：int4 的权重少，词元多时读 x 就显得多，两份共用。
template <Kind K, int MOST>
constexpr int SETS_OF = Step<K>::int4 && MOST > 1 ? 2 : 1;

// 一个 SM 上至少几块：再多寄存器就要溢出。
template <Kind K, int MOST>
constexpr int RESIDENT = MOST > 1             ? (Step<K>::int4 ? 2 : 3)
                         : K == PLAIN         ? 6
                         : Step<K>::row_scale ? 5
                                              : 4;

template <class E, Kind K, int MOST>
__global__ __launch_bounds__(THREADS, (RESIDENT<K, MOST>)) void moe_small_kernel(
    dso_cuda_moe_experts_params p, bool hidden, int column_blocks, Part part) {
  constexpr int SETS = SETS_OF<K, MOST>;
  __shared__ float sums[WARPS * SETS * MOST * 4 * WARP];
  grid_wait();
  dso_cuda_moe_tile at = tile_at(p.routing, blockIdx.x / static_cast<unsigned>(column_blocks));
  if (skips(p, at, part)) return;
  dso_expert expert = expert_at(p.w, p.routing.experts, at.expert);
  bool paired = hidden && p.w.gated;
  int block = static_cast<int>(blockIdx.x % static_cast<unsigned>(column_blocks));
  Work work{p,
            at,
            hidden,
            paired,
            block * (paired ? 8 : 16) * SETS,
            columns_of(p, expert, hidden),
            static_cast<int>(hidden ? p.k : expert.inner)};
  if (work.first >= work.columns) return;
  if constexpr (MOST == 1) {
    compute<E, K, 1, SETS>(work, expert, sums);
  } else {
    if (at.rows <= 8)
      compute<E, K, 1, SETS>(work, expert, sums);
    else if (at.rows <= 16)
      compute<E, K, 2, SETS>(work, expert, sums);
    else
      compute<E, K, 4, SETS>(work, expert, sums);
  }
}

// ---- 词元极少、不排序时的 o 与求和：一个 CTA 一个词元的 16 列，全部专家 ----

constexpr int DIRECT_WARPS = 8, DIRECT_THREADS = DIRECT_WARPS * WARP;

// 一个 SM 上只有一两块，一次多发几步的读。
template <Kind K>
constexpr int DIRECT_UNROLL = K == PLAIN || K == INT4_32 ? 8 : 4;

// 各专家的步排成一列平分给各 warp；一个 warp 的部分和按专家的次序加，各 warp 的再按次序加。
template <class E, Kind K>
__global__ __launch_bounds__(DIRECT_THREADS,
                             2) void moe_direct_kernel(dso_cuda_moe_experts_params p) {
  using S = Step<K>;
  __shared__ float sums[DIRECT_WARPS][16];
  grid_wait();
  const dso_cuda_moe_routing &r = p.routing;
  int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  int64_t token = blockIdx.y, slots = r.tokens * r.top_k;
  int first = static_cast<int>(blockIdx.x) * 16, last = static_cast<int>(p.n) - 1;
  int top_k = static_cast<int>(r.top_k), count = top_k + (r.shared ? 1 : 0);
  // 第 lane 个专家：编号、系数、从第几步起
  int mine = -1, steps = 0;
  float weight = 0.0f;
  if (lane < count) {
    int64_t row = lane < top_k ? token * r.top_k + lane : slots + token;
    dso_cuda_moe_tile at = tile_at(r, row);
    if (at.rows > 0) {
      mine = at.expert;
      weight = lane < top_k                  ? p.weights[row]
               : p.w.shared_scale != nullptr ? p.w.shared_scale[token]
                                             : 1.0f;
      int depth = static_cast<int>(expert_at(p.w, r.experts, mine).inner);
      steps = (depth + S::k - 1) / S::k;
    }
  }
  int end = steps;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    int other = __shfl_up_sync(ALL_LANES, end, static_cast<unsigned>(step));
    if (lane >= step) end += other;
  }
  int all = __shfl_sync(ALL_LANES, end, WARP - 1), each = (all + DIRECT_WARPS - 1) / DIRECT_WARPS;
  int from = warp * each, to = min_of(all, from + each);
  float top_sum = 0.0f, bottom_sum = 0.0f;
  int g = lane / 4, top = min_of(first + g, last), bottom = min_of(first + g + 8, last);
  for (int j = 0; j < count; j++) {
    int stop = __shfl_sync(ALL_LANES, end, j), start = stop - __shfl_sync(ALL_LANES, steps, j);
    int id = __shfl_sync(ALL_LANES, mine, j);
    float factor = __shfl_sync(ALL_LANES, weight, j);
    int begin = start > from ? start : from, finish = min_of(stop, to);
    if (id < 0 || begin >= finish) continue;
    dso_expert expert = expert_at(p.w, r.experts, id);
    Rows rows[1] = {
        rows_of(expert.down, expert.down_quant, top, expert.down, expert.down_quant, bottom)};
    int64_t row = j < top_k ? token * r.top_k + j : slots + token;
    const uint16_t *x[1] = {g == 0 ? static_cast<const uint16_t *>(p.h) + hidden_at(p, row)
                                   : nullptr};
    Stream<E, K, 1, 1, DIRECT_UNROLL<K>> stream(static_cast<int>(expert.inner));
    stream.run(rows, x, begin - start, finish - start);
    float a = stream.acc[0][0][0], b = stream.acc[0][0][2];  // 第 0 个词元，只有 lane % 4 == 0 的是
    if (S::row_scale) a *= expert.down_quant.scale[top], b *= expert.down_quant.scale[bottom];
    if (begin == start) {
      a += bias_at(expert.down_bias, expert.bias_dtype, top);
      b += bias_at(expert.down_bias, expert.bias_dtype, bottom);
    }
    top_sum += factor * a, bottom_sum += factor * b;
  }
  if (lane % 4 == 0) sums[warp][g] = top_sum, sums[warp][g + 8] = bottom_sum;
  __syncthreads();
  int i = static_cast<int>(threadIdx.x);
  if (i >= 16 || first + i > last) return;
  float y = 0.0f;
#pragma unroll
  for (int w = 0; w < DIRECT_WARPS; w++) y += sums[w][i];
  store_one(p.y, p.x.dtype, token * p.n + first + i, y);
}

struct Call {
  const dso_cuda_moe_experts_params &p;
  bool hidden;
  Part part;
  cudaStream_t stream;
};

template <class E, Kind K, int MOST>
cudaError_t run(const Call &c) {
  int64_t wide = c.hidden ? hidden_columns(c.p) : c.p.n;
  int64_t blocks = ceil_div(wide, (c.hidden && c.p.w.gated ? 8 : 16) * SETS_OF<K, MOST>);
  const dso_cuda_moe_routing &r = c.p.routing;
  int64_t tiles = r.tile_rows > 0 ? r.most_tiles : r.tokens * (r.top_k + (r.shared ? 1 : 0));
  dim3 grid(static_cast<unsigned>(tiles * blocks));
  if (grid.x == 0) return cudaSuccess;
  return launch(moe_small_kernel<E, K, MOST>, grid, dim3(THREADS), 0, c.stream, c.p, c.hidden,
                static_cast<int>(blocks), c.part);
}

template <class E, Kind K>
cudaError_t run(const Call &c) {
  if (c.p.routing.tile_rows == 0 && !c.hidden) {
    dim3 grid(static_cast<unsigned>(ceil_div(c.p.n, 16)),
              static_cast<unsigned>(c.p.routing.tokens));
    return launch(moe_direct_kernel<E, K>, grid, dim3(DIRECT_THREADS), 0, c.stream, c.p);
  }
  return c.p.routing.tile_rows <= 8 ? run<E, K, 1>(c) : run<E, K, 4>(c);
}

Kind kind_of(const dso_expert &e) {
  if (e.down.dtype == DSO_I8) return INT8;
  if (e.down.dtype == DSO_F8) return e.down_quant.group ? FP8_128 : FP8;
  if (e.down.dtype != DSO_I4) return PLAIN;
  return e.down_quant.group == 32 ? INT4_32 : e.down_quant.group == 64 ? INT4_64 : INT4_128;
}

template <class E>
cudaError_t choose(const Call &c, Kind kind) {
  switch (kind) {
    case INT8:
      return run<E, INT8>(c);
    case FP8:
      return run<E, FP8>(c);
    case FP8_128:
      return run<E, FP8_128>(c);
    case INT4_32:
      return run<E, INT4_32>(c);
    case INT4_64:
      return run<E, INT4_64>(c);
    case INT4_128:
      return run<E, INT4_128>(c);
    default:
      return run<E, PLAIN>(c);
  }
}

cudaError_t choose(const Call &c, Kind kind) {
  return c.p.dtype == DSO_BF16 ? choose<Bf16>(c, kind) : choose<F16>(c, kind);
}

}  // namespace

bool dso::moe_direct_fits(const dso_cuda_moe_experts_params &p) {
  return p.routing.tokens <= MOE_DIRECT_TOKENS && p.routing.top_k < WARP &&
         (!p.routing.shared || p.routing.experts == 0 || kind_of(p.w.first) == kind_of(p.w.shared));
}

cudaError_t dso::moe_small(const dso_cuda_moe_experts_params &p, bool hidden, cudaStream_t stream) {
  Kind routed = kind_of(p.w.first), shared = p.routing.shared ? kind_of(p.w.shared) : routed;
  if (routed == shared) return choose({p, hidden, ALL, stream}, routed);
  cudaError_t error = choose({p, hidden, ROUTED, stream}, routed);
  return error == cudaSuccess ? choose({p, hidden, SHARED, stream}, shared) : error;
}
