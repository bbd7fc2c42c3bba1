// mla_decode 的 Hopper 路径，行多（64）：行是查询；一次一对块，第 w 组管第 w 块的得分与 P、两块的第 w 半的列。
//
// 一对块（甲、乙）里两组做的完全一样：
//   各自的得分；各行的最大值互相看一眼，两块用同一个基准，O 至多缩放一次；
//   P 一段（16 个键）算好就发出 O += P · V 的一段：自己的 P 在寄存器里，算下一段时这一段正在乘；
//   P 写进共享内存，盖掉旋转的键；等到另一组的，O += 另一块的 P · V。
// 绝大多数块不必缩放 O（128 个数，SOFTMAX_SLACK）。
// 账（r = 512，每个 SM 每周期 1024 次乘加；一对块的周期）：得分 2 x 1152，P · V 4 x 512，共 4352；得分之后到第一段
// P · V 之前张量核心闲着，约 400～500（每个调度器上两组各一个 warp，一对约 400 条指令）。
// 缓冲只有两级，放行的次序与读进来的次序（Producer::load_blocks）对上：先放行的半块先读，得分也从那一半算起。
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
  // 两组各自的最大值；一段结束时另有各自的 l。
  __device__ float &top_of(int owner, int row) const { return shared.floats[owner * ROWS + row]; }
  __device__ float &sum_of(int owner, int row) const {
    return shared.floats[(2 + owner) * ROWS + row];
  }

  // 自己那块的得分；从先读进来的那一半（自己当值用的）算起。
  __device__ void score_own(Ring at, float (&s)[32]) {
    this->template score<S::HALF>(at, s, group * S::HALF, true);
    this->template score<S::HALF>(at, s, (1 - group) * S::HALF, false);
    this->template score<1>(at, s, S::BOXES, false);
    wgmma_commit();
  }

  // 看不见的得分换成 -INF；返回之后还要乘的系数（系数不是正数时最大值会变，先乘上）。
  __device__ float hide(const Piece &piece, int first, float (&s)[32]) const {
    const bool positive = scale > 0.0f;
    if (first + S::KEYS <= open) return scale;
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

  // 同另一组交换最大值，定下基准；返回旧结果要不要缩放（整个 warp 一致）。
  __device__ bool rebase(const float (&top)[2], float (&keep)[2]) {
#pragma unroll
    for (int h = 0; h < 2; h++)
      if (lane % 4 == 0) top_of(group, line_of(h)) = top[h];
    named_barrier_sync(CONSUMERS_BARRIER, S::CONSUMERS);  // 之后也没有 warp 还在读旋转的键
    bool moved = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float next = fmaxf(top[h], top_of(1 - group, line_of(h)));
      moved |= dso::rebase(next, &base[h], &keep[h]);
    }
    return __any_sync(ALL_LANES, moved);
  }

  // 当值用的半块里看不见的行清零：先要这一对的得分都算完。
  __device__ void clean_values(const Piece &piece, int block, bool pair, Ring mine, Ring other) {
    const int first = piece.key_begin + block * S::KEYS;
    const int own = first + group * S::KEYS, theirs = first + (1 - group) * S::KEYS;
    bool cleaned = false;
    if (pair || group == 0) cleaned |= this->clean(piece, mine, own, group * S::HALF, S::HALF);
    if (pair || group == 1) cleaned |= this->clean(piece, other, theirs, group * S::HALF, S::HALF);
    if (!cleaned) return;
    fence_proxy_async();
    named_barrier_sync(GROUP_BARRIER + group, GROUP);
  }

  __device__ uint64_t values(Ring at) const {
    return uniform(mn_major(tile(at) + group * S::HALF * S::BOX, S::BOX));
  }

  // 得分变成 P，一段一段地乘进 O。
  __device__ void accumulate_own(Ring at, const float (&s)[32], float factor, Fragments &p) {
    uint64_t v = values(at);
    float minus[2] = {-finite_max(base[0]), -finite_max(base[1])};
#pragma unroll
    for (int k = 0; k < SLICES; k++) {
#pragma unroll
      for (int j = 0; j < 4; j++) {  // 8 列的一半、行
        const int h = j % 2, at_score = (k * 2 + j / 2) * 4 + 2 * h;
        float x = fast_exp2(fmaf(s[at_score], factor, minus[h]));
        float y = fast_exp2(fmaf(s[at_score + 1], factor, minus[h]));
        l[h] += x + y;
        p[k][j] = E::pack(x, y);
      }
      wgmma_fence();
      wgmma<Base::BF16, 1>(o, p[k], advance(v, k * 16 * BOX_ROW), true);
    }
    wgmma_commit();
  }

  // P 写成 [64][64 个键]，盖掉旋转的键，另一组等 READY_BARRIER。
  __device__ void publish(Ring at, const Fragments &p) const {
    // 块从 1024 字节对齐处起，往后 16 列就是整个偏移异或 32：四个地址不必各占一个寄存器。
    const int to =
        at.stage * S::STAGE + S::BOXES * S::BOX + swizzled(warp * 16 + lane % 16, lane / 16 * 8);
#pragma unroll
    for (int k = 0; k < SLICES; k++) stmatrix_x4(shared.stages + (to ^ k * 32), p[k]);
    fence_proxy_async();
    named_barrier_arrive(READY_BARRIER + group, S::CONSUMERS);
  }

  // 另一组的一块：P 在共享内存里。
  __device__ void accumulate_other(Ring at) {
    named_barrier_sync(READY_BARRIER + 1 - group, S::CONSUMERS);
    for (int box = 0; box < S::HALF; box += S::CHUNK) this->wait(at, group * S::HALF + box);
    uint64_t v = values(at), p = uniform(k_major(tile(at) + S::BOXES * S::BOX));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < SLICES; k++)
      wgmma<Base::BF16, 0, 1>(o, advance(p, k * 32), advance(v, k * 16 * BOX_ROW), true);
    wgmma_commit();
  }

  // 一对块（MINE、OTHER 都是真），或一段最后单独的一块：第 0 组只有自己的，第 1 组只有另一组的。
  template <bool MINE, bool OTHER>
  __device__ void step(const Piece &piece, int block, Ring mine, Ring other) {
    float s[32], top[2] = {-INFINITY, -INFINITY}, keep[2], factor = scale;
    Fragments p;
    if constexpr (MINE) {
      score_own(mine, s);
      wgmma_wait<0>();
      wgmma_settle(s);
      factor = hide(piece, piece.key_begin + (block + group) * S::KEYS, s);
      row_tops(s, factor, top);
    }
    bool moved = rebase(top, keep);
    clean_values(piece, block, MINE && OTHER, mine, other);
    if (moved) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        l[h] *= keep[h];
#pragma unroll
        for (int i = 0; i < RANK / 8; i++) o[i / 2 * 4 + 2 * h + i % 2] *= keep[h];
      }
    }
    if constexpr (MINE) {
      accumulate_own(mine, s, factor, p);
      publish(mine, p);
    }
    if constexpr (OTHER) accumulate_other(other);
    if constexpr (MINE) {
      wgmma_wait<OTHER ? 1 : 0>();
      this->release(mine, group);
    }
    if constexpr (OTHER) {
      wgmma_wait<0>();
      this->release(other, group);
      this->release(other, TAIL);  // 旋转的键（P）由读 P 的一组放行
    }
    wgmma_settle(o);
  }

  __device__ void attend(const Piece &piece) {
    int block = 0;
    for (; block + 1 < piece.units; block += 2) {
      const Ring second = ring.next(S::STAGES);
      step<true, true>(piece, block, group == 0 ? ring : second, group == 0 ? second : ring);
      ring = second.next(S::STAGES);
    }
    if (block == piece.units) return;
    if (group == 0)
      step<true, false>(piece, block, ring, ring);
    else
      step<false, true>(piece, block, ring, ring);
    ring = ring.next(S::STAGES);
  }

  __device__ void finish(const Piece &piece) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      l[h] = quad_sum(l[h]);
      if (lane % 4 == 0) sum_of(group, line_of(h)) = l[h];
    }
    named_barrier_sync(CONSUMERS_BARRIER, S::CONSUMERS);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int row = line_of(h);
      float total = sum_of(0, row) + sum_of(1, row);
      if (!piece.whole && group == 0 && lane % 4 == 0)
        args.part_m[this->part_at(piece, row)] = base[h],
                                         args.part_l[this->part_at(piece, row)] = total;
      auto to = Base::row_of(piece, row, group * RANK / 2 + lane % 4 * 2, total);
#pragma unroll
      for (int i = 0; i < RANK / 4; i += 4) to.write_pair(i * 2, o[i + 2 * h], o[i + 2 * h + 1]);
    }
  }

  __device__ void run(const Piece &piece) {
    open = in.kv_mask || !(scale > 0.0f) ? 0 : piece.key_end;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = Base::of_group(line_of(h));
      l[h] = 0.0f, base[h] = -INFINITY, limit[h] = row_limit(args, piece, row);
      if (row_at(args, piece, row) >= 0 && limit[h] < open) open = limit[h];
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
      int other = __shfl_xor_sync(ALL_LANES, open, step);
      if (other < open) open = other;
    }
#pragma unroll
    for (int i = 0; i < RANK / 4; i++) o[i] = 0.0f;
    this->load_queries(piece);
    attend(piece);
    finish(piece);
  }
};

}  // namespace dso::decode
