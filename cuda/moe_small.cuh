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
template <class E, Kind K, int NT, int SETS, int AHEAD>
struct Stream {
  using S = Step<K>;
  using M = Multiply<E, K, NT, SETS>;
  static_assert(AHEAD % S::per_group == 0, "一圈是整数个组");

  Rows rows[SETS];        // 这一圈第一步，本线程的那一段
  const uint16_t *x[NT];  // 同样，第 8 t + lane / 4 个词元
  int first, count;       // 本线程的第一个 k；几个整步
  bool partial;           // 其后还有不满的一步
  bool zeros;             // 有零点
  int rest;               // 那一步里本线程还剩几个 k
  Words<S::words> w[AHEAD][SETS][2];
  Group group[AHEAD][SETS];
  float acc[SETS][NT][4] = {};

  // 从第 begin 步（per_group 的倍数）起 steps 步，共 depth 个 k；开始读权重。
  __device__ __forceinline__ Stream(const Rows (&from)[SETS], int begin, int steps, int depth) {
    int c = static_cast<int>(threadIdx.x) % 4;
    first = begin * S::k + lane_offset<K>(c);
    partial = steps > 0 && (begin + steps) * S::k > depth;
    count = steps - (partial ? 1 : 0), rest = depth - first - count * S::k;
    zeros = S::int4 && from[0].zero[0];
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
    for (int t = 0; t < NT; t++) x[t] = tokens[t] + first;
    int done = 0;
    for (; lap(done); done += AHEAD) advance();
    if (partial) last_step(count - done);
  }

 private:
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
        return *reinterpret_cast<const Words<S::x_words> *>(x[t] + u * S::k + at);
      });
      fetch(u, AHEAD + u, done + AHEAD + u < count);
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
      Words<S::x_words> in = {};
      if (from < rest) in = *reinterpret_cast<const Words<S::x_words> *>(x[t] + at * S::k + from);
      return in;
    });
  }
};

}  // namespace dso::small
