// 展开式注意力的反向（Hopper）：dQ。做法见 mla_prefill_backward_sm90.cuh。
#include "mla_prefill_backward_sm90.cuh"

namespace {

using namespace dso;
using namespace dso::backward;

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
  load_q<NOPE_BOXES>(maps.in, in, row, token, full_head, shared.q(), L::Q_BOX, shared.q_full());
  load_grad<L::V_BOXES>(maps, row, token, full_head, shared.grad(), L::Q_BOX, shared.q_full());
  for (int block = 0; block < tile.blocks; block++) {
    int slot = at.slot + block * KEYS;
    mbarrier_wait(shared.k_empty(block), S::parity(block) ^ 1);
    mbarrier_expect(shared.k_landed(block), L::K_STAGE);
    load_k<NOPE_BOXES>(maps.in, in, at.row, slot, tile.head, shared.k(block), L::BOX,
                       shared.k_landed(block));
    mbarrier_wait(shared.v_empty(), block % 2 ^ 1);
    mbarrier_expect(shared.v_full(), L::V_STAGE);
    load_v<L::V_BOXES>(maps.in, at.row, slot, tile.head, shared.v(), L::BOX, shared.v_full());
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
  grid_wait();
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

// ---- 主机侧 ----

template <class E, int NOPE_BOXES, int DV>
cudaError_t run(const Params &p, cudaStream_t stream) {
  static_assert(Layout<NOPE_BOXES, DV>::BYTES <= SHARED_SM90, "共享内存放不下");
  Maps maps;
  cudaError_t error = make_maps(p, ROWS, KEYS, &maps);
  if (error != cudaSuccess) return error;
  return launch(mla_backward_dq_sm90<E, NOPE_BOXES, DV>,
                dim3(static_cast<unsigned>(tiles(p.in.in) * p.in.heads)), dim3(THREADS),
                Layout<NOPE_BOXES, DV>::BYTES, stream, maps, p);
}

template <class E>
cudaError_t pick(const Params &p, cudaStream_t stream) {
  if (p.in.in.nope_dim <= 64 && p.in.in.v_dim <= 64) return run<E, 1, 64>(p, stream);
  return run<E, 2, 128>(p, stream);
}

}  // namespace

cudaError_t dso::run_backward_dq_sm90(const Params &p, cudaStream_t stream) {
  return p.in.dtype == DSO_BF16 ? pick<Bf16>(p, stream) : pick<F16>(p, stream);
}
