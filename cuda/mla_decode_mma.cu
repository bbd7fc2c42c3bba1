// mla_decode 的 sm_80 路径：cp.async 两级流水，mma 累加。
//
// 一块 32 个键读进共享内存一次，既当键又当值：
//   S [ROWS, 32] = Q [ROWS, r + dr] · 块ᵀ，WARPS_N 个 warp 各算 8 个键；
//   P 经共享内存交换之后，O [ROWS, r] += P · 块的前 r 列，每个 warp 管 r / WARPS 列。
// 量化的潜变量先原样拷进它那一行的后半，再由一个 warp 就地展开成 16 位。
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
  grid_wait();
  Attend<E, RANK, ROWS> attend(args);
  each_piece(args, static_cast<int>(blockIdx.x), threadIdx.x == 0,
             [&](const Piece &piece) { attend.run(piece); });
}

// ---- 主机侧 ----

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
  switch (args.schedule.rows()) {
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

}  // namespace

cudaError_t dso::run_decode_mma(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  return args.dtype == DSO_BF16 ? pick_rank<Bf16>(args, bytes, stream)
                                : pick_rank<F16>(args, bytes, stream);
}
