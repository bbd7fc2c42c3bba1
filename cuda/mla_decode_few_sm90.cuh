// mla_decode 的 Hopper 路径，行少（8、16、32）：列是查询，行是键（得分）或潜变量的列（输出）。
#pragma once

#include "mla_decode_sm90.cuh"

namespace dso::decode {

template <class E, class S>
struct Few : Consumer<E, S> {
  static constexpr int ROWS = S::ROWS;
  using Base = Consumer<E, S>;
  using Base::args, Base::in, Base::shared, Base::ring, Base::warp, Base::lane, Base::tile;
  using Base::queries;

  static constexpr int COLUMNS = ROWS / 4;  // 一个线程有几列查询
  float o[S::BOXES][ROWS / 2];
  float m[COLUMNS], l[COLUMNS];
  int limit[COLUMNS];

  __device__ explicit Few(const DecodeArgs &a) : Base(a) {}

  // 线程的第 i 列是哪个查询；它的两个键的得分在 s[value_of(i)]、s[value_of(i) + 2]。
  __device__ int query_of(int i) const { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
  __device__ static constexpr int value_of(int i) { return i / 2 * 4 + i % 2; }

  // 在同一列的 8 个线程之间；跨 warp 的由 reduce 交换。
  template <class Combine>
  __device__ void reduce_columns(float (&x)[COLUMNS], Combine combine) {
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
      for (int step = 4; step < WARP; step *= 2)
        x[i] = combine(x[i], __shfl_xor_sync(ALL_LANES, x[i], step));
      if (lane < 4) shared.floats[warp * ROWS + query_of(i)] = x[i];
    }
    named_barrier_sync(GROUP_BARRIER, GROUP);
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      x[i] = shared.floats[query_of(i)];
#pragma unroll
      for (int w = 1; w < GROUP / WARP; w++)
        x[i] = combine(x[i], shared.floats[w * ROWS + query_of(i)]);
    }
  }

  // 得分变成 P（不写回共享内存），旧的输出乘上缩放。
  __device__ void softmax(const Piece &piece, int first, float (&s)[ROWS / 2]) {
    float scale = score_scale(in), top[COLUMNS];
    int index[2];
    bool seen[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      index[h] = first + warp * 16 + lane / 4 + 8 * h;
      seen[h] = this->usable(piece, index[h]);
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float &x = s[value_of(i) + 2 * h];
        x = seen[h] && index[h] < limit[i] ? x * scale : -INFINITY;
      }
      top[i] = fmaxf(s[value_of(i)], s[value_of(i) + 2]);
    }
    reduce_columns(top, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      float next = fmaxf(m[i], top[i]), base = finite_max(next), keep = fast_exp2(m[i] - base);
      float &a = s[value_of(i)], &b = s[value_of(i) + 2];
      a = fast_exp2(a - base), b = fast_exp2(b - base);
      m[i] = next, l[i] = l[i] * keep + (a + b);
#pragma unroll
      for (int box = 0; box < S::BOXES; box++)
        o[box][value_of(i)] *= keep, o[box][value_of(i) + 2] *= keep;
    }
  }

  // 转置着写成一块 [ROWS][64]：第 warp 个 16 行是它的 16 列。
  __device__ void store_transposed(unsigned char *to, const float (&x)[ROWS / 2]) const {
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += 4) {
      uint32_t pairs[2] = {E::pack(x[i], x[i + 1]), E::pack(x[i + 2], x[i + 3])};
      stmatrix_x2_trans(to + swizzled(i * 2 + lane % 8, warp * 16 + lane / 8 % 2 * 8), pairs);
    }
  }

  __device__ void accumulate() {
    uint64_t values = uniform(mn_major(tile(ring), S::BOX));
    uint64_t p = uniform(k_major(tile(ring) + S::BOXES * S::BOX));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < S::KEYS; k += 16)
#pragma unroll
      for (int box = 0; box < S::BOXES; box++)
        wgmma<Base::BF16, 1, 0>(o[box], advance(values, box * S::BOX + k * BOX_ROW),
                                advance(p, k * 2), true);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int box = 0; box < S::BOXES; box++) wgmma_settle(o[box]);
  }

  // 归一化之后的 16 位结果已放在查询的位置上（同样的布局）：写出去，一次 16 字节。
  __device__ void copy_out(const Lines &lines) const {
    const int rank = static_cast<int>(in.rank), count = min_of(lines.count, ROWS);
    auto *to = static_cast<uint16_t *>(args.o) + lines.first * rank;
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.x); i < count * S::BOXES * 8; i += GROUP) {
      const int row = i / (S::BOXES * 8), chunk = i % (S::BOXES * 8);
      if (chunk * 8 >= rank) continue;
      *reinterpret_cast<uint4 *>(to + static_cast<int64_t>(row) * rank + chunk * 8) =
          *reinterpret_cast<const uint4 *>(queries + chunk / 8 * S::QUERY_BOX +
                                           swizzled(row, chunk % 8 * 8));
    }
  }

  __device__ void finish(const Piece &piece) {
    reduce_columns(l, [](float a, float b) { return a + b; });
    const auto lines = lines_of<S>(args, piece);
    if (piece.whole) {  // 之后没有 warp 还在读查询：结果放在它的位置上，转过来再写
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) {
        const float inverse = inverse_of(l[i]);
#pragma unroll
        for (int box = 0; box < S::BOXES; box++)
          o[box][value_of(i)] *= inverse, o[box][value_of(i) + 2] *= inverse;
      }
#pragma unroll
      for (int box = 0; box < S::BOXES; box++)
        store_transposed(queries + box * S::QUERY_BOX, o[box]);
      named_barrier_sync(GROUP_BARRIER, GROUP);
      copy_out(lines);
    } else {
      const int column = warp * 16 + lane / 4, room = static_cast<int>(in.rank) - column;
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) {
        const int row = query_of(i);
        if (row >= lines.count) continue;
        if (warp == 0 && lane < 4)
          args.part_m[this->part_at(piece, row)] = m[i],
                                           args.part_l[this->part_at(piece, row)] = l[i];
        float *to = this->part_of(piece, row, column);
#pragma unroll
        for (int box = 0; box < S::BOXES; box++)
#pragma unroll
          for (int h = 0; h < 2; h++)
            if (const int offset = box * BOX_COLUMNS + 8 * h; offset < room)
              to[offset] = o[box][value_of(i) + 2 * h];
      }
    }
    fence_proxy_async();  // 结果放过的位置，下一段由 TMA 写
    this->release_queries();
    named_barrier_sync(GROUP_BARRIER, GROUP);  // 下一段要重写 floats
  }

  __device__ void run(const Piece &piece) {
    const int mine = lane < ROWS ? row_limit(args, piece, lane) : 0;  // 要除：一个线程算一行
#pragma unroll
    for (int i = 0; i < COLUMNS; i++)
      m[i] = -INFINITY, l[i] = 0.0f, limit[i] = __shfl_sync(ALL_LANES, mine, query_of(i));
#pragma unroll
    for (int box = 0; box < S::BOXES; box++)
#pragma unroll
      for (int i = 0; i < ROWS / 2; i++) o[box][i] = 0.0f;
    this->wait_queries();
    for (int block = 0; block < piece.units; block++) {
      int first = piece.key_begin + block * S::KEYS;
      float s[ROWS / 2];
      this->score(ring, s);
      wgmma_wait<0>();
      wgmma_settle(s);
      softmax(piece, first, s);  // 其中的屏障之后，没有 warp 还在读旋转的键
      store_transposed(tile(ring) + S::BOXES * S::BOX, s);
      this->clean(piece, ring, first);
      fence_proxy_async();
      named_barrier_sync(GROUP_BARRIER, GROUP);
      accumulate();
      for (int part = 0; part < PARTS; part++) this->release(ring, part);
      ring = ring.next(S::STAGES);
    }
    finish(piece);
  }
};

}  // namespace dso::decode
