// moe_experts 词元少的两个核（moe_small.cu、moe_direct.cu）共用：一块行、一份权重、沿 K 的累加。
//
// 受限于读权重的带宽，所以权重不经过共享内存，直接从显存读成 mma 的左操作数：权重是 mma 的 M，词元是 N。
#pragma once

#include <assert.h>

#include "config.cuh"
#include "moe_experts.cuh"
#include "moe_small_codes.cuh"

namespace dso::small {

// 不排序（tile_rows 为 0）：每个 slot 自己一块，行就是 slot；共享专家每个词元一块。
__device__ __forceinline__ dso_cuda_moe_tile tile_at(const dso_cuda_moe_routing &r, int i) {
  if (r.tile_rows > 0) return r.tiles[i];
  int slots = static_cast<int>(r.tokens * r.top_k);
  int64_t e = i < slots ? r.index[i] : r.experts;
  assert(e >= 0);
  bool real = e < r.experts || i >= slots;
  return {static_cast<int32_t>(real ? e : r.experts), i, real, 0};
}

__device__ __forceinline__ int token_of(const dso_cuda_moe_routing &r, int row) {
  if (r.tile_rows > 0) return r.token[row];
  int slots = static_cast<int>(r.tokens * r.top_k);
  return row < slots ? row / static_cast<int>(r.top_k) : row - slots;
}

// 一个权重矩阵从第 0 行起的码、尺度、零点。
struct Source {
  const unsigned char *weight;
  const float *scale;
  const uint8_t *zero;
  int64_t row_bytes, groups;

  // 一行里从 4 的倍数起的四组尺度、零点可以一次读。
  __device__ __forceinline__ bool wide() const {
    return groups % 4 == 0 && reinterpret_cast<uintptr_t>(scale) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(zero) % 4 == 0;
  }
};

template <Kind K>
__device__ __forceinline__ Source source_of(const dso_mat &w, const dso_quant &quant) {
  return {static_cast<const unsigned char *>(w.data), quant.scale, quant.zero,
          w.rs * (K == PLAIN ? 2 : 1), quant.groups};
}

// 一份 16 行：片段里的第 g 行（上）、第 g + 8 行（下）从 k = 0 起。
struct Rows {
  const unsigned char *weight[2];
  const float *scale[2];
  const uint8_t *zero[2];

  __device__ __forceinline__ void put(int side, const Source &from, int row) {
    weight[side] = from.weight + row * from.row_bytes;
    scale[side] = from.scale + row * from.groups;
    zero[side] = from.zero ? from.zero + row * from.groups : nullptr;
  }
};

// 一个 warp 沿 K 的累加：SETS 份 16 行权重，NT 份 8 个词元。总有 AHEAD 步的读在途：用掉一步，随即读后面的一步。
//
// L1 按次序返回：读 x 命中了，也要排在前面还没到的权重之后，用时才读就每一步都等一次显存，在途的其实只有一步。所以放得下时
// x 与权重一起提前读（HELD）；ONE（只有一个词元）：x 一圈读一次，一个线程 8 个 k，用时在 warp 里交换。
template <class E, Kind K, int NT, int SETS, int AHEAD, bool ONE = false>
struct Stream {
  using S = Step<K>;
  using M = Multiply<E, K, NT, SETS>;
  static_assert(AHEAD % S::per_group == 0, "一圈是整数个组");
  static constexpr int CHUNK = 8, STEP_CHUNKS = S::k / CHUNK;
  // x 每段（8 个 k）每份 4 个寄存器，在途的几步都要留着：每步至多两段。
  static constexpr int PIECES = S::lane_k / CHUNK;
  static constexpr bool HELD = !S::int4 && !ONE && NT * PIECES <= 2;
  static_assert(!ONE || (NT == 1 && S::x_words == 4 && AHEAD * STEP_CHUNKS <= WARP),
                "一次正好用一段，一圈每个线程至多一段");

  Rows rows[SETS];        // 这一圈第一步，本线程的那一段
  const uint16_t *x[NT];  // 同样，第 8 t + lane / 4 个词元
  int first, count;       // 本线程的第一个 k；几个整步
  bool partial;           // 其后还有不满的一步
  bool zeros;             // 有零点
  int rest;               // 那一步里本线程还剩几个 k
  Words<S::words> w[AHEAD][SETS][2];
  Group group[AHEAD][SETS];
  float acc[SETS][NT][4] = {};
  int left;  // ONE：这一圈里本线程的一段距一行的末尾几个 k
  Words<4> held;
  Words<S::x_words> ahead[HELD ? AHEAD : 1][NT][PIECES];  // HELD：与 w 同在途的 x

  // 从第 begin 步（per_group 的倍数）起 steps 步，共 depth 个 k；开始读权重。
  __device__ __forceinline__ Stream(const Rows (&from)[SETS], int begin, int steps, int depth) {
    int c = static_cast<int>(threadIdx.x) % 4;
    first = begin * S::k + lane_offset<K>(c);
    partial = steps > 0 && (begin + steps) * S::k > depth;
    count = steps - (partial ? 1 : 0), rest = depth - first - count * S::k;
    zeros = S::int4 && from[0].zero[0];
    left = depth - begin * S::k - lane() * CHUNK;
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
      for (int side = 0; side < 2; side++) {
        rows[s].weight[side] = from[s].weight[side] + begin * S::row_bytes + c * 4 * S::words;
        rows[s].scale[side] = from[s].scale[side] + begin / S::per_group;
        rows[s].zero[side] = zeros ? from[s].zero[side] + begin : nullptr;
      }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) fetch(u, u, u < count);
  }

  // tokens [t]：第 8 t + lane / 4 个词元的一行；没有的给哪一行都可以，那一列不用。
  __device__ __forceinline__ void run(const uint16_t *const (&tokens)[NT]) {
#pragma unroll
    for (int t = 0; t < NT; t++)
      x[t] = tokens[t] + (ONE ? first - lane_offset<K>(lane() % 4) + lane() * CHUNK : first);
    if (ONE) hold(0);
#pragma unroll
    for (int u = 0; u < AHEAD; u++) fetch_x(u, u, u < count);
    int done = 0;
    for (; lap(done); done += AHEAD) advance();
    if (partial) last_step(count - done);
  }

 private:
  __device__ static __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % WARP; }

  // 从这一圈的第 from 个 k 起的一圈 x；越过一行的是 0。
  __device__ __forceinline__ void hold(int from) {
    held = {};
    load_once(held, x[0] + from, from < left);
  }

  // 这一圈第 step 步里，本线程从第 at 个 k 起的一段。
  __device__ __forceinline__ Words<S::x_words> exchanged(int step, int at) const {
    int from = step * STEP_CHUNKS + (lane_offset<K>(lane() % 4) + at) / CHUNK;
    Words<S::x_words> r;
#pragma unroll
    for (int i = 0; i < S::x_words; i++) r.v[i] = __shfl_sync(ALL_LANES, held.v[i], from);
    return r;
  }

  // 第 at 步（从这一圈的第一步数）读进第 u 格。
  __device__ __forceinline__ void fetch(int u, int at, bool valid) {
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
      for (int side = 0; side < 2; side++) {
        load_once(w[u][s][side], rows[s].weight[side] + at * S::row_bytes, valid);
        fetch_group(group[u][s], s, side, at / S::per_group, valid);
      }
  }

  __device__ __forceinline__ void fetch_x(int u, int at, bool valid) {
    if constexpr (HELD) {
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int i = 0; i < PIECES; i++)
          if (valid)
            ahead[u][t][i] =
                *reinterpret_cast<const Words<S::x_words> *>(x[t] + at * S::k + i * CHUNK);
    }
  }

  __device__ __forceinline__ void fetch_group(Group &to, int s, int side, int at, bool valid) {
    if (S::grouped) load_if(to.scale[side], rows[s].scale[side] + at, valid);
    if (S::int4) load_if(to.zero[side], rows[s].zero[side] + at, valid && zeros);
  }

  // 一圈；正好走满时为真。每一步都判断：没有分支时 ptxas 把一圈的读都移到末尾，在途的读就断了。
  __device__ __forceinline__ bool lap(int done) {
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      if (done + u >= count) return false;
      M::step(acc, w[u], group[u], [&](int t, int at) {
        if constexpr (ONE) return exchanged(u, at);
        if constexpr (HELD) return ahead[u][t][at / CHUNK];
        return *reinterpret_cast<const Words<S::x_words> *>(x[t] + u * S::k + at);
      });
      if (ONE && u == AHEAD - 1) hold(AHEAD * S::k);
      fetch(u, AHEAD + u, done + AHEAD + u < count);
      fetch_x(u, AHEAD + u, done + AHEAD + u < count);
    }
    return true;
  }

  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
      for (int side = 0; side < 2; side++) {
        rows[s].weight[side] += AHEAD * S::row_bytes;
        if (S::grouped) rows[s].scale[side] += AHEAD / S::per_group;
        if (zeros) rows[s].zero[side] += AHEAD;
      }
#pragma unroll
    for (int t = 0; t < NT; t++) x[t] += AHEAD * S::k;
    left -= AHEAD * S::k;
  }

  // 不满的一步（从这一圈的第一步数是第 at 步）：越过的 k 的 x 是 0；16 位与一个码一字节的权重也只有 depth 个，
  // 越过的不读，int4 的补齐到组。
  __device__ __forceinline__ void last_step(int at) {
    Words<S::words> tail[SETS][2];
    Group last[SETS];
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
      for (int side = 0; side < 2; side++) {
        tail[s][side] = {};
        load_once(tail[s][side], rows[s].weight[side] + at * S::row_bytes, S::int4 || rest > 0);
        fetch_group(last[s], s, side, at / S::per_group, true);
      }
    M::step(acc, tail, last, [&](int t, int from) {
      if constexpr (ONE) return exchanged(at, from);
      Words<S::x_words> in = {};
      if (from < rest) in = *reinterpret_cast<const Words<S::x_words> *>(x[t] + at * S::k + from);
      return in;
    });
  }
};

// int4、至多 8 个词元时一个 warp 的累加：x 已搬进共享内存，尺度、零点四组一起读。
//
// 直接读的 x 每一步都等一次显存，见 Stream。L1 一周期查一行：尺度每一步都读，16 行就查 16 次，与权重本身一样多。
constexpr int LOG_QUAD = 2, QUAD = 1 << LOG_QUAD;

template <class E, Kind K, int AHEAD>
struct CodeStream {
  using S = Step<K>;
  static constexpr int QUADS = AHEAD / QUAD;
  static_assert(S::int4 && AHEAD % QUAD == 0, "一圈是整数个四组");

  Rows rows;         // 这一圈第一步，本线程的那一段
  int left;          // 从这一圈起还有几步
  bool wide, zeros;  // 四组的尺度、零点可以一次读；有零点
  Words<S::words> w[AHEAD][1][2];
  Words<QUAD> scale[QUADS][2];
  uint32_t zero[QUADS][2];
  float acc[1][1][4] = {};

  // 从第 begin 步（QUAD 的倍数）起 steps 步；开始读权重。
  __device__ __forceinline__ CodeStream(const Rows &from, bool wide, int begin, int steps)
      : left(steps), wide(wide), zeros(from.zero[0]) {
    int c = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
    for (int side = 0; side < 2; side++) {
      rows.weight[side] = from.weight[side] + begin * S::row_bytes + c * 4 * S::words;
      rows.scale[side] = from.scale[side] + begin;
      rows.zero[side] = zeros ? from.zero[side] + begin : nullptr;
#pragma unroll
      for (int q = 0; q < QUADS; q++) zero[q][side] = 0x08080808u;
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      if (u % QUAD == 0) fetch_quad(u / QUAD, u);
      fetch(u, u);
    }
  }

  // 再走 laps 圈，每圈 AHEAD 步。x：共享内存里第 lane / 4 个词元，本线程的第一个 k；越过一行的是 0。
  __device__ __forceinline__ void run(const uint16_t *x, int laps) {
    for (; laps > 0 && left > 0; laps--) {
      lap(x);
      left -= AHEAD, x += AHEAD * S::k;
#pragma unroll
      for (int side = 0; side < 2; side++) {
        rows.weight[side] += AHEAD * S::row_bytes, rows.scale[side] += AHEAD;
        if (zeros) rows.zero[side] += AHEAD;
      }
    }
  }

 private:
  // 第 at 步（从这一圈的第一步数）读进第 u 格。
  __device__ __forceinline__ void fetch(int u, int at) {
#pragma unroll
    for (int side = 0; side < 2; side++)
      load_once(w[u][0][side], rows.weight[side] + at * S::row_bytes, at < left);
  }

  // 从第 at 步起的四组读进第 q 格。
  __device__ __forceinline__ void fetch_quad(int q, int at) {
    if (at >= left) return;
#pragma unroll
    for (int side = 0; side < 2; side++) {
      const float *from = rows.scale[side] + at;
      if (wide) {
        scale[q][side] = *reinterpret_cast<const Words<QUAD> *>(from);
      } else {
#pragma unroll
        for (int i = 0; i < QUAD; i++)
          if (at + i < left) scale[q][side].v[i] = __float_as_uint(from[i]);
      }
      if (zeros) zero[q][side] = zero_quad(rows.zero[side] + at, left - at);
    }
  }

  __device__ __forceinline__ uint32_t zero_quad(const uint8_t *from, int count) const {
    if (wide) return *reinterpret_cast<const uint32_t *>(from);
    uint32_t all = 0;
#pragma unroll
    for (int i = 0; i < QUAD; i++)
      if (i < count) all |= static_cast<uint32_t>(from[i]) << (8 * i);
    return all;
  }

  // 每一步都判断：见 Stream::lap。
  __device__ __forceinline__ void lap(const uint16_t *x) {
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      if (u >= left) return;
      Group group[1];
#pragma unroll
      for (int side = 0; side < 2; side++) {
        group[0].scale[side] = __uint_as_float(scale[u / QUAD][side].v[u % QUAD]);
        group[0].zero[side] = zero[u / QUAD][side] >> (8 * (u % QUAD));
      }
      Multiply<E, K, 1, 1>::step(acc, w[u], group, [&](int, int at) {
        return *reinterpret_cast<const Words<S::x_words> *>(x + u * S::k + at);
      });
      fetch(u, AHEAD + u);
      if (u % QUAD == QUAD - 1) fetch_quad(u / QUAD, AHEAD + u / QUAD * QUAD);
    }
  }
};

}  // namespace dso::small
