// 展开式注意力的反向（Hopper）：TMA 搬运，wgmma 累加；K、V 的展开、两个核的分工同 mla_prefill_backward.cu。
//
// dkv：一块 128 个键、一个头，键放在 M 一维：Sᵀ = K Qᵀ、dPᵀ = V dOᵀ，Pᵀ、dSᵀ 在寄存器里直接作
// dV += Pᵀ dO、dK += dSᵀ Q 的左操作数，不经共享内存。dq：一块 128 个查询，同样 dS 在寄存器里，dQ += dS K。
//
// 两个消费者组（4 个 warp）各 64 行，轮流（具名屏障）发 wgmma，一组算 P 或 dS 时另一组占着矩阵单元。一步发两次：
// dV 与 dP 一起，dK（dQ）与下一步的 S 一起。S 与 dP 因此可以是同样的寄存器，两次之间只留下 16 位的 P；要是同时
// 算出 S 与 dP，就再也放不下 dK 与 dV 的累加器。生产者组两个 warp 干活：一个发 TMA，一个读 lse、delta，清掉
// 不该参与的行（那里可能是 NaN，而 0 * NaN 会混进累加）。
#include <climits>

#include <tma.cuh>

#include "mla_prefill.cuh"
#include "tile_sm90.cuh"

namespace {

using namespace dso;

using Params = dso_cuda_mla_prefill_backward_params;

constexpr int GROUP = 4 * WARP, GROUPS = 2, CONSUMERS = GROUPS * GROUP;
constexpr int THREADS = CONSUMERS + GROUP;  // 生产者占一组：寄存器才让得出来
constexpr int COPY_WARP = CONSUMERS / WARP, ROW_WARP = COPY_WARP + 1;
constexpr int TURN_BARRIER = 1;

struct Maps {
  CUtensorMap q, grad, k, v, rope;
};

// 一个核的形状：Q（dQ）、dO 一块的行数，K、V 一块的行数。
struct Boxes {
  int queries, keys;
};

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ inline int warp_of() { return static_cast<int>(threadIdx.x) / WARP; }

// 第 row 行从词元 token 起的 Q、dO 与从槽位 slot 起的 K、V，各块依次放在 to 起。
template <int NOPE_BOXES>
__device__ void load_q(const Maps &maps, const dso_mla_inputs &in, int row, int token, int head,
                       unsigned char *to, int box, uint64_t *barrier) {
  for (int i = 0; i < NOPE_BOXES; i++)
    tma_load(to + i * box, &maps.q, barrier, i * BOX_COLUMNS, head, token, row);
  tma_load(to + NOPE_BOXES * box, &maps.q, barrier, static_cast<int>(in.nope_dim), head, token,
           row);
}

template <int BOXES>
__device__ void load_grad(const Maps &maps, int row, int token, int head, unsigned char *to,
                          int box, uint64_t *barrier) {
  for (int i = 0; i < BOXES; i++)
    tma_load(to + i * box, &maps.grad, barrier, i * BOX_COLUMNS, head, token, row);
}

template <int NOPE_BOXES>
__device__ void load_k(const Maps &maps, const dso_mla_inputs &in, int row, int slot, int head,
                       unsigned char *to, int box, uint64_t *barrier) {
  for (int i = 0; i < NOPE_BOXES; i++)
    tma_load(to + i * box, &maps.k, barrier, i * BOX_COLUMNS, head, slot, row);
  // 没有旋转部分时从界外读：TMA 填 0。
  tma_load(to + NOPE_BOXES * box, &maps.rope, barrier,
           in.rope_dim > 0 ? 0 : NOPE_BOXES * BOX_COLUMNS, 0, slot, row);
}

template <int BOXES>
__device__ void load_v(const Maps &maps, int row, int slot, int head, unsigned char *to, int box,
                       uint64_t *barrier) {
  for (int i = 0; i < BOXES; i++)
    tma_load(to + i * box, &maps.v, barrier, i * BOX_COLUMNS, head, slot, row);
}

// 一个 warp 把 count 块（各 rows 行）里 hidden(行) 的行清零。
template <class Hidden>
__device__ void clear_rows(unsigned char *boxes, int count, int rows, Hidden hidden) {
  for (int i = lane_of(); i < rows * 8; i += WARP) {
    if (!hidden(i / 8)) continue;
    for (int b = 0; b < count; b++)
      *reinterpret_cast<uint4 *>(boxes + b * rows * BOX_ROW + i * 16) = make_uint4(0, 0, 0, 0);
  }
  fence_proxy_async();
}

// 一个 warp 到达一次；各线程此前的写都算在内。
__device__ inline void arrive(uint64_t *barrier) {
  __syncwarp();
  if (lane_of() == 0) mbarrier_arrive(barrier);
}

// 一个乘法的操作数的描述符：轮到之前先算好，轮到了就发。
struct Operands {
  uint64_t a, b;
};

__device__ inline Operands operands(const void *a, const void *b) {
  return {uniform(k_major(a)), uniform(k_major(b))};
}

// d [64, 2 R] = a bᵀ：两个操作数都是 CHUNKS 个 16 列，分成 64 列的块。
template <bool BF16, int CHUNKS, int R>
__device__ void multiply(float (&d)[R], const Operands &from, int a_box, int b_box) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    wgmma<BF16, 0, 0>(d, advance(from.a, c / 4 * a_box + c % 4 * 32),
                      advance(from.b, c / 4 * b_box + c % 4 * 32), c > 0);
}

// d [64, 2 R] += a b：a 是寄存器里的片段，b 的行是求和的一维。
template <bool BF16, int CHUNKS, int R>
__device__ void accumulate(float (&d)[R], const uint32_t (&a)[CHUNKS][4], uint64_t b) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) wgmma<BF16, 1>(d, a[c], advance(b, c * 16 * BOX_ROW), true);
}

__device__ inline void take_turn(int group) { named_barrier_sync(TURN_BARRIER + group, CONSUMERS); }
__device__ inline void pass_turn(int group) {
  named_barrier_arrive(TURN_BARRIER + 1 - group, CONSUMERS);
}

// ---- dkv ----

namespace dkv {

constexpr int KEYS = BACKWARD_KEYS_SM90, QUERIES = BACKWARD_QUERIES_SM90,
              STAGES = BACKWARD_STAGES_SM90;
constexpr int CHUNKS = QUERIES / 16;

// 共享内存：K、V，各级的 Q、dO，各级的 lse 与 delta；末尾是 mbarrier。
template <int NOPE_BOXES, int DV>
struct Layout {
  static constexpr int K_BOXES = NOPE_BOXES + 1, V_BOXES = DV / BOX_COLUMNS;
  static constexpr int KEY_BOX = KEYS * BOX_ROW, BOX = QUERIES * BOX_ROW;
  static constexpr int V = K_BOXES * KEY_BOX, QUERY = V + V_BOXES * KEY_BOX;
  static constexpr int GRAD = K_BOXES * BOX, STAGE = GRAD + V_BOXES * BOX;
  static constexpr int ROWS = QUERY + STAGES * STAGE, BARRIERS = ROWS + STAGES * QUERIES * 8;
  static constexpr int BYTES = BARRIERS + (1 + 3 * STAGES) * 8;
};

// 走到第几级、第几轮（奇偶）：full 一类的屏障等这一轮的，empty 等上一轮的。
struct Ring {
  int stage = 0, parity = 0;

  __device__ void advance() {
    if (++stage < STAGES) return;
    stage = 0, parity ^= 1;
  }
};

template <int NOPE_BOXES, int DV>
struct Shared {
  using L = Layout<NOPE_BOXES, DV>;
  unsigned char *base = dynamic_shared();

  __device__ unsigned char *k() const { return base; }
  __device__ unsigned char *v() const { return base + L::V; }
  __device__ unsigned char *q(int stage) const { return base + L::QUERY + stage * L::STAGE; }
  __device__ unsigned char *grad(int stage) const { return q(stage) + L::GRAD; }
  __device__ float *lse(int stage) const {
    return reinterpret_cast<float *>(base + L::ROWS) + stage * QUERIES * 2;
  }
  __device__ float *delta(int stage) const { return lse(stage) + QUERIES; }
  __device__ uint64_t *barrier(int i) const {
    return reinterpret_cast<uint64_t *>(base + L::BARRIERS) + i;
  }
  __device__ uint64_t *kv_full() const { return barrier(0); }
  // 一级：TMA 写完了；lse、delta 写好、多余的行清掉了；用完了。
  __device__ uint64_t *landed(int stage) const { return barrier(1 + stage); }
  __device__ uint64_t *ready(int stage) const { return barrier(1 + STAGES + stage); }
  __device__ uint64_t *empty(int stage) const { return barrier(1 + 2 * STAGES + stage); }

  __device__ void start() const {
    mbarrier_init(kv_full(), 1);
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(landed(i), 1), mbarrier_init(ready(i), 1);
      mbarrier_init(empty(i), CONSUMERS / WARP);
    }
    mbarrier_init_fence();
  }
};

// 一块键：第 row 行的槽位 [first, first + KEYS)，组内第 head 个头。
struct Tile {
  int row, first, head;
};

// 从第 from 个起，第一个看得见这块键的 span；没有就是 n_spans。整个 warp 一起调用。
__device__ inline int next_span(const dso_mla_inputs &in, const Tile &tile, int from) {
  int64_t first = tile.row * in.s + tile.first;  // 展平的槽位
  int64_t end = tile.first + KEYS < in.s ? first + KEYS : (tile.row + 1) * in.s;
  auto count = static_cast<int>(in.n_spans);
  for (; from < count; from += WARP) {
    bool hit = false;
    if (from + lane_of() < count) {
      const dso_span &span = in.spans[from + lane_of()];
      hit = span.kv_begin < end && span.kv_end > first && span.q_begin < span.q_end;
    }
    if (unsigned hits = __ballot_sync(ALL_LANES, hit))
      return from + __ffs(static_cast<int>(hits)) - 1;
  }
  return count;
}

// 依次走过看得见这块键的 span：visit(span, 第一个键（span 内，可以为负），第一个查询)。整个 warp 一起调用。
// 行是已知的，不必像 locate 那样做除法：生产者的寄存器很少。
template <class Visit>
__device__ void each_span(const dso_mla_inputs &in, const Tile &tile, Visit visit) {
  for (int i = next_span(in, tile, 0); i < in.n_spans; i = next_span(in, tile, i + 1)) {
    dso_span span = in.spans[i];
    auto narrow = [](int64_t x) { return static_cast<int>(x); };
    int slot = narrow(span.kv_begin - tile.row * in.s), key = tile.first - slot;
    Place at{narrow(span.q_begin), narrow(span.q_end - span.q_begin), tile.row, slot,
             narrow(span.kv_end - span.kv_begin)};
    int query = in.causal ? key - (at.kv_len - at.q_len) : 0;
    visit(at, key, query > 0 ? query / QUERIES * QUERIES : 0);
  }
}

template <int NOPE_BOXES, int DV>
__device__ void copy(const Maps &maps, const Params &p, const Tile &tile) {
  using L = Layout<NOPE_BOXES, DV>;
  Shared<NOPE_BOXES, DV> shared;
  const dso_mla_inputs &in = p.in.in;
  bool leader = lane_of() == 0;
  if (leader) {
    mbarrier_expect(shared.kv_full(), L::QUERY);
    load_k<NOPE_BOXES>(maps, in, tile.row, tile.first, tile.head, shared.k(), L::KEY_BOX,
                       shared.kv_full());
    load_v<L::V_BOXES>(maps, tile.row, tile.first, tile.head, shared.v(), L::KEY_BOX,
                       shared.kv_full());
  }
  Ring at_stage;
  int head = static_cast<int>(p.in.first_head) + tile.head;
  each_span(in, tile, [&](const Place &at, int, int query) {
    auto t = static_cast<int>(in.t);
    int token = at.q_begin % t + query, end = at.q_begin % t + at.q_len, row = at.q_begin / t;
    for (; token < end; token += QUERIES, at_stage.advance()) {
      if (!leader) continue;
      int stage = at_stage.stage;
      uint64_t *landed = shared.landed(stage);
      mbarrier_wait(shared.empty(stage), at_stage.parity ^ 1);
      mbarrier_expect(landed, L::STAGE);
      load_q<NOPE_BOXES>(maps, in, row, token, head, shared.q(stage), L::BOX, landed);
      load_grad<L::V_BOXES>(maps, row, token, head, shared.grad(stage), L::BOX, landed);
    }
    __syncwarp();
  });
}

// lse（以 2 为底）与 delta；末尾之后的查询 lse 取 +inf，概率就是 0，它们的 Q、dO 清零。
template <int NOPE_BOXES, int DV>
__device__ void prepare(const Params &p, const Tile &tile) {
  using L = Layout<NOPE_BOXES, DV>;
  Shared<NOPE_BOXES, DV> shared;
  const dso_mla_inputs &in = p.in.in;
  auto heads = static_cast<int>(in.heads), head = static_cast<int>(p.in.first_head) + tile.head;
  Ring at_stage;
  each_span(in, tile, [&](const Place &at, int, int query) {
    for (; query < at.q_len; query += QUERIES, at_stage.advance()) {
      int stage = at_stage.stage;
      float lse[2], delta[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int i = query + lane_of() + e * WARP;
        bool real = i < at.q_len;
        int from = (at.q_begin + (real ? i : 0)) * heads + head;  // B T H < 2^31（绑定检查）
        // 什么都没看见的查询（lse = -inf）没有概率，取 0 即可：它的得分都被遮住。
        lse[e] = real ? finite_max(p.in.lse[from]) * LOG2_E : INFINITY;
        delta[e] = real ? p.delta[from] : 0.0f;
      }
      mbarrier_wait(shared.empty(stage), at_stage.parity ^ 1);
#pragma unroll
      for (int e = 0; e < 2; e++) {
        shared.lse(stage)[lane_of() + e * WARP] = lse[e];
        shared.delta(stage)[lane_of() + e * WARP] = delta[e];
      }
      if (query + QUERIES > at.q_len) {
        mbarrier_wait(shared.landed(stage), at_stage.parity);
        clear_rows(shared.q(stage), L::K_BOXES + L::V_BOXES, QUERIES,
                   [&](int i) { return query + i >= at.q_len; });
      }
      arrive(shared.ready(stage));
    }
  });
}

template <class E, int NOPE_BOXES, int DV>
struct Consumer {
  using L = Layout<NOPE_BOXES, DV>;
  static constexpr bool BF16 = E::dtype == DSO_BF16;

  const Params &p;
  const dso_mla_inputs &in;
  Tile tile;
  Shared<NOPE_BOXES, DV> shared;
  int group;
  Ring now;
  int seen_from[2];  // 这个线程的两行键，各从第几个查询（span 内）起看得见

  float dk[L::K_BOXES * 32] = {}, dv[DV / 2] = {};
  float x[QUERIES / 2];  // S，然后是 dP
  uint32_t prob[CHUNKS][4], ds[CHUNKS][4];

  __device__ Consumer(const Params &params, const Tile &t)
      : p(params), in(params.in.in), tile(t), group(warp_of() / 4) {}

  // 第 h 行键在这一块里是第几个。
  __device__ int key_row(int h) const { return warp_of() * 16 + lane_of() / 4 + 8 * h; }

  // S、dP 的操作数，dV、dK 的右操作数。
  __device__ Operands score_from(int stage) const {
    return operands(shared.k() + group * 64 * BOX_ROW, shared.q(stage));
  }
  __device__ Operands grad_from(int stage) const {
    return operands(shared.v() + group * 64 * BOX_ROW, shared.grad(stage));
  }
  __device__ static uint64_t rows_of(const void *tile) { return uniform(mn_major(tile, L::BOX)); }

  __device__ void score(const Operands &from) {
    multiply<BF16, L::K_BOXES * 4>(x, from, L::KEY_BOX, L::BOX);
  }

  __device__ void score_grad(const Operands &from) {
    multiply<BF16, L::V_BOXES * 4>(x, from, L::KEY_BOX, L::BOX);
  }

  // 有的键看不见这一块的第一个查询：逐个判断。
  __device__ void hide(int query, float hidden) {
    if (!__any_sync(ALL_LANES, query < seen_from[0] || query < seen_from[1])) return;
#pragma unroll
    for (int i = 0; i < QUERIES / 2; i++) {
      int column = i / 4 * 8 + lane_of() % 4 * 2 + i % 2;
      x[i] = query + column < seen_from[i / 2 % 2] ? hidden : x[i];
    }
  }

  // P = exp(S - lse)，下一个乘法的左操作数片段。
  __device__ void probabilities(int query) {
    hide(query, -INFINITY);
    const float *lse = shared.lse(now.stage) + lane_of() % 4 * 2;
    float scale = score_scale(in);
#pragma unroll
    for (int j = 0; j < QUERIES / 8; j++) {
      float2 base = *reinterpret_cast<const float2 *>(lse + j * 8);
#pragma unroll
      for (int h = 0; h < 2; h++)
        prob[j / 2][j % 2 * 2 + h] = E::pack(fast_exp2(x[4 * j + 2 * h] * scale - base.x),
                                             fast_exp2(x[4 * j + 2 * h + 1] * scale - base.y));
    }
  }

  // dS = P (dP - delta)；softmax_scale 留到最后乘。
  __device__ void gradients(int query) {
    hide(query, 0.0f);
    const float *delta = shared.delta(now.stage) + lane_of() % 4 * 2;
#pragma unroll
    for (int j = 0; j < QUERIES / 8; j++) {
      float2 shift = *reinterpret_cast<const float2 *>(delta + j * 8);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        uint32_t pair = prob[j / 2][j % 2 * 2 + h];
        ds[j / 2][j % 2 * 2 + h] = E::pack(E::low(pair) * (x[4 * j + 2 * h] - shift.x),
                                           E::high(pair) * (x[4 * j + 2 * h + 1] - shift.y));
      }
    }
  }

  __device__ void wait_for(const Ring &i) {
    mbarrier_wait(shared.landed(i.stage), i.parity);
    mbarrier_wait(shared.ready(i.stage), i.parity);
  }

  // 发完了：让给另一组，等自己的做完。
  __device__ void finish() {
    wgmma_commit();
    pass_turn(group);
    wgmma_wait<0>();
    wgmma_settle(x);
  }

  __device__ void span(const Place &at, int key, int query) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int i = key + key_row(h);
      bool real = i >= 0 && i < at.kv_len && slot_seen(in, at, at.slot + i);
      seen_from[h] = !real ? INT_MAX : in.causal ? i - (at.kv_len - at.q_len) : 0;
    }
    wait_for(now);
    Operands from = score_from(now.stage);
    take_turn(group);
    wgmma_fence();
    score(from);
    finish();
    for (;;) {
      probabilities(query);
      from = grad_from(now.stage);
      uint64_t rows = rows_of(shared.grad(now.stage));
      take_turn(group);
      wgmma_fence();
      accumulate<BF16>(dv, prob, rows);
      score_grad(from);
      finish();
      gradients(query);
      query += QUERIES;
      if (query >= at.q_len) break;
      int used = now.stage;
      rows = rows_of(shared.q(used));
      now.advance();
      wait_for(now);
      from = score_from(now.stage);
      take_turn(group);
      wgmma_fence();
      accumulate<BF16>(dk, ds, rows);
      score(from);
      finish();
      arrive(shared.empty(used));
    }
    wgmma_fence();
    accumulate<BF16>(dk, ds, rows_of(shared.q(now.stage)));
    wgmma_commit();
    wgmma_wait<0>();
    arrive(shared.empty(now.stage));
    now.advance();
  }

  __device__ void run() {
    mbarrier_wait(shared.kv_full(), 0);
    if (group == 1) pass_turn(group);  // 第 0 组先走
    each_span(in, tile, [&](const Place &at, int key, int query) { span(at, key, query); });
    wgmma_settle(dk);
    wgmma_settle(dv);
  }

  // 没有人看的槽位写 0。
  __device__ void store() {
    int nope = static_cast<int>(in.nope_dim), rope = static_cast<int>(in.rope_dim);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int slot = tile.first + key_row(h);
      if (slot >= in.s) continue;
      auto *to = static_cast<uint16_t *>(p.dkv) + expanded_at(p.in, tile.row, slot, tile.head);
      float *drope = p.drope + ((tile.row * in.s + slot) * p.in.heads + tile.head) * rope;
#pragma unroll
      for (int j = 0; j < L::K_BOXES * 8; j++) {
        float x = dk[4 * j + 2 * h] * in.softmax_scale,
              y = dk[4 * j + 2 * h + 1] * in.softmax_scale;
        int column = j % (NOPE_BOXES * 8) * 8 + lane_of() % 4 * 2;
        if (j < NOPE_BOXES * 8) {  // dn、dr、dv 都是 8 的倍数，两列同在
          if (column < nope) *reinterpret_cast<uint32_t *>(to + column) = E::pack(x, y);
        } else if (column < rope) {
          *reinterpret_cast<float2 *>(drope + column) = make_float2(x, y);
        }
      }
#pragma unroll
      for (int j = 0; j < DV / 8; j++) {
        int column = j * 8 + lane_of() % 4 * 2;
        if (column < in.v_dim)
          *reinterpret_cast<uint32_t *>(to + nope + column) =
              E::pack(dv[4 * j + 2 * h], dv[4 * j + 2 * h + 1]);
      }
    }
  }
};

template <class E, int NOPE_BOXES, int DV>
__global__ __launch_bounds__(THREADS,
                             1) void mla_backward_dkv_sm90(const __grid_constant__ Maps maps,
                                                           Params p) {
  // 头在最里面：同样长的块一起开始；因果时靠前的键看的人多、耗时长，先做。
  auto heads = static_cast<int>(p.in.heads), rows = static_cast<int>(p.in.in.b);
  int place = static_cast<int>(blockIdx.x) / heads;
  Tile tile{place % rows, place / rows * KEYS, static_cast<int>(blockIdx.x) % heads};
  if (threadIdx.x == 0) Shared<NOPE_BOXES, DV>().start();
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    registers_decrease<BACKWARD_DKV_PRODUCER>();
    if (warp_of() == COPY_WARP) copy<NOPE_BOXES, DV>(maps, p, tile);
    if (warp_of() == ROW_WARP) prepare<NOPE_BOXES, DV>(p, tile);
  } else {
    registers_increase<BACKWARD_DKV_CONSUMER>();
    Consumer<E, NOPE_BOXES, DV> consumer(p, tile);
    consumer.run();
    consumer.store();
  }
}

}  // namespace dkv

// ---- dq ----

namespace dq {

constexpr int ROWS = BACKWARD_DQ_ROWS, KEYS = BACKWARD_DQ_KEYS, STAGES = BACKWARD_DQ_STAGES;
constexpr int CHUNKS = KEYS / 16;

// 共享内存：Q、dO，各级的 K，一级 V；末尾是 mbarrier。
template <int NOPE_BOXES, int DV>
struct Layout {
  static constexpr int K_BOXES = NOPE_BOXES + 1, V_BOXES = DV / BOX_COLUMNS;
  static constexpr int Q_BOX = ROWS * BOX_ROW, BOX = KEYS * BOX_ROW;
  static constexpr int GRAD = K_BOXES * Q_BOX, K = GRAD + V_BOXES * Q_BOX;
  static constexpr int K_STAGE = K_BOXES * BOX, V_STAGE = V_BOXES * BOX;
  static constexpr int V = K + STAGES * K_STAGE, BARRIERS = V + V_STAGE;
  static constexpr int BYTES = BARRIERS + (3 + 3 * STAGES) * 8;
};

template <int NOPE_BOXES, int DV>
struct Shared {
  using L = Layout<NOPE_BOXES, DV>;
  unsigned char *base = dynamic_shared();

  __device__ unsigned char *q() const { return base; }
  __device__ unsigned char *grad() const { return base + L::GRAD; }
  __device__ unsigned char *k(int block) const { return base + L::K + block % STAGES * L::K_STAGE; }
  __device__ unsigned char *v() const { return base + L::V; }
  __device__ uint64_t *barrier(int i) const {
    return reinterpret_cast<uint64_t *>(base + L::BARRIERS) + i;
  }
  __device__ uint64_t *q_full() const { return barrier(0); }
  __device__ uint64_t *v_full() const { return barrier(1); }
  __device__ uint64_t *v_empty() const { return barrier(2); }
  // K 的一级：TMA 写完了；多余的行清掉了；用完了。
  __device__ uint64_t *k_landed(int block) const { return barrier(3 + block % STAGES); }
  __device__ uint64_t *k_ready(int block) const { return barrier(3 + STAGES + block % STAGES); }
  __device__ uint64_t *k_empty(int block) const { return barrier(3 + 2 * STAGES + block % STAGES); }
  __device__ static int parity(int block) { return block / STAGES % 2; }

  __device__ void start() const {
    mbarrier_init(q_full(), 1), mbarrier_init(v_full(), 1);
    mbarrier_init(v_empty(), CONSUMERS / WARP);
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(k_landed(i), 1), mbarrier_init(k_ready(i), 1);
      mbarrier_init(k_empty(i), CONSUMERS / WARP);
    }
    mbarrier_init_fence();
  }
};

// 一块查询：span at 的 [first, first + ROWS)，组内第 head 个头；看 blocks 块键。
struct Tile {
  Place at;
  int first, head, blocks;
};

template <int NOPE_BOXES, int DV>
__device__ void copy(const Maps &maps, const Params &p, const Tile &tile) {
  using L = Layout<NOPE_BOXES, DV>;
  using S = Shared<NOPE_BOXES, DV>;
  S shared;
  const dso_mla_inputs &in = p.in.in;
  const Place &at = tile.at;
  auto t = static_cast<int>(in.t);
  int token = at.q_begin % t + tile.first, row = at.q_begin / t,
      full_head = static_cast<int>(p.in.first_head) + tile.head;
  mbarrier_expect(shared.q_full(), L::K);
  load_q<NOPE_BOXES>(maps, in, row, token, full_head, shared.q(), L::Q_BOX, shared.q_full());
  load_grad<L::V_BOXES>(maps, row, token, full_head, shared.grad(), L::Q_BOX, shared.q_full());
  for (int block = 0; block < tile.blocks; block++) {
    int slot = at.slot + block * KEYS;
    mbarrier_wait(shared.k_empty(block), S::parity(block) ^ 1);
    mbarrier_expect(shared.k_landed(block), L::K_STAGE);
    load_k<NOPE_BOXES>(maps, in, at.row, slot, tile.head, shared.k(block), L::BOX,
                       shared.k_landed(block));
    mbarrier_wait(shared.v_empty(), block % 2 ^ 1);
    mbarrier_expect(shared.v_full(), L::V_STAGE);
    load_v<L::V_BOXES>(maps, at.row, slot, tile.head, shared.v(), L::BOX, shared.v_full());
  }
}

// span 末尾之后的、被 kv_mask 遮住的键：K 清零（V 只进被遮住的 dP）。
template <int NOPE_BOXES, int DV>
__device__ void prepare(const Params &p, const Tile &tile) {
  using L = Layout<NOPE_BOXES, DV>;
  using S = Shared<NOPE_BOXES, DV>;
  S shared;
  const dso_mla_inputs &in = p.in.in;
  const Place &at = tile.at;
  for (int block = 0; block < tile.blocks; block++) {
    mbarrier_wait(shared.k_landed(block), S::parity(block));
    int first = block * KEYS;
    if (first + KEYS > at.kv_len || in.kv_mask)
      clear_rows(shared.k(block), L::K_BOXES, KEYS, [&](int i) {
        return first + i >= at.kv_len || !slot_seen(in, at, at.slot + first + i);
      });
    arrive(shared.k_ready(block));
  }
}

template <class E, int NOPE_BOXES, int DV>
struct Consumer {
  using L = Layout<NOPE_BOXES, DV>;
  using S = Shared<NOPE_BOXES, DV>;
  static constexpr bool BF16 = E::dtype == DSO_BF16;

  const Params &p;
  const dso_mla_inputs &in;
  const Tile &tile;
  S shared;
  int group, row;  // row：这个线程的第一行（span 内），另一行再加 8
  float lse[2], delta[2];

  float dq[L::K_BOXES * 32] = {};
  float x[KEYS / 2];  // S，然后是 dP
  uint32_t prob[CHUNKS][4], ds[CHUNKS][4];

  __device__ Consumer(const Params &params, const Tile &t)
      : p(params), in(params.in.in), tile(t), group(warp_of() / 4) {
    row = tile.first + warp_of() * 16 + lane_of() / 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      bool real = row + 8 * h < tile.at.q_len;
      int64_t from = real ? place(h) : 0;
      lse[h] = real ? finite_max(p.in.lse[from]) * LOG2_E : 0.0f;
      delta[h] = real ? p.delta[from] : 0.0f;
    }
  }

  // 第 h 行在 [B, T, H] 里的位置。
  __device__ int64_t place(int h) const {
    return (tile.at.q_begin + row + 8 * h) * in.heads + p.in.first_head + tile.head;
  }

  // S、dP 的操作数，dQ 的右操作数。
  __device__ Operands score_from(int block) const {
    return operands(shared.q() + group * 64 * BOX_ROW, shared.k(block));
  }
  __device__ Operands grad_from() const {
    return operands(shared.grad() + group * 64 * BOX_ROW, shared.v());
  }
  __device__ uint64_t rows_of(int block) const {
    return uniform(mn_major(shared.k(block), L::BOX));
  }

  __device__ void score(const Operands &from) {
    multiply<BF16, L::K_BOXES * 4>(x, from, L::Q_BOX, L::BOX);
  }

  __device__ void score_grad(const Operands &from) {
    multiply<BF16, L::V_BOXES * 4>(x, from, L::Q_BOX, L::BOX);
  }

  // 只有跨过因果的边、到了末尾或有遮盖的块才逐个判断。
  __device__ void hide(int block, float hidden) {
    const Place &at = tile.at;
    int end = (block + 1) * KEYS, first = row - lane_of() / 4;
    bool all = end <= at.kv_len && first + 16 <= at.q_len && end <= visible_keys(in, at, first);
    if (all && !in.kv_mask) return;
    uint32_t seen = mask_bits(block);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int limit = row + 8 * h < at.q_len ? visible_keys(in, at, row + 8 * h) : 0;
      limit -= block * KEYS + lane_of() % 4 * 2;
#pragma unroll
      for (int i = 0; i < KEYS / 4; i++) {
        int key = i / 2 * 8 + i % 2, to = i / 2 * 4 + 2 * h + i % 2;
        x[to] = key < limit && (seen >> i & 1) ? x[to] : hidden;
      }
    }
  }

  // 这个线程的 KEYS / 4 个键（8 j + e）各一位；先收成一个数，免得许多读占着寄存器。
  __device__ uint32_t mask_bits(int block) const {
    if (!in.kv_mask) return ~0u;
    int first = block * KEYS + lane_of() % 4 * 2;
    uint32_t bits = 0;
#pragma unroll 2
    for (int i = 0; i < KEYS / 4; i++) {
      int key = first + i / 2 * 8 + i % 2;
      bool seen = key < tile.at.kv_len && slot_seen(in, tile.at, tile.at.slot + key);
      bits |= static_cast<uint32_t>(seen) << i;
    }
    return bits;
  }

  // P = exp(S - lse)。
  __device__ void probabilities(int block) {
    hide(block, -INFINITY);
    float scale = score_scale(in);
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        prob[j / 2][j % 2 * 2 + h] = E::pack(fast_exp2(x[4 * j + 2 * h] * scale - lse[h]),
                                             fast_exp2(x[4 * j + 2 * h + 1] * scale - lse[h]));
  }

  // dS = P (dP - delta)，下一个乘法的左操作数片段；softmax_scale 留到最后乘。
  __device__ void gradients(int block) {
    hide(block, 0.0f);
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        uint32_t pair = prob[j / 2][j % 2 * 2 + h];
        ds[j / 2][j % 2 * 2 + h] = E::pack(E::low(pair) * (x[4 * j + 2 * h] - delta[h]),
                                           E::high(pair) * (x[4 * j + 2 * h + 1] - delta[h]));
      }
  }

  __device__ void wait_for(int block) {
    mbarrier_wait(shared.k_landed(block), S::parity(block));
    mbarrier_wait(shared.k_ready(block), S::parity(block));
  }

  // 发完了：让给另一组，等自己的做完。
  __device__ void finish() {
    wgmma_commit();
    pass_turn(group);
    wgmma_wait<0>();
    wgmma_settle(x);
  }

  __device__ void run() {
    mbarrier_wait(shared.q_full(), 0);
    if (group == 1) pass_turn(group);  // 第 0 组先走
    wait_for(0);
    Operands from = score_from(0);
    take_turn(group);
    wgmma_fence();
    score(from);
    finish();
    for (int block = 0;;) {
      probabilities(block);
      mbarrier_wait(shared.v_full(), block % 2);
      from = grad_from();
      take_turn(group);
      wgmma_fence();
      score_grad(from);
      finish();
      arrive(shared.v_empty());
      gradients(block);
      if (block + 1 == tile.blocks) break;
      wait_for(block + 1);
      uint64_t rows = rows_of(block);
      from = score_from(block + 1);
      take_turn(group);
      wgmma_fence();
      accumulate<BF16>(dq, ds, rows);
      wgmma_commit();
      score(from);
      wgmma_commit();
      pass_turn(group);
      wgmma_wait<1>();
      arrive(shared.k_empty(block));
      wgmma_wait<0>();
      wgmma_settle(x);
      block++;
    }
    wgmma_fence();
    accumulate<BF16>(dq, ds, rows_of(tile.blocks - 1));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_settle(dq);
  }

  __device__ void store() {
    int nope = static_cast<int>(in.nope_dim), rope = static_cast<int>(in.rope_dim);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (row + 8 * h >= tile.at.q_len) continue;
      auto *to = static_cast<uint16_t *>(p.dq) + place(h) * (nope + rope);
#pragma unroll
      for (int j = 0; j < L::K_BOXES * 8; j++) {
        bool rotary = j >= NOPE_BOXES * 8;
        int column = j % (NOPE_BOXES * 8) * 8 + lane_of() % 4 * 2;
        if (column >= (rotary ? rope : nope)) continue;  // dn、dr 都是 8 的倍数，两列同在
        auto *pair = reinterpret_cast<uint32_t *>(to + (rotary ? nope : 0) + column);
        *pair =
            E::pack(dq[4 * j + 2 * h] * in.softmax_scale, dq[4 * j + 2 * h + 1] * in.softmax_scale);
      }
    }
  }
};

// 查询块的个数（上界）。
__host__ __device__ inline int64_t tiles(const dso_mla_inputs &in) {
  auto blocks = [](int64_t rows) { return (rows + ROWS - 1) / ROWS; };
  return in.n_spans == in.b ? in.b * blocks(in.t) : blocks(in.b * in.t) + in.n_spans;
}

// 第 index 块。靠后的查询看得多、耗时长，先做：一行一个 span 时各行一起从后往前，否则各个 span 依次从后往前。
__device__ inline bool find(const dso_mla_inputs &in, int64_t index, Place *at, int *first) {
  if (in.n_spans != in.b) return find_tile(in, ROWS, tiles(in) - 1 - index, at, first);
  *at = locate(in, index % in.b);
  *first = ((at->q_len + ROWS - 1) / ROWS - 1 - static_cast<int>(index / in.b)) * ROWS;
  return *first >= 0;
}

template <class E, int NOPE_BOXES, int DV>
__global__ __launch_bounds__(THREADS,
                             1) void mla_backward_dq_sm90(const __grid_constant__ Maps maps,
                                                          Params p) {
  auto heads = static_cast<int>(p.in.heads);
  Tile tile;
  tile.head = static_cast<int>(blockIdx.x) % heads;
  if (!find(p.in.in, static_cast<int>(blockIdx.x) / heads, &tile.at, &tile.first)) return;
  int last = tile.first + ROWS < tile.at.q_len ? tile.first + ROWS : tile.at.q_len;
  tile.blocks = (visible_keys(p.in.in, tile.at, last - 1) + KEYS - 1) / KEYS;
  if (threadIdx.x == 0) Shared<NOPE_BOXES, DV>().start();
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    registers_decrease<PREFILL_PRODUCER_REGISTERS>();
    if (tile.blocks <= 0) return;
    if (threadIdx.x == COPY_WARP * WARP) copy<NOPE_BOXES, DV>(maps, p, tile);
    if (warp_of() == ROW_WARP) prepare<NOPE_BOXES, DV>(p, tile);
  } else {
    registers_increase<PREFILL_CONSUMER_REGISTERS>();
    Consumer<E, NOPE_BOXES, DV> consumer(p, tile);
    if (tile.blocks > 0) consumer.run();
    consumer.store();
  }
}

}  // namespace dq

// ---- 主机侧 ----

cudaError_t make_maps(const Params &p, Boxes box, Maps *maps) {
  const dso_mla_inputs &in = p.in.in;
  int64_t width = in.nope_dim + in.v_dim, row = p.in.heads * width;
  int64_t t_step = in.t == 1 ? in.q_hs * in.heads : in.q_ts;  // 只有一个的一维，步长随便
  TensorBox q{in.q,
              p.in.dtype,
              4,
              {in.nope_dim + in.rope_dim, in.heads, in.t, in.b},
              {1, in.q_hs, t_step, in.q_bs},
              {BOX_COLUMNS, 1, box.queries, 1}};
  TensorBox grad{p.grad,
                 p.in.dtype,
                 4,
                 {in.v_dim, in.heads, in.t, in.b},
                 {1, in.v_dim, in.heads * in.v_dim, in.t * in.heads * in.v_dim},
                 {BOX_COLUMNS, 1, box.queries, 1}};
  TensorBox k{p.in.kv,
              p.in.dtype,
              4,
              {in.nope_dim, p.in.heads, in.s, in.b},
              {1, width, row, in.s * row},
              {BOX_COLUMNS, 1, box.keys, 1}};
  TensorBox v = k;
  v.base = static_cast<const uint16_t *>(p.in.kv) + in.nope_dim, v.dims[0] = in.v_dim;
  TensorBox rope{in.rope,
                 p.in.dtype,
                 4,
                 {in.rope_dim, 1, in.s, in.b},
                 {1, in.rope_dim, in.rope_ts, in.rope_bs},
                 {BOX_COLUMNS, 1, box.keys, 1}};
  cudaError_t error = make_tensor_map(&maps->q, q);
  if (error == cudaSuccess) error = make_tensor_map(&maps->grad, grad);
  if (error == cudaSuccess) error = make_tensor_map(&maps->k, k);
  if (error == cudaSuccess) error = make_tensor_map(&maps->v, v);
  // 没有旋转部分：借用 K 的描述，从界外读。
  if (error == cudaSuccess) error = make_tensor_map(&maps->rope, in.rope_dim > 0 ? rope : k);
  return error;
}

template <class E, int NOPE_BOXES, int DV>
cudaError_t run(const Params *p, cudaStream_t stream) {
  const dso_mla_inputs &in = p->in.in;
  int64_t key_tiles = in.b * ceil_div(in.s, dkv::KEYS);
  Maps maps;
  cudaError_t error = make_maps(*p, {dkv::QUERIES, dkv::KEYS}, &maps);
  if (error != cudaSuccess) return error;
  error = launch(dkv::mla_backward_dkv_sm90<E, NOPE_BOXES, DV>,
                 dim3(static_cast<unsigned>(key_tiles * p->in.heads)), dim3(THREADS),
                 dkv::Layout<NOPE_BOXES, DV>::BYTES, stream, maps, *p);
  if (error == cudaSuccess) error = make_maps(*p, {dq::ROWS, dq::KEYS}, &maps);
  if (error != cudaSuccess) return error;
  return launch(dq::mla_backward_dq_sm90<E, NOPE_BOXES, DV>,
                dim3(static_cast<unsigned>(dq::tiles(in) * p->in.heads)), dim3(THREADS),
                dq::Layout<NOPE_BOXES, DV>::BYTES, stream, maps, *p);
}

template <class E>
cudaError_t pick(const Params *p, cudaStream_t stream) {
  if (p->in.in.nope_dim <= 64 && p->in.in.v_dim <= 64) return run<E, 1, 64>(p, stream);
  return run<E, 2, 128>(p, stream);
}

}  // namespace

namespace dso {

bool backward_sm90_fits(const dso_mla_inputs &in, const Device &device) {
  return prefill_sm90_fits(in, device) && device.shared_limit >= dkv::Layout<2, 128>::BYTES &&
         device.shared_limit >= dq::Layout<2, 128>::BYTES;
}

cudaError_t run_backward_sm90(const Params *p, cudaStream_t stream) {
  return p->in.dtype == DSO_BF16 ? pick<Bf16>(p, stream) : pick<F16>(p, stream);
}

}  // namespace dso
