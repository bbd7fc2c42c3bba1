// 展开式注意力的反向（Hopper）：dK、dV。做法见 mla_prefill_backward_sm90.cuh。
#include <climits>

#include "mla_prefill_backward_sm90.cuh"

namespace {

using namespace dso;
using namespace dso::backward;

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
    load_k<NOPE_BOXES>(maps.in, in, tile.row, tile.first, tile.head, shared.k(), L::KEY_BOX,
                       shared.kv_full());
    load_v<L::V_BOXES>(maps.in, tile.row, tile.first, tile.head, shared.v(), L::KEY_BOX,
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
      load_q<NOPE_BOXES>(maps.in, in, row, token, head, shared.q(stage), L::BOX, landed);
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
  grid_wait();
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

// ---- 主机侧 ----

template <class E, int NOPE_BOXES, int DV>
cudaError_t run(const Params &p, cudaStream_t stream) {
  static_assert(Layout<NOPE_BOXES, DV>::BYTES <= SHARED_SM90, "共享内存放不下");
  Maps maps;
  cudaError_t error = make_maps(p, QUERIES, KEYS, &maps);
  if (error != cudaSuccess) return error;
  return launch(mla_backward_dkv_sm90<E, NOPE_BOXES, DV>,
                dim3(static_cast<unsigned>(p.in.in.b * ceil_div(p.in.in.s, KEYS) * p.in.heads)),
                dim3(THREADS), Layout<NOPE_BOXES, DV>::BYTES, stream, maps, p);
}

template <class E>
cudaError_t pick(const Params &p, cudaStream_t stream) {
  if (p.in.in.nope_dim <= 64 && p.in.in.v_dim <= 64) return run<E, 1, 64>(p, stream);
  return run<E, 2, 128>(p, stream);
}

}  // namespace

cudaError_t dso::run_backward_dkv_sm90(const Params &p, cudaStream_t stream) {
  return p.in.dtype == DSO_BF16 ? pick<Bf16>(p, stream) : pick<F16>(p, stream);
}
