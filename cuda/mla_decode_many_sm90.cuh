// mla_decode 的 Hopper 路径，行多（64）：行是查询；一次一对块，第 w 组管第 w 块的得分与 P、两块的第 w 半的列。
//
// 一对块（甲、乙）里两组错开：一组在算 softmax 时，张量核心上是另一组的乘法。
//   第 0 组：甲的得分，定下基准；P 先写进共享内存（盖掉甲的旋转的键），再 O += P · V；等到乙的 P，O += 乙的 P · V。
//   第 1 组：发出乙的得分，不等；等到甲的 P，跟着发出 O += 甲的 P · V；得分算完，在甲的乘法背后算乙的 P，写出，再乘。
// 两组都先甲后乙地换基准、缩放，同普通的在线 softmax：基准随 P 一起交给另一组，绝大多数块不必缩放（128 个数，
// SOFTMAX_SLACK）。
// 账（r = 512，每个 SM 每周期 1024 次乘加；一对块的周期）：得分 2 x 1152，P · V 4 x 512，共 4352；甲的 P 在乙的得分背后，
// 乙的 P 在甲的 P · V 背后。缓冲只有两级：甲在乙的两份 P · V 之前就放行，下一对的甲在它们背后读进来。
#pragma once

#include "mla_decode_sm90.cuh"

namespace dso::decode {

template <class E, class S>
struct Many : Consumer<E, S> {
  static constexpr int RANK = S::RANK, ROWS = S::ROWS, SLICES = S::KEYS / 16;
  using Base = Consumer<E, S>;
  using Base::args, Base::in, Base::shared, Base::ring, Base::warp, Base::lane, Base::tile;

  using Fragments = uint32_t[SLICES][4];  // P：各 16 个键的 A 片段

  const int group;  // 第几组
  float o[RANK / 4];
  float base[2];  // 各行的基准，两组的相同
  float l[2];     // 只含自己算的块，本线程的列
  int limit[2];
  int open;  // 在它之前的键，这个 warp 的各行都看得见
  float scale;

  __device__ explicit Many(const DecodeArgs &a)
      : Base(a), group(static_cast<int>(threadIdx.x) / GROUP), scale(score_scale(a.in)) {}

  __device__ int line_of(int h) const { return warp * 16 + lane / 4 + 8 * h; }
  // 各组定下的基准；一段结束时另有各自的 l。
  __device__ float &base_of(int owner, int row) const { return shared.floats[owner * ROWS + row]; }
  __device__ float &sum_of(int owner, int row) const {
    return shared.floats[(2 + owner) * ROWS + row];
  }

  // 看不见的得分换成 -INF；返回之后还要乘的系数（系数不是正数时最大值会变，先乘上）。
  __device__ float hide(const Piece &piece, int first, float (&s)[32]) const {
    const bool positive = scale > 0.0f;
    if (first >= piece.skip && first + S::KEYS <= open) return scale;
    int column = lane % 4 * 2;
    unsigned seen[2];  // 64 个键哪些能用，从本线程的第一列起
#pragma unroll
    for (int half = 0; half < 2; half++)
      seen[half] =
          __ballot_sync(ALL_LANES, this->usable(piece, first + half * WARP + lane)) >> column;
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < 16; i++) {
        float &x = s[i / 2 * 4 + 2 * h + i % 2];
        int offset = i / 2 * 8 + i % 2;
        bool ok = offset < limit[h] - first - column && (seen[i / 8] >> offset % WARP & 1) != 0;
        x = ok ? (positive ? x : x * scale) : -INFINITY;
      }
    return positive ? scale : 1.0f;
  }

  // 两行各自的最大值。
  __device__ static void row_tops(const float (&s)[32], float factor, float (&top)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = fmaxf(s[i * 4 + 2 * h], s[i * 4 + 2 * h + 1]);
      top[h] = quad_max(max_of(x)) * factor;
    }
  }

  // 由自己这块的最大值定下基准，l 换到新的基准；返回 O 要不要缩放（整个 warp 一致）。
  __device__ bool decide(const float (&top)[2], float (&keep)[2]) {
    bool moved = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      moved |= dso::rebase(top[h], &base[h], &keep[h]);
      l[h] *= keep[h];
    }
    return __any_sync(ALL_LANES, moved);
  }

  // 跟上另一组定下的基准；返回同 decide。
  __device__ bool follow(float (&keep)[2]) {
    bool moved = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float next = base_of(1 - group, line_of(h));
      keep[h] = 1.0f;
      if (next == base[h]) continue;
      keep[h] = fast_exp2(base[h] - next), base[h] = next, moved = true;
      l[h] *= keep[h];
    }
    return __any_sync(ALL_LANES, moved);
  }

  // O 换到新的基准；没有还在累加 O 的 wgmma 时。
  __device__ void rescale(const float (&keep)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int i = 0; i < RANK / 8; i++) o[i / 2 * 4 + 2 * h + i % 2] *= keep[h];
  }

  // 自己那块的得分算完之后：这组没有 warp 还在读旋转的键，当值用之前清掉看不见的行。
  __device__ void settle_block(const Piece &piece, Ring at, int first) const {
    named_barrier_sync(GROUP_BARRIER + group, GROUP);
    if (!this->clean(piece, at, first)) return;
    fence_proxy_async();
    named_barrier_sync(GROUP_BARRIER + group, GROUP);
  }

  __device__ uint64_t values(Ring at) const {
    return uniform(mn_major(tile(at) + group * S::HALF * S::BOX, S::BOX));
  }

  // 第 k 段（16 个键）的得分变成 P。
  __device__ void exponentials(const float (&s)[32], float factor, int k, Fragments &p) {
#pragma unroll
    for (int j = 0; j < 4; j++) {  // 8 列的一半、行
      const int h = j % 2, at_score = (k * 2 + j / 2) * 4 + 2 * h;
      const float minus = -finite_max(base[h]);
      float x = fast_exp2(fmaf(s[at_score], factor, minus));
      float y = fast_exp2(fmaf(s[at_score + 1], factor, minus));
      l[h] += x + y;
      p[k][j] = E::pack(x, y);
    }
  }

  // 发出 O += 自己那块的 P · V：P 在寄存器里。
  __device__ void multiply_own(Ring at, const Fragments &p) {
    const uint64_t v = values(at);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < SLICES; k++)
      wgmma<Base::BF16, 1>(o, p[k], advance(v, k * 16 * BOX_ROW), true);
    wgmma_commit();
  }

  // P 写成 [64][64 个键]，盖掉旋转的键，连同基准交给等 READY_BARRIER 的另一组。
  __device__ void publish(Ring at, const Fragments &p) const {
    // 块从 1024 字节对齐处起，往后 16 列就是整个偏移异或 32：四个地址不必各占一个寄存器。
    const int to =
        at.stage * S::STAGE + S::BOXES * S::BOX + swizzled(warp * 16 + lane % 16, lane / 16 * 8);
#pragma unroll
    for (int k = 0; k < SLICES; k++) stmatrix_x4(shared.stages + (to ^ k * 32), p[k]);
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (lane % 4 == 0) base_of(group, line_of(h)) = base[h];
    fence_proxy_async();
    named_barrier_arrive(READY_BARRIER + group, S::CONSUMERS);
  }

  // 等到另一组的 P，发出 O += P · V：P 在共享内存里。
  __device__ void multiply_other(Ring at) {
    named_barrier_sync(READY_BARRIER + 1 - group, S::CONSUMERS);
    float keep[2];
    if (follow(keep)) rescale(keep);  // 此时 O 没有在算（自己那块的得分可能在）
    for (int box = 0; box < S::HALF; box += S::CHUNK) this->wait(at, group * S::HALF + box);
    uint64_t v = values(at), p = uniform(k_major(tile(at) + S::BOXES * S::BOX));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < SLICES; k++)
      wgmma<Base::BF16, 0, 1>(o, advance(p, k * 32), advance(v, k * 16 * BOX_ROW), true);
    wgmma_commit();
  }

  // 另一组的那块用完了：我的一半列，连同它的 P。
  __device__ void release_other(Ring at) const {
    this->release(at, group);
    this->release(at, TAIL);
  }

  // 自己那块的得分 s 算完之后：定下基准，P 写给另一组。返回 O 要不要缩放（keep）。
  __device__ bool offer(const Piece &piece, int first, Ring mine, float (&s)[32], Fragments &p,
                        float (&keep)[2]) {
    float top[2];
    const float factor = hide(piece, first, s);
    row_tops(s, factor, top);
    const bool moved = decide(top, keep);
    settle_block(piece, mine, first);
#pragma unroll
    for (int k = 0; k < SLICES; k++) exponentials(s, factor, k, p);
    publish(mine, p);
    return moved;
  }

  // 乘自己那块，用完放行。
  __device__ void take_own(Ring mine, const Fragments &p, bool moved, const float (&keep)[2]) {
    if (moved) rescale(keep);
    multiply_own(mine, p);
    wgmma_wait<0>();
    wgmma_settle(o);
    this->release(mine, group);
  }

  // 乘另一组的那块，用完放行。
  __device__ void take_other(Ring other) {
    multiply_other(other);
    wgmma_wait<0>();
    wgmma_settle(o);
    release_other(other);
  }

  // 第 0 组；pair：后面还有乙。last：这一段最后一次用查询。
  __device__ void lead(const Piece &piece, int first, Ring mine, Ring other, bool pair, bool last) {
    float s[32], keep[2];
    Fragments p;
    this->score(mine, s);
    wgmma_wait<0>();
    wgmma_settle(s);
    if (last) this->release_queries();
    const bool moved = offer(piece, first, mine, s, p, keep);
    take_own(mine, p, moved, keep);
    if (pair) take_other(other);
  }

  // 第 1 组；乙从第 first 个键起。last：这一段最后一次用查询。
  __device__ void trail(const Piece &piece, int first, Ring mine, Ring other, bool last) {
    float s[32], keep[2];
    Fragments p;
    this->score(mine, s);
    multiply_other(other);
    wgmma_wait<1>();
    wgmma_settle(s);
    if (last) this->release_queries();
    const bool moved = offer(piece, first, mine, s, p, keep);
    wgmma_wait<0>();
    wgmma_settle(o);
    release_other(other);
    take_own(mine, p, moved, keep);
  }

  __device__ void attend(const Piece &piece) {
    for (int left = piece.units, first = piece.key_begin; left > 0; left -= 2) {
      const bool pair = left > 1;
      const Ring second = ring.next(S::STAGES);
      if (group == 0) {
        lead(piece, first, ring, second, pair, left <= 2);
      } else if (pair) {
        trail(piece, first + S::KEYS, second, ring, left <= 3);
      } else {
        if (piece.units == 1) this->release_queries();  // 没有用过
        take_other(ring);
      }
      ring = pair ? second.next(S::STAGES) : second;
      first += 2 * S::KEYS;
    }
  }

  // 一行归一化之后的 16 位结果，32 列一次：一组 4 个线程各有相邻的两列，换成各有相邻的 8 列，一次写 16 字节。
  __device__ void write_row(uint16_t *to, const Lines &lines, int h, float inverse) const {
    const int row = line_of(h), column = group * RANK / 2 + lane % 4 * 8;
    to += static_cast<int64_t>(row) * in.rank + column;
    const int room = row < lines.count ? static_cast<int>(in.rank) - column : 0;
#pragma unroll
    for (int i = 0; i < RANK / 4; i += 16) {
      uint32_t x[4];
#pragma unroll
      for (int j = 0; j < 4; j++)
        x[j] = E::pack(o[i + j * 4 + 2 * h] * inverse, o[i + j * 4 + 2 * h + 1] * inverse);
      transpose_quad(x);
      if (i * 2 < room) *reinterpret_cast<uint4 *>(to + i * 2) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }

  __device__ void finish(const Piece &piece) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      l[h] = quad_sum(l[h]);
      if (lane % 4 == 0) sum_of(group, line_of(h)) = l[h];
    }
    named_barrier_sync(CONSUMERS_BARRIER, S::CONSUMERS);
    const auto lines = lines_of<S>(args, piece);
    float total[2];
#pragma unroll
    for (int h = 0; h < 2; h++) total[h] = sum_of(0, line_of(h)) + sum_of(1, line_of(h));
    if (piece.whole) {
      auto *to = static_cast<uint16_t *>(args.o) + lines.first * in.rank;
#pragma unroll
      for (int h = 0; h < 2; h++) write_row(to, lines, h, inverse_of(total[h]));
    } else {
      const int column = group * RANK / 2 + lane % 4 * 2;
      const int room = static_cast<int>(in.rank) - column;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = line_of(h);
        if (row >= lines.count) continue;
        if (group == 0 && lane % 4 == 0)
          args.part_m[this->part_at(piece, row)] = base[h],
                                           args.part_l[this->part_at(piece, row)] = total[h];
        float *to = this->part_of(piece, row, column);
#pragma unroll
        for (int i = 0; i < RANK / 4; i += 4)  // r 是 64 的倍数：一对不会只有一个在范围内
          if (i * 2 < room)
            *reinterpret_cast<float2 *>(to + i * 2) = make_float2(o[i + 2 * h], o[i + 2 * h + 1]);
      }
    }
    named_barrier_sync(CONSUMERS_BARRIER, S::CONSUMERS);  // 下一段要重写 l
  }

  __device__ void run(const Piece &piece) {
    open = in.kv_mask || !(scale > 0.0f) ? 0 : piece.key_end;
    const Lines lines = lines_of<S>(args, piece);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      l[h] = 0.0f, base[h] = -INFINITY;
      limit[h] = row_limit(args, piece, first_row<S>() + line_of(h));
      if (line_of(h) < lines.count && limit[h] < open) open = limit[h];  // 这组之外的行不写出，不管
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
      int other = __shfl_xor_sync(ALL_LANES, open, step);
      if (other < open) open = other;
    }
#pragma unroll
    for (int i = 0; i < RANK / 4; i++) o[i] = 0.0f;
    this->wait_queries();
    attend(piece);
    finish(piece);
  }
};

}  // namespace dso::decode
