// mla_decode 的 Hopper 路径，行多（64）：行是查询；第 W 组管第 W 半的列，与每对块里第 W 块的得分。
//
// 一对块（甲、乙）里两组的先后，同一行的同时进行：
//   第 0 组                              第 1 组
//   甲的得分（上一对的乙 · V 还在算）    （等第 0 组发完得分）
//   softmax，写出 P 甲                   乙的得分
//   O += P 甲 · V 甲                     O += P 甲 · V 甲，同时做乙的 softmax，写出 P 乙
//   （等 P 乙）O += P 乙 · V 乙          O += P 乙 · V 乙
// 账（r = 512，每个 SM 每周期 2048 次乘加、共享内存 128 字节；一对块的周期）：得分 2 x 1152，P · V 4 x 512，共 4352；
// 共享内存读写 4608（自己的 P 也从那里读就是 4736）。得分不排先后时两组同时算完，甲的 softmax 与缩放 O（约 600 条指令）
// 没有矩阵乘可以重叠，一对约 5000；排了先后约 4700，接近共享内存的限度。
#pragma once

#include "mla_decode_sm90.cuh"

namespace dso::decode {

template <class E, class S, int W>
struct Many : Consumer<E, S> {
  static constexpr int RANK = S::RANK, ROWS = S::ROWS;
  using Base = Consumer<E, S>;
  using Base::args, Base::in, Base::shared, Base::ring, Base::warp, Base::lane, Base::tile;
  static constexpr int ALL = S::BOXES + 1;

  using Fragments = uint32_t[4][4];  // P：各 16 个键的 A 片段

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

  // P 写成 [64][64 个键]，盖掉旋转的键，另一组等 READY_BARRIER；自己的乘法用寄存器里的 p。
  __device__ void publish(Ring at, const float (&s)[32], Fragments &p) const {
    named_barrier_sync(GROUP_BARRIER + W, GROUP);  // 没有 warp 还在读旋转的键
    // 块从 1024 字节对齐处起，往后 16 列就是整个偏移异或 32：四个地址不必各占一个寄存器。
    const int to =
        at.stage * S::STAGE + S::BOXES * S::BOX + swizzled(warp * 16 + lane % 16, lane / 16 * 8);
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int j = 0; j < 4; j++) p[i][j] = E::pack(s[i * 8 + 2 * j], s[i * 8 + 2 * j + 1]);
      stmatrix_x4(shared.stages + (to ^ i * 32), p[i]);
    }
    fence_proxy_async();
    named_barrier_arrive(READY_BARRIER + W, S::CONSUMERS);
  }

  // 等另一组的 P。
  __device__ void receive(Ring at) const {
    named_barrier_sync(READY_BARRIER + 1 - W, S::CONSUMERS);
#pragma unroll
    for (int box = W * S::HALF; box < (W + 1) * S::HALF; box++) this->wait(at, box);
  }

  // O 乘上缩放，块的第 W 半列当值用；sum 是自己算的块的指数之和。之后由下面两种之一发出 O += P · V。
  __device__ uint64_t rescale(const Piece &piece, Ring at, int block, const float (&sum)[2]) {
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
    return uniform(mn_major(tile(at) + W * S::HALF * S::BOX, S::BOX));
  }

  // 自己的一块：P 在寄存器里，少读 8 KiB 共享内存，也不必等组内都写完。
  __device__ void accumulate_own(const Piece &piece, Ring at, int block, const Fragments &p,
                                 const float (&sum)[2]) {
    uint64_t values = rescale(piece, at, block, sum);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < S::KEYS / 16; k++)
      wgmma<Base::BF16, 1>(o, p[k], advance(values, k * 16 * BOX_ROW), true);
    wgmma_commit();
  }

  // 另一组的一块：P 在共享内存里。
  __device__ void accumulate_other(const Piece &piece, Ring at, int block) {
    const float none[2] = {0.0f, 0.0f};
    uint64_t values = rescale(piece, at, block, none);
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

  // 第 0 组发完一块的得分就报到，第 1 组才发自己的。
  __device__ void pass_turn() const { named_barrier_arrive(TURN_BARRIER, S::CONSUMERS); }
  __device__ void take_turn() const { named_barrier_sync(TURN_BARRIER, S::CONSUMERS); }

  // 两组各自的循环：一条 wgmma 没有完成时不经过分支（编译器会把它们排成串行），所以最后一对单独写。
  __device__ void attend_first(const Piece &piece) {
    float s[32], sum[2];
    Fragments p;
    int block = 0;
    this->template score<0, ALL>(ring, s);
    pass_turn();
    wgmma_wait<0>();
    for (; block + 2 < piece.units; block += 2) {
      const Ring second = ring.next(S::STAGES), third = second.next(S::STAGES);
      weigh(piece, block, s, sum);
      publish(ring, s, p);
      accumulate_own(piece, ring, block, p, sum);
      retire<0>(ring);
      receive(second);
      accumulate_other(piece, second, block + 1);
      this->template score<0, S::HALF>(third, s);
      retire<1>(second);  // 得分的后一半可能还没有到：不让这一级跟着等
      this->template score<S::HALF, ALL>(third, s);
      pass_turn();
      wgmma_wait<0>();
      ring = third;
    }
    weigh(piece, block, s, sum);
    publish(ring, s, p);
    accumulate_own(piece, ring, block, p, sum);
    retire<0>(ring);
    ring = ring.next(S::STAGES);
    if (block + 1 < piece.units) {
      receive(ring);
      accumulate_other(piece, ring, block + 1);
      retire<0>(ring);
      ring = ring.next(S::STAGES);
    }
  }

  __device__ void attend_second(const Piece &piece) {
    float s[32], sum[2];
    Fragments p;
    int block = 0;
    for (; block + 1 < piece.units; block += 2) {
      const Ring second = ring.next(S::STAGES);
      take_turn();
      this->template score<0, ALL>(second, s);
      wgmma_wait<0>();
      wgmma_settle(s);  // 没有完成的 wgmma 不跨过下面的分支，只跨过 softmax
      receive(ring);
      accumulate_other(piece, ring, block);
      weigh(piece, block + 1, s, sum);
      publish(second, s, p);
      retire<0>(ring);
      accumulate_own(piece, second, block + 1, p, sum);
      retire<0>(second);
      ring = second.next(S::STAGES);
    }
    if (block < piece.units) {
      take_turn();  // 报到的次数与第 0 组一样
      receive(ring);
      accumulate_other(piece, ring, block);
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
