// 吸收式解码（sm_80 起）：cp.async 两级流水，mma 累加。算法同 csrc/mla_decode.c 的阶段 1、2；吸收与输出的
// W_UV 是普通的矩阵乘，由绑定交给 cuBLAS。
//
// 一块 32 个键读进共享内存一次，既当键又当值：
//   S [ROWS, 32] = Q [ROWS, r + dr] · 块ᵀ，WARPS_N 个 warp 各算 8 个键；
//   P 经共享内存交换之后，O [ROWS, r] += P · 块的前 r 列，每个 warp 管 r / WARPS 列。
// 量化的潜变量先原样拷进它那一行的后半，再由一个 warp 就地展开成 16 位。
#include <cstddef>

#include "config.cuh"
#include "mla_decode.cuh"
#include "mma.cuh"

namespace {

using namespace dso;

template <int RANK, int ROWS>
struct Shape {
  static constexpr int WARPS = ROWS == 16 ? 4 : 8;
  static constexpr int THREADS = WARPS * WARP;
  static constexpr int KEYS = DECODE_KEYS;
  static constexpr int WARPS_N = KEYS / 8, WARPS_M = WARPS / WARPS_N;
  static constexpr int TILES_M = ROWS / 16 / WARPS_M;  // 算得分时每个 warp 的行块
  static constexpr int COLUMNS = RANK / WARPS;         // 算输出时每个 warp 的列
  // 算得分的累加链：只有一个行块时分成两条，免得每次乘加都等上一次。
  static constexpr int CHAINS = TILES_M == 1 ? 2 : 1;
  static constexpr int UNROLL = TILES_M == 1 ? 4 : 2;  // 64 行时寄存器刚好够用
  static constexpr int P_STRIDE = KEYS + TILE_PAD;
};

// 动态共享内存的划分；行宽取决于 dr，所以在运行时算。
template <int RANK, int ROWS>
struct Layout {
  int width, stride;  // 键的宽（r + dr，补齐）、行距
  int q, tile, p, reduce, alpha, bytes;
  __host__ __device__ explicit Layout(int64_t rope_dim) {
    using S = Shape<RANK, ROWS>;
    width = RANK + static_cast<int>((rope_dim + 31) / 32 * 32);
    stride = width + TILE_PAD;
    q = 0;
    tile = q + ROWS * stride * 2;
    p = tile + 2 * S::KEYS * stride * 2;
    reduce = p + ROWS * S::P_STRIDE * 2;
    alpha = reduce + S::WARPS_N * ROWS * 4;
    bytes = alpha + ROWS * 4;
  }
};

template <class E, int RANK, int ROWS>
struct Attend {
  using S = Shape<RANK, ROWS>;

  const DecodeArgs &args;
  const dso_mla_inputs &in;
  Layout<RANK, ROWS> layout;
  uint16_t *q, *tiles, *p;
  float *reduce, *alpha;
  int thread, warp, lane, warp_m, warp_n;

  float o[ROWS / 16][S::COLUMNS / 8][4];
  float m[S::TILES_M][2], l[S::TILES_M][2];
  int limit[S::TILES_M][2];

  __device__ Attend(const DecodeArgs &a)
      : args(a), in(a.in), layout(a.in.rope_dim), thread(static_cast<int>(threadIdx.x)) {
    unsigned char *shared = dynamic_shared();
    q = reinterpret_cast<uint16_t *>(shared + layout.q);
    tiles = reinterpret_cast<uint16_t *>(shared + layout.tile);
    p = reinterpret_cast<uint16_t *>(shared + layout.p);
    reduce = reinterpret_cast<float *>(shared + layout.reduce);
    alpha = reinterpret_cast<float *>(shared + layout.alpha);
    warp = thread / WARP, lane = thread % WARP;
    warp_n = warp % S::WARPS_N, warp_m = warp / S::WARPS_N;
  }

  __device__ uint16_t *tile(int block) const {
    return tiles + (block & 1) * S::KEYS * layout.stride;
  }

  // 得分片段里第 t 块第 i 半的行（组内）。
  __device__ int row_of(int t, int i) const {
    return (warp_m * S::TILES_M + t) * 16 + fragment_row() + 8 * i;
  }

  // 一组查询：吸收后的 r 列，再接旋转的 dr 列；不足的补 0。
  __device__ void load_queries(const Piece &piece) {
    int latent_chunks = RANK / 8, chunks = layout.width / 8;
    for (int row = warp; row < ROWS; row += S::WARPS) {
      int64_t at = row_at(args, piece, row);
      const auto *latent = static_cast<const uint16_t *>(args.q_abs) + (at < 0 ? 0 : at * in.rank);
      const auto *rope = static_cast<const uint16_t *>(in.q);
      if (at >= 0) rope += query_at(in, at / in.heads, at % in.heads) + in.nope_dim;
      for (int c = lane; c < chunks; c += WARP) {
        int column = c * 8;
        bool part = c < latent_chunks;
        bool ok = at >= 0 && (part ? column < in.rank : column - RANK < in.rope_dim);
        cp_async_16(q + row * layout.stride + column,
                    part ? latent + (ok ? column : 0) : rope + (ok ? column - RANK : 0), ok);
      }
    }
  }

  // 发出一块键的拷贝；范围之外与被遮住的键填 0（那里可能是没有初始化的 NaN）。
  __device__ void load_keys(const Piece &piece, int block) {
    int bytes = static_cast<int>(bytes_of(in.latent_dtype));
    int chunks = static_cast<int>(in.rank) * bytes / 16;
    for (int key = warp; key < S::KEYS; key += S::WARPS) {
      int index = piece.key_begin + block * S::KEYS + key, slot = piece.at.slot + index;
      bool ok = index < piece.key_end && slot_seen(in, piece.at, slot);
      uint16_t *to = tile(block) + key * layout.stride;
      const char *latent =
          element(in.latent, in.latent_dtype,
                  ok ? slot_at(in, piece.at.row, slot, in.latent_bs, in.latent_ts) : 0);
      char *latent_to = reinterpret_cast<char *>(to) + (2 - bytes) * RANK;
      for (int c = lane; c < RANK * bytes / 16; c += WARP) {
        bool inside = ok && c < chunks;
        cp_async_16(latent_to + c * 16, latent + (inside ? c * 16 : 0), inside);
      }
      const auto *rope = static_cast<const uint16_t *>(in.rope);
      if (ok) rope += slot_at(in, piece.at.row, slot, in.rope_bs, in.rope_ts);
      for (int c = lane; c < (layout.width - RANK) / 8; c += WARP) {
        bool inside = ok && c * 8 < in.rope_dim;
        cp_async_16(to + RANK + c * 8, rope + (inside ? c * 8 : 0), inside);
      }
    }
    cp_async_commit();
  }

  // 量化的一块就地展开：一个 warp 一行，整行读进寄存器之后才写。
  __device__ void expand(const Piece &piece, int block) {
    // 一个线程一次处理相邻的几个：写出至多 16 字节，各线程相接，没有库冲突。
    constexpr int EACH = RANK / WARP < 8 ? RANK / WARP : 8, STEPS = RANK / (WARP * EACH);
    for (int key = warp; key < S::KEYS; key += S::WARPS) {
      int index = piece.key_begin + block * S::KEYS + key, slot = piece.at.slot + index;
      bool ok = index < piece.key_end && slot_seen(in, piece.at, slot);
      float scale = ok ? in.scale[slot_at(in, piece.at.row, slot, in.scale_bs, 1)] : 0.0f;
      uint16_t *to = tile(block) + key * layout.stride;
      const auto *raw = reinterpret_cast<const Bytes<EACH> *>(to + RANK / 2);
      Bytes<EACH> codes[STEPS];
#pragma unroll
      for (int i = 0; i < STEPS; i++) codes[i] = raw[i * WARP + lane];
      __syncwarp();
#pragma unroll
      for (int i = 0; i < STEPS; i++) {
        Words<EACH / 2> pairs;
#pragma unroll
        for (int j = 0; j < EACH / 2; j++) {
          float2 x = byte_pair(in.latent_dtype, codes[i].v[2 * j], codes[i].v[2 * j + 1]);
          pairs.v[j] = E::pack(scale * x.x, scale * x.y);
        }
        reinterpret_cast<Words<EACH / 2> *>(to)[i * WARP + lane] = pairs;
      }
      __syncwarp();
    }
  }

  // s [16 TILES_M, 8]
  __device__ void score(int block, float (&s)[S::TILES_M][4]) {
    float sum[S::CHAINS][S::TILES_M][4] = {};
    const uint16_t *keys = tile(block);
#pragma unroll S::UNROLL
    for (int k = 0; k < layout.width; k += 32) {
      uint32_t b[4];
      load_b_8x32(b, keys, layout.stride, warp_n * 8, k);
#pragma unroll
      for (int t = 0; t < S::TILES_M; t++) {
        uint32_t a[4];
        int row = (warp_m * S::TILES_M + t) * 16;
        load_a(a, q, layout.stride, row, k);
        E::mma(sum[0][t], a, b[0], b[1]);
        load_a(a, q, layout.stride, row, k + 16);
        E::mma(sum[S::CHAINS - 1][t], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int t = 0; t < S::TILES_M; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        s[t][i] = S::CHAINS == 1 ? sum[0][t][i] : sum[0][t][i] + sum[S::CHAINS - 1][t][i];
  }

  // 看不见的置 -inf，其余乘上系数。
  __device__ void hide(const Piece &piece, int block, float (&s)[S::TILES_M][4]) {
    float scale = score_scale(in);
    int first = piece.key_begin + block * S::KEYS + warp_n * 8 + fragment_column();
    bool seen[2];
#pragma unroll
    for (int e = 0; e < 2; e++)
      seen[e] = first + e < piece.key_end && slot_seen(in, piece.at, piece.at.slot + first + e);
#pragma unroll
    for (int t = 0; t < S::TILES_M; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        s[t][i] = seen[i & 1] && first + (i & 1) < limit[t][i >> 1] ? s[t][i] * scale : -INFINITY;
  }

  // 在线 softmax：跨 warp 求每行最大值，写出 P（16 位）与旧结果的缩放 alpha。
  __device__ void softmax(float (&s)[S::TILES_M][4]) {
#pragma unroll
    for (int t = 0; t < S::TILES_M; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float top = quad_max(fmaxf(s[t][2 * i], s[t][2 * i + 1]));
        if (lane % 4 == 0) reduce[warp_n * ROWS + row_of(t, i)] = top;
      }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < S::TILES_M; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int row = row_of(t, i);
        float top = m[t][i];
#pragma unroll
        for (int w = 0; w < S::WARPS_N; w++) top = fmaxf(top, reduce[w * ROWS + row]);
        float base = finite_max(top), keep = fast_exp2(m[t][i] - base);
        float a = fast_exp2(s[t][2 * i] - base), b = fast_exp2(s[t][2 * i + 1] - base);
        m[t][i] = top, l[t][i] = l[t][i] * keep + (a + b);
        if (warp_n == 0 && lane % 4 == 0) alpha[row] = keep;
        auto *to =
            reinterpret_cast<uint32_t *>(p + row * S::P_STRIDE + warp_n * 8 + fragment_column());
        *to = E::pack(a, b);
      }
    __syncthreads();
  }

  __device__ void accumulate(int block) {
#pragma unroll
    for (int t = 0; t < ROWS / 16; t++) {
      float keep[2] = {alpha[t * 16 + fragment_row()], alpha[t * 16 + fragment_row() + 8]};
#pragma unroll
      for (int n = 0; n < S::COLUMNS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[t][n][i] *= keep[i >> 1];
    }
    const uint16_t *values = tile(block);
#pragma unroll S::UNROLL / 2
    for (int k = 0; k < S::KEYS; k += 16) {
      uint32_t a[ROWS / 16][4];
#pragma unroll
      for (int t = 0; t < ROWS / 16; t++) load_a(a[t], p, S::P_STRIDE, t * 16, k);
#pragma unroll
      for (int n = 0; n < S::COLUMNS; n += 16) {
        uint32_t b[4];
        load_b_trans(b, values, layout.stride, k, warp * S::COLUMNS + n);
#pragma unroll
        for (int t = 0; t < ROWS / 16; t++) {
          E::mma(o[t][n / 8], a[t], b[0], b[1]);
          E::mma(o[t][n / 8 + 1], a[t], b[2], b[3]);
        }
      }
    }
  }

  __device__ void begin(const Piece &piece) {
#pragma unroll
    for (int t = 0; t < S::TILES_M; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        m[t][i] = -INFINITY, l[t][i] = 0.0f;
        limit[t][i] = row_limit(args, piece, row_of(t, i));
      }
#pragma unroll
    for (int t = 0; t < ROWS / 16; t++)
#pragma unroll
      for (int n = 0; n < S::COLUMNS / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) o[t][n][i] = 0.0f;
  }

  // 各 warp 的 l 相加，写出结果或部分结果。
  __device__ void finish(const Piece &piece) {
#pragma unroll
    for (int t = 0; t < S::TILES_M; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int row = row_of(t, i);
        float sum = quad_sum(l[t][i]);
        if (lane % 4 == 0) reduce[warp_n * ROWS + row] = sum;
        if (lane % 4 == 0 && warp_n == 0 && !piece.whole)
          args.part_m[piece.slot * ROWS + row] = m[t][i];
      }
    __syncthreads();
    if (!piece.whole && thread < ROWS) {
      float sum = 0.0f;
      for (int w = 0; w < S::WARPS_N; w++) sum += reduce[w * ROWS + thread];
      args.part_l[piece.slot * ROWS + thread] = sum;
    }
#pragma unroll
    for (int t = 0; t < ROWS / 16; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int row = t * 16 + fragment_row() + 8 * i;
        float sum = 0.0f;
        for (int w = 0; w < S::WARPS_N; w++) sum += reduce[w * ROWS + row];
#pragma unroll
        for (int n = 0; n < S::COLUMNS / 8; n++)
          write_pair(args, piece, row, warp * S::COLUMNS + n * 8 + fragment_column(),
                     o[t][n][2 * i], o[t][n][2 * i + 1], sum);
      }
    __syncthreads();  // 下一段要重写 q 与 reduce
  }

  __device__ void run(const Piece &piece) {
    begin(piece);
    load_queries(piece);
    load_keys(piece, 0);
    for (int block = 0; block < piece.units; block++) {
      cp_async_wait<0>();
      __syncthreads();  // 这一块到齐；上一块的读者也都过去了，可以重写它的缓冲
      if (block + 1 < piece.units) load_keys(piece, block + 1);
      if (quantized(in.latent_dtype)) {
        expand(piece, block);
        __syncthreads();
      }
      float s[S::TILES_M][4];
      score(block, s);
      hide(piece, block, s);
      softmax(s);
      accumulate(block);
    }
    finish(piece);
  }
};

template <class E, int RANK, int ROWS>
__global__ __launch_bounds__(Shape<RANK, ROWS>::THREADS,
                             1) void mla_decode_kernel(DecodeArgs args) {
  Attend<E, RANK, ROWS> attend(args);
  each_piece(args, threadIdx.x == 0, [&](const Piece &piece) { attend.run(piece); });
}

// ---- 通用路径：任何 dtype 的组合、任何维度，fp32 计算 ----

struct GeneralLayout {
  int q_stride, k_stride, q, k, o, p, m, l, alpha, bytes;
  __host__ __device__ GeneralLayout(const dso_mla_inputs &in, int64_t keys) {
    q_stride = static_cast<int>(in.rank + in.rope_dim);
    k_stride = q_stride | 1;  // 奇数：相邻线程读相邻键的同一列，不冲突
    q = 0, k = q + GENERAL_ROWS * q_stride;
    o = k + static_cast<int>(keys) * k_stride;
    p = o + GENERAL_ROWS * static_cast<int>(in.rank);
    m = p + GENERAL_ROWS * GENERAL_KEYS;
    l = m + GENERAL_ROWS, alpha = l + GENERAL_ROWS;
    bytes = (alpha + GENERAL_ROWS) * 4;
  }
};

__device__ void general_keys(const DecodeArgs &args, const Piece &piece, int first, float *keys,
                             int stride) {
  const dso_mla_inputs &in = args.in;
  int width = static_cast<int>(in.rank + in.rope_dim), count = args.schedule.keys;
  for (int i = static_cast<int>(threadIdx.x); i < count * width; i += GENERAL_THREADS) {
    int key = i / width, column = i % width;
    int slot = piece.at.slot + first + key, row = piece.at.row;
    float x = 0.0f;
    if (first + key < piece.key_end && slot_seen(in, piece.at, slot)) {
      if (column < in.rank) {
        x = load_one(in.latent, in.latent_dtype,
                     slot_at(in, row, slot, in.latent_bs, in.latent_ts) + column);
        if (in.scale) x *= in.scale[slot_at(in, row, slot, in.scale_bs, 1)];
      } else {
        x = load_one(in.rope, in.rope_dtype,
                     slot_at(in, row, slot, in.rope_bs, in.rope_ts) + column - in.rank);
      }
    }
    keys[key * stride + column] = x;
  }
}

// 一个 warp 一行：得分、最大值、P 与 alpha。
__device__ void general_scores(const DecodeArgs &args, const Piece &piece, int first, float *shared,
                               const GeneralLayout &at) {
  const dso_mla_inputs &in = args.in;
  int row = static_cast<int>(threadIdx.x) / WARP, key = static_cast<int>(threadIdx.x) % WARP;
  int index = first + key;
  bool seen = key < args.schedule.keys && index < row_limit(args, piece, row) &&
              slot_seen(in, piece.at, piece.at.slot + index);
  float s = -INFINITY;
  if (seen) {
    const float *x = shared + at.q + row * at.q_stride, *y = shared + at.k + key * at.k_stride;
    float sum = 0.0f;
    for (int c = 0; c < at.q_stride; c++) sum += x[c] * y[c];
    s = sum * score_scale(in);
  }
  float top = s;
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2)
    top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, step));
  float old = shared[at.m + row];
  top = fmaxf(top, old);
  float base = finite_max(top), value = fast_exp2(s - base), sum = warp_sum(value);
  shared[at.p + row * GENERAL_KEYS + key] = value;
  __syncwarp();
  if (key == 0) {
    float keep = fast_exp2(old - base);
    shared[at.m + row] = top, shared[at.alpha + row] = keep;
    shared[at.l + row] = shared[at.l + row] * keep + sum;
  }
}

__device__ void general_piece(const DecodeArgs &args, const Piece &piece, float *shared,
                              const GeneralLayout &at) {
  const dso_mla_inputs &in = args.in;
  int thread = static_cast<int>(threadIdx.x), rank = static_cast<int>(in.rank);
  for (int i = thread; i < GENERAL_ROWS * at.q_stride; i += GENERAL_THREADS) {
    int row = i / at.q_stride, column = i % at.q_stride;
    int64_t to = row_at(args, piece, row);
    float x = 0.0f;
    if (to >= 0)
      x = column < rank
              ? load_one(args.q_abs, args.dtype, to * in.rank + column)
              : load_one(in.q, in.q_dtype,
                         query_at(in, to / in.heads, to % in.heads) + in.nope_dim + column - rank);
    shared[at.q + i] = x;
  }
  for (int i = thread; i < GENERAL_ROWS * rank; i += GENERAL_THREADS) shared[at.o + i] = 0.0f;
  if (thread < GENERAL_ROWS) shared[at.m + thread] = -INFINITY, shared[at.l + thread] = 0.0f;
  for (int block = 0; block < piece.units; block++) {
    int first = piece.key_begin + block * args.schedule.keys;
    general_keys(args, piece, first, shared + at.k, at.k_stride);
    __syncthreads();
    general_scores(args, piece, first, shared, at);
    __syncthreads();
    for (int c = thread; c < rank; c += GENERAL_THREADS) {
      float sum[GENERAL_ROWS] = {};
      for (int key = 0; key < args.schedule.keys; key++) {
        float value = shared[at.k + key * at.k_stride + c];
#pragma unroll
        for (int r = 0; r < GENERAL_ROWS; r++)
          sum[r] += shared[at.p + r * GENERAL_KEYS + key] * value;
      }
#pragma unroll
      for (int r = 0; r < GENERAL_ROWS; r++) {
        float *o = shared + at.o + r * rank + c;
        *o = *o * shared[at.alpha + r] + sum[r];
      }
    }
    __syncthreads();
  }
  for (int i = thread; i < GENERAL_ROWS * ((rank + 1) / 2); i += GENERAL_THREADS) {
    int row = i / ((rank + 1) / 2), c = i % ((rank + 1) / 2) * 2;
    const float *o = shared + at.o + row * rank + c;
    write_pair(args, piece, row, c, o[0], c + 1 < rank ? o[1] : 0.0f, shared[at.l + row]);
  }
  if (!piece.whole && thread < GENERAL_ROWS) {
    args.part_m[piece.slot * GENERAL_ROWS + thread] = shared[at.m + thread];
    args.part_l[piece.slot * GENERAL_ROWS + thread] = shared[at.l + thread];
  }
  __syncthreads();
}

__global__ __launch_bounds__(GENERAL_THREADS, 2) void mla_decode_general(DecodeArgs args) {
  GeneralLayout at(args.in, args.schedule.keys);
  auto *shared = reinterpret_cast<float *>(dynamic_shared());
  each_piece(args, threadIdx.x == 0,
             [&](const Piece &piece) { general_piece(args, piece, shared, at); });
}

// ---- 合并：前 splits 块各管一个 CTA 名下分开算的一组查询，parts 个 warp 一行的 128 列，各加几段；其余的块（只在
// y、z 为 0 时有）一个 warp 一个词元，没有键可看的写 0 ----

// 从 part 起的一段列（至多 4 个，连续）；范围之外是 0。
__device__ float4 load_columns(const float *part, int64_t left) {
  if (left >= 4 && reinterpret_cast<uintptr_t>(part) % 16 == 0)
    return *reinterpret_cast<const float4 *>(part);
  return make_float4(left > 0 ? part[0] : 0.0f, left > 1 ? part[1] : 0.0f,
                     left > 2 ? part[2] : 0.0f, left > 3 ? part[3] : 0.0f);
}

// 一行：这个 warp 是这一行的 parts 个里的第 part 个；scratch 是这一行的 [parts, 32]。
__device__ void combine_row(const DecodeArgs &args, int cta, int row, int part, int parts,
                            float4 *scratch) {
  const dso_mla_inputs &in = args.in;
  const Schedule &s = args.schedule;
  Split split = args.splits[cta];
  bool mine = row < split.rows;
  int lane = static_cast<int>(threadIdx.x) % WARP;
  int count = mine ? (split.last - cta) / s.tracks + 1 : 0;
  auto slot = [&](int i) {  // 第 i 段的这一行
    return static_cast<int64_t>(2 * (cta + i * s.tracks) + (i == 0 ? 1 : 0)) * s.rows + row;
  };
  float top = -INFINITY, sum = 0.0f;
  for (int i = lane; i < count; i += WARP) top = fmaxf(top, args.part_m[slot(i)]);
  float base = finite_max(warp_max(top));
  int64_t column = blockIdx.z * COMBINE_COLUMNS + lane * 4, left = in.rank - column;
  float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int first = 0; first < count; first += WARP) {
    int i = first + lane, here = count - first < WARP ? count - first : WARP;
    float weight = i < count ? fast_exp2(args.part_m[slot(i)] - base) : 0.0f;
    if (i < count) sum += weight * args.part_l[slot(i)];
#pragma unroll 4
    for (int j = part; j < here; j += parts) {
      float w = __shfl_sync(ALL_LANES, weight, j);
      float4 y = load_columns(args.part + slot(first + j) * in.rank + column, left);
      x.x += w * y.x, x.y += w * y.y, x.z += w * y.z, x.w += w * y.w;
    }
  }
  if (parts > 1) {
    scratch[part * WARP + lane] = x;
    __syncthreads();
    if (part > 0) return;
    for (int p = 1; p < parts; p++) {
      float4 y = scratch[p * WARP + lane];
      x.x += y.x, x.y += y.y, x.z += y.z, x.w += y.w;
    }
  }
  sum = warp_sum(sum);
  float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  const float values[] = {x.x * inverse, x.y * inverse, x.z * inverse, x.w * inverse};
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (mine && e < left)
      store_one(args.o, args.dtype, (split.first + row) * in.rank + column + e, values[e]);
}

__device__ void clear_unseen(const DecodeArgs &args, int64_t token) {
  const dso_mla_inputs &in = args.in;
  if (token >= in.b * in.t) return;
  if (token_seen(in, token)) return;
  int lane = static_cast<int>(threadIdx.x) % WARP;
  int64_t width = in.heads * in.rank;
  for (int64_t i = lane; i < width; i += WARP) store_one(args.o, args.dtype, token * width + i, 0);
}

__global__ __launch_bounds__(COMBINE_THREADS) void mla_decode_combine(DecodeArgs args, int splits,
                                                                      int parts) {
  __shared__ float4 scratch[COMBINE_THREADS];
  int block = static_cast<int>(blockIdx.x), warp = static_cast<int>(threadIdx.x) / WARP;
  constexpr int WARPS = COMBINE_THREADS / WARP;
  if (block < splits)
    combine_row(args, block, static_cast<int>(blockIdx.y) * (WARPS / parts) + warp / parts,
                warp % parts, parts, scratch + warp / parts * parts * WARP);
  else if (blockIdx.y + blockIdx.z == 0)
    clear_unseen(args, static_cast<int64_t>(block - splits) * WARPS + warp);
}

// ---- 主机侧：选路径、划分 ----

bool chunks_ok(const void *data, dso_dtype dtype, int64_t bs, int64_t ts) {
  int64_t each = 16 / bytes_of(dtype);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && bs % each == 0 && ts % each == 0;
}

// 能不能走 mma：16 位的同一种类型，各行都能按 16 字节拷贝。
bool mma_ok(const dso_cuda_mla_decode_params *p) {
  const dso_mla_inputs &in = p->in;
  if (p->dtype == DSO_F32 || in.q_dtype != p->dtype || in.rope_dtype != p->dtype) return false;
  if (in.latent_dtype != p->dtype && !quantized(in.latent_dtype)) return false;
  int64_t each = 16 / bytes_of(in.latent_dtype);
  return in.rank <= 512 && in.rank % each == 0 && in.rope_dim % 8 == 0 && in.nope_dim % 8 == 0 &&
         chunks_ok(in.latent, in.latent_dtype, in.latent_bs, in.latent_ts) &&
         chunks_ok(in.rope, in.rope_dtype, in.rope_bs, in.rope_ts) &&
         chunks_ok(in.q, in.q_dtype, in.q_bs, in.q_ts) && in.q_hs % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p->q_abs) % 16 == 0;
}

template <class E, int RANK, int ROWS>
cudaError_t run_mma(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  Layout<RANK, ROWS> layout(args.in.rope_dim);
  if (bytes) {
    *bytes = layout.bytes;
    return cudaSuccess;
  }
  return launch(mla_decode_kernel<E, RANK, ROWS>, dim3(static_cast<unsigned>(args.schedule.ctas)),
                dim3(Shape<RANK, ROWS>::THREADS), static_cast<size_t>(layout.bytes), stream, args);
}

template <class E, int RANK>
cudaError_t pick_rows(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  switch (args.schedule.rows) {
    case 16:
      return run_mma<E, RANK, 16>(args, bytes, stream);
    case 32:
      return run_mma<E, RANK, 32>(args, bytes, stream);
    default:
      return run_mma<E, RANK, 64>(args, bytes, stream);
  }
}

template <class E>
cudaError_t pick_rank(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  if (args.in.rank <= 128) return pick_rows<E, 128>(args, bytes, stream);
  if (args.in.rank <= 256) return pick_rows<E, 256>(args, bytes, stream);
  return pick_rows<E, 512>(args, bytes, stream);
}

// bytes 不为空时只算共享内存的大小，不启动。
cudaError_t run_mma(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  return args.dtype == DSO_BF16 ? pick_rank<Bf16>(args, bytes, stream)
                                : pick_rank<F16>(args, bytes, stream);
}

enum Path { GENERAL, MMA, WGMMA };

struct Plan {
  DecodeArgs args;
  Path path;
  size_t scratch;
};

int shared_bytes(const Plan &plan) {
  int bytes = 0;
  if (plan.path == WGMMA)
    run_decode_sm90(plan.args, &bytes, nullptr);
  else if (plan.path == MMA)
    run_mma(plan.args, &bytes, nullptr);
  else
    bytes = GeneralLayout(plan.args.in, plan.args.schedule.keys).bytes;
  return bytes;
}

// TMA 一次拷贝 64 个连续的槽位：不分页，各维的步长是正数。
bool tma_ok(const dso_cuda_mla_decode_params *p, const Device &device) {
  const dso_mla_inputs &in = p->in;
  auto strides_ok = [&](int64_t bs, int64_t ts) {
    return (bs > 0 || in.b == 1) && (ts > 0 || in.s == 1);
  };
  return device.major == 9 && device.shared_limit >= SHARED_SM90 && in.latent_dtype == p->dtype &&
         !in.pages && in.s > 0 && in.rank % 8 == 0 && in.rope_dim <= 64 &&
         strides_ok(in.latent_bs, in.latent_ts) &&
         (in.rope_dim == 0 || strides_ok(in.rope_bs, in.rope_ts));
}

// 行数：能一组就一组；几组时分得匀一些，再取够用的最小一档，共享内存放不下就降一档。
void choose_tile(const dso_cuda_mla_decode_params *p, const Device &device, Plan *plan) {
  Schedule &s = plan->args.schedule;
  int64_t most = p->most_rows < 1 ? 1 : p->most_rows, wanted = ceil_div(most, ceil_div(most, 64));
  if (plan->path == GENERAL) {
    s.rows = GENERAL_ROWS, s.keys = GENERAL_KEYS;
    while (s.keys > 1 && shared_bytes(*plan) > device.shared_limit) s.keys /= 2;
    return;
  }
  if (plan->path == WGMMA) {
    s.keys = DECODE_KEYS_SM90;
    for (int rows : DECODE_ROWS_SM90)
      if (s.rows < wanted) s.rows = rows;
    return;
  }
  s.keys = DECODE_KEYS;
  for (int rows : DECODE_ROWS) {
    int old = s.rows;
    s.rows = rows;
    if (old && shared_bytes(*plan) > device.shared_limit) {
      s.rows = old;
      return;
    }
    if (rows >= wanted) return;
  }
}

cudaError_t make_plan(const dso_cuda_mla_decode_params *p, Plan *plan) {
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  *plan = {};
  plan->args.in = p->in, plan->args.q_abs = p->q_abs, plan->args.o = p->o;
  plan->args.dtype = p->dtype;
  plan->path = !mma_ok(p) ? GENERAL : tma_ok(p, device) ? WGMMA : MMA;
  choose_tile(p, device, plan);
  int bytes = shared_bytes(*plan);
  if (bytes > device.shared_limit) return cudaErrorInvalidValue;
  Schedule &s = plan->args.schedule;
  s.minimum_units = DECODE_MIN_UNITS;
  // 单位数的上界只用主机知道的形状；实际的在核里数。
  int64_t groups = ceil_div(p->in.b * p->in.t * p->in.heads, s.rows) + p->in.n_spans;
  int64_t units = groups * ceil_div(p->in.s, s.keys);
  int resident = (device.shared_limit + 1024) / (bytes + 1024);
  int64_t most = ceil_div(units, s.minimum_units);
  s.ctas = device.sms * (resident < 1 ? 1 : resident);
  if (s.ctas > most) s.ctas = most < 1 ? 1 : static_cast<int>(most);
  s.tracks = 1;
  while (s.tracks < DECODE_TRACKS && 2 * s.tracks * s.rows <= p->most_rows + s.rows - 1 &&
         2 * s.tracks <= s.ctas)
    s.tracks *= 2;
  s.ctas -= s.ctas % s.tracks;
  plan->scratch = static_cast<size_t>(2 * s.ctas * s.rows) * static_cast<size_t>(p->in.rank + 2) *
                      sizeof(float) +
                  static_cast<size_t>(s.ctas) * sizeof(Split);
  return cudaSuccess;
}

}  // namespace

cudaError_t dso_cuda_mla_decode_scratch(const dso_cuda_mla_decode_params *p, size_t *bytes) {
  Plan plan;
  cudaError_t error = make_plan(p, &plan);
  *bytes = plan.scratch;
  return error;
}

cudaError_t dso_cuda_mla_decode(const dso_cuda_mla_decode_params *p, void *scratch,
                                cudaStream_t stream) {
  if (p->in.b * p->in.t * p->in.heads == 0) return cudaSuccess;
  Plan plan;
  cudaError_t error = make_plan(p, &plan);
  if (error != cudaSuccess) return error;
  DecodeArgs &args = plan.args;
  const Schedule &s = args.schedule;
  args.part = static_cast<float *>(scratch);
  args.part_m = args.part + 2 * s.ctas * s.rows * args.in.rank;
  args.part_l = args.part_m + 2 * s.ctas * s.rows;
  args.splits = reinterpret_cast<Split *>(args.part_l + 2 * s.ctas * s.rows);
  int splits = args.in.n_spans > 0 ? s.ctas : 0;
  if (splits == 0) {
    // 没有 span：只有清零
  } else if (plan.path == WGMMA) {
    error = run_decode_sm90(args, nullptr, stream);
  } else if (plan.path == MMA) {
    error = run_mma(args, nullptr, stream);
  } else {
    size_t bytes = static_cast<size_t>(shared_bytes(plan));
    error = launch(mla_decode_general, dim3(static_cast<unsigned>(s.ctas)), dim3(GENERAL_THREADS),
                   bytes, stream, args);
  }
  if (error != cudaSuccess) return error;
  constexpr int WARPS = COMBINE_THREADS / WARP;
  int64_t tokens = p->covered ? 0 : ceil_div(args.in.b * args.in.t, WARPS);
  // 一组查询平均分给几个 CTA：多的由几个 warp 分着加。只影响快慢与相加的次序。
  int64_t groups = ceil_div(p->most_rows < 1 ? 1 : p->most_rows, s.rows) * args.in.n_spans;
  int parts = 1;
  while (parts < WARPS && groups * parts * COMBINE_SEGMENTS < s.ctas) parts *= 2;
  dim3 grid(static_cast<unsigned>(splits + tokens),
            static_cast<unsigned>(ceil_div(s.rows, WARPS / parts)),
            static_cast<unsigned>(ceil_div(args.in.rank, COMBINE_COLUMNS)));
  return launch(mla_decode_combine, grid, dim3(COMBINE_THREADS), 0, stream, args, splits, parts);
}
