// mla_decode 的 Hopper 路径，行多（64）：行是查询；第 W 组管第 W 半的列，与每对块里第 W 块的得分。
//
// 一对块（甲、乙）里两组的先后，横线之间同时进行：
//   第 0 组                              第 1 组
//   甲的得分（上一对的乙 · V 还在算）    乙的得分
//   softmax，写出 P 甲                   （等 P 甲）
//   O += P 甲 · V 甲                     O += P 甲 · V 甲，同时做乙的 softmax，写出 P 乙
//   （等 P 乙）O += P 乙 · V 乙          O += P 乙 · V 乙
#pragma once

#include "mla_decode_sm90.cuh"

namespace dso::decode {

template <class E, class S, int W>
struct Many : Consumer<E, S> {
  static constexpr int RANK = S::RANK, ROWS = S::ROWS;
  using Base = Consumer<E, S>;
  using Base::args, Base::in, Base::shared, Base::ring, Base::warp, Base::lane, Base::tile;
  static constexpr int ALL = S::BOXES + 1;

  float o[RANK / 4];
  float l[2];  // 只含自己算的块
  int limit[2];

  __device__ explicit Many(const DecodeArgs &a) : Base(a) {}

  __device__ int line_of(int h) const { return warp * 16 + lane / 4 + 8 * h; }
  __device__ float &top_of(int row) const { return shared.floats[row]; }
  // 旧结果的缩放，两块交替；一段结束时是两组各自的 l。
  __device__ float &keep_of(int turn, int row) const {
    return shared.floats[(1 + turn) * ROWS + row];
  }

  // 在线 softmax：得分变成 P，写出最大值与旧结果的缩放，返回这一块的指数之和（本线程的部分）。
  __device__ void softmax(const Piece &piece, int first, int turn, float (&s)[32],
                          float (&sum)[2]) const {
    float scale = score_scale(in);
    int column = lane % 4 * 2;
    unsigned seen[2];  // 64 个键哪些能用，从本线程的第一列起
#pragma unroll
    for (int half = 0; half < 2; half++)
      seen[half] =
          __ballot_sync(ALL_LANES, this->usable(piece, first + half * WARP + lane)) >> column;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int room = limit[h] - first - column;
      float old = top_of(line_of(h)), top = -INFINITY;
#pragma unroll
      for (int i = 0; i < 16; i++) {
        float &x = s[i / 2 * 4 + 2 * h + i % 2];
        int offset = i / 2 * 8 + i % 2;
        bool ok = offset < room && (seen[i / 8] >> offset % WARP & 1) != 0;
        x = ok ? x * scale : -INFINITY;
        top = fmaxf(top, x);
      }
      top = fmaxf(quad_max(top), old);
      float base = finite_max(top);
#pragma unroll
      for (int i = 0; i < 16; i++) {
        float &x = s[i / 2 * 4 + 2 * h + i % 2];
        x = fast_exp2(x - base);
        sum[h] += x;
      }
      if (lane % 4 == 0)  // quad_max 之后：4 个线程都读过 old
        top_of(line_of(h)) = top, keep_of(turn, line_of(h)) = fast_exp2(old - base);
    }
  }

  // P 写成 [64][64 个键]，盖掉旋转的键；之后组内可以当操作数，另一组等 READY_BARRIER。
  __device__ void publish(Ring at, const float (&s)[32]) const {
    named_barrier_sync(GROUP_BARRIER + W, GROUP);  // 没有 warp 还在读旋转的键
    unsigned char *p = tile(at) + S::BOXES * S::BOX;
#pragma unroll
    for (int i = 0; i < 32; i += 8) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; j++) pairs[j] = E::pack(s[i + 2 * j], s[i + 2 * j + 1]);
      stmatrix_x4(p + swizzled(warp * 16 + lane % 16, i * 2 + lane / 16 * 8), pairs);
    }
    fence_proxy_async();
    named_barrier_arrive(READY_BARRIER + W, S::CONSUMERS);
    named_barrier_sync(GROUP_BARRIER + W, GROUP);
  }

  // 等另一组的 P。
  __device__ void receive(Ring at) const {
    named_barrier_sync(READY_BARRIER + 1 - W, S::CONSUMERS);
#pragma unroll
    for (int box = W * S::HALF; box < (W + 1) * S::HALF; box++) this->wait(at, box);
  }

  // 发出 O = O * 缩放 + P · 块的第 W 半列；sum 是自己算的块的指数之和。
  __device__ void accumulate(const Piece &piece, Ring at, int block, const float (&sum)[2]) {
    if (this->clean(piece, at, piece.key_begin + block * S::KEYS, W * S::HALF, S::HALF)) {
      fence_proxy_async();
      named_barrier_sync(GROUP_BARRIER + W, GROUP);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float keep = keep_of(block % 2, line_of(h));
      l[h] = l[h] * keep + sum[h];
#pragma unroll
      for (int i = 0; i < RANK / 8; i++) o[i / 2 * 4 + 2 * h + i % 2] *= keep;
    }
    uint64_t values = uniform(mn_major(tile(at) + W * S::HALF * S::BOX, S::BOX));
    uint64_t p = uniform(k_major(tile(at) + S::BOXES * S::BOX));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < S::KEYS; k += 16)
      wgmma<Base::BF16, 0, 1>(o, advance(p, k * 2), advance(values, k * BOX_ROW), true);
    wgmma_commit();
  }

  // 至多还有 LEFT 组没有完成时，O 已经算到 at 这一块：放行它。
  template <int LEFT>
  __device__ void retire(Ring at) {
    wgmma_wait<LEFT>();
    wgmma_settle(o);
    this->release(at, W);
    this->release(at, TAIL);
  }

  // 自己的一块：得分算完之后的 softmax；之后 publish。
  __device__ void weigh(const Piece &piece, int block, float (&s)[32], float (&sum)[2]) {
    wgmma_settle(s);
    sum[0] = sum[1] = 0.0f;
    softmax(piece, piece.key_begin + block * S::KEYS, W, s, sum);
  }

  // 两组各自的循环：一条 wgmma 没有完成时不经过分支（编译器会把它们排成串行），所以最后一对单独写。
  __device__ void attend_first(const Piece &piece) {
    const float none[2] = {0.0f, 0.0f};
    float s[32], sum[2];
    int block = 0;
    this->template score<0, ALL>(ring, s);
    wgmma_wait<0>();
    for (; block + 2 < piece.units; block += 2) {
      const Ring second = ring.next(S::STAGES), third = second.next(S::STAGES);
      weigh(piece, block, s, sum);
      publish(ring, s);
      accumulate(piece, ring, block, sum);
      retire<0>(ring);
      receive(second);
      accumulate(piece, second, block + 1, none);
      this->template score<0, S::HALF>(third, s);
      retire<1>(second);  // 得分的后一半可能还没有到：不让这一级跟着等
      this->template score<S::HALF, ALL>(third, s);
      wgmma_wait<0>();
      ring = third;
    }
    weigh(piece, block, s, sum);
    publish(ring, s);
    accumulate(piece, ring, block, sum);
    retire<0>(ring);
    ring = ring.next(S::STAGES);
    if (block + 1 < piece.units) {
      receive(ring);
      accumulate(piece, ring, block + 1, none);
      retire<0>(ring);
      ring = ring.next(S::STAGES);
    }
  }

  __device__ void attend_second(const Piece &piece) {
    const float none[2] = {0.0f, 0.0f};
    float s[32], sum[2];
    int block = 0;
    for (; block + 1 < piece.units; block += 2) {
      const Ring second = ring.next(S::STAGES);
      this->template score<0, ALL>(second, s);
      wgmma_wait<0>();
      wgmma_settle(s);  // 没有完成的 wgmma 不跨过下面的分支，只跨过 softmax
      receive(ring);
      accumulate(piece, ring, block, none);
      weigh(piece, block + 1, s, sum);
      retire<0>(ring);
      publish(second, s);
      accumulate(piece, second, block + 1, sum);
      retire<0>(second);
      ring = second.next(S::STAGES);
    }
    if (block < piece.units) {
      receive(ring);
      accumulate(piece, ring, block, none);
      retire<0>(ring);
      ring = ring.next(S::STAGES);
    }
  }

  __device__ void finish(const Piece &piece) {
    named_barrier_sync(CONSUMERS_BARRIER, S::CONSUMERS);  // 都读过最后的缩放
#pragma unroll
    for (int h = 0; h < 2; h++) {
      l[h] = quad_sum(l[h]);
      if (lane % 4 == 0) keep_of(W, line_of(h)) = l[h];
    }
    named_barrier_sync(CONSUMERS_BARRIER, S::CONSUMERS);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int row = line_of(h);
      float total = keep_of(0, row) + keep_of(1, row);
      if (!piece.whole && W == 0 && lane % 4 == 0)
        args.part_m[this->part_at(piece, row)] = top_of(row),
                                         args.part_l[this->part_at(piece, row)] = total;
      auto to = Base::row_of(piece, row, W * RANK / 2 + lane % 4 * 2, total);
#pragma unroll
      for (int i = 0; i < RANK / 4; i += 4) to.write_pair(i * 2, o[i + 2 * h], o[i + 2 * h + 1]);
    }
    named_barrier_sync(CONSUMERS_BARRIER, S::CONSUMERS);  // 下一段要重写 floats
  }

  __device__ void run(const Piece &piece) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      l[h] = 0.0f, limit[h] = row_limit(args, piece, Base::of_group(line_of(h)));
      if (W == 0 && lane % 4 == 0) top_of(line_of(h)) = -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < RANK / 4; i++) o[i] = 0.0f;
    this->load_queries(piece);
    if constexpr (W == 0)
      attend_first(piece);
    else
      attend_second(piece);
    finish(piece);
  }
};

}  // namespace dso::decode
