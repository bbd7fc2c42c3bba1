// 展开式注意力的前向（Hopper）：TMA 搬运，wgmma 累加；K、V 的展开与按头分组同 mla_prefill.cu。
//
// CTA 常驻，一个 SM 一个，依次做几块（128 个查询、一个头）：一块收尾时下一块的 Q、K、V 已经在路上。块从长到短排好，
// 来回折着分，各 CTA 分到的总长相近。一个生产者 warp，两个消费者组（4 个 warp）各 64 行。做法见 FlashAttention-3
// （arXiv 2407.08608）：每一步先发出下一块的得分与这一块的 P · V，再算下一块的 softmax，两种运算因此重叠；
// 两组轮流发（具名屏障），一组算 softmax 时另一组占着矩阵单元。P 留在寄存器里。
//
// span 末尾之后的 V 可能是别人的 NaN（0 * NaN 会混进来），所以最后一块的那些行在共享内存里清零；被 kv_mask
// 遮住的由调用者在展开之前清零（mla_latents.cu）。
#include "mla_prefill_sm90.cuh"

namespace {

using namespace dso;

constexpr int ROWS = PREFILL_ROWS, KEYS = PREFILL_KEYS_SM90, STAGES = 2;
constexpr int GROUP = 4 * WARP, GROUPS = 2, CONSUMERS = GROUPS * GROUP;
constexpr int THREADS = CONSUMERS + GROUP;  // 生产者占一组，只有一个线程干活：寄存器才让得出来
constexpr int SCORES = KEYS / 2;            // 每线程的得分数
// 具名屏障：轮到哪一组（一组一个）、最后一块清零了、组内的（一组一个）。
constexpr int TURN_BARRIER = 1, TAIL_BARRIER = TURN_BARRIER + GROUPS;
constexpr int GROUP_BARRIER = TAIL_BARRIER + 1;

// 共享内存：Q、各级的 K（含旋转部分）与 V，都由 64 列的块组成；末尾是 mbarrier。算完之后结果经 Q 的位置写出。
template <int NOPE_BOXES, int DV>
struct Layout {
  static constexpr int K_BOXES = NOPE_BOXES + 1, V_BOXES = DV / BOX_COLUMNS;
  static constexpr int Q_BOX = ROWS * BOX_ROW, KEY_BOX = KEYS * BOX_ROW;
  static constexpr int K_STAGE = K_BOXES * KEY_BOX, V_STAGE = V_BOXES * KEY_BOX;
  static constexpr int K = K_BOXES * Q_BOX, V = K + STAGES * K_STAGE;
  static constexpr int BARRIERS = V + STAGES * V_STAGE;
  static constexpr int BYTES = BARRIERS + (2 + 4 * STAGES) * 8;
};

template <int NOPE_BOXES, int DV>
struct Shared {
  using L = Layout<NOPE_BOXES, DV>;
  unsigned char *base = dynamic_shared();

  __device__ unsigned char *k(int block) const { return base + L::K + block % STAGES * L::K_STAGE; }
  __device__ unsigned char *v(int block) const { return base + L::V + block % STAGES * L::V_STAGE; }
  __device__ uint64_t *barrier(int i) const {
    return reinterpret_cast<uint64_t *>(base + L::BARRIERS) + i;
  }
  __device__ uint64_t *q_full() const { return barrier(0); }
  __device__ uint64_t *q_empty() const { return barrier(1); }
  // block 是这个 CTA 从头数起的第几块键。
  __device__ uint64_t *k_full(int block) const { return barrier(2 + block % STAGES); }
  __device__ uint64_t *k_empty(int block) const { return barrier(2 + STAGES + block % STAGES); }
  __device__ uint64_t *v_full(int block) const { return barrier(2 + 2 * STAGES + block % STAGES); }
  __device__ uint64_t *v_empty(int block) const { return barrier(2 + 3 * STAGES + block % STAGES); }
  // 第 block 块用它那一级的第几轮：full 等这一轮的奇偶，empty 等上一轮的。
  __device__ static int parity(int block) { return block / STAGES % 2; }

  __device__ void start() const {
    mbarrier_init(q_full(), 1), mbarrier_init(q_empty(), CONSUMERS / WARP);
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(k_full(i), 1), mbarrier_init(v_full(i), 1);
      mbarrier_init(k_empty(i), CONSUMERS / WARP), mbarrier_init(v_empty(i), CONSUMERS / WARP);
    }
    mbarrier_init_fence();
  }
};

// 一块工作：span 里从 first 起的 ROWS 个查询、组内第 head 个头，看前 blocks 块键。
struct Tile {
  Place at;
  int first, head, blocks;
};

// 这个 CTA 的各块工作；整个 warp 一起调用。靠后的查询看得多、耗时长，排在前面。
template <class Run>
__device__ void each_tile(const dso_cuda_mla_prefill_params &p, int tiles, Run run) {
  int ctas = static_cast<int>(gridDim.x), cta = static_cast<int>(blockIdx.x);
  int heads = static_cast<int>(p.heads);
  int64_t total = static_cast<int64_t>(tiles) * heads;
  for (int64_t wave = 0; wave * ctas < total; wave++) {
    int64_t n = wave * ctas + (wave % 2 == 0 ? cta : ctas - 1 - cta);
    Tile tile;
    if (n >= total || !find_tile(p.in, ROWS, tiles - 1 - n / heads, &tile.at, &tile.first))
      continue;
    tile.head = static_cast<int>(n % heads);
    int last = tile.first + ROWS < tile.at.q_len ? tile.first + ROWS : tile.at.q_len;
    int keys = visible_keys(p.in, tile.at, last - 1);
    tile.blocks = keys > 0 ? (keys + KEYS - 1) / KEYS : 0;
    run(tile);
  }
}

// 一个线程发出全部拷贝。
template <int NOPE_BOXES, int DV>
struct Producer {
  using L = Layout<NOPE_BOXES, DV>;
  using S = Shared<NOPE_BOXES, DV>;

  const PrefillMaps &maps;
  const dso_cuda_mla_prefill_params &p;
  S shared;
  int turn = 0, block = 0;  // 第几块工作，第几块键

  __device__ Producer(const PrefillMaps &m, const dso_cuda_mla_prefill_params &params)
      : maps(m), p(params) {}

  __device__ void load_queries(const Tile &tile) {
    auto t = static_cast<int>(p.in.t);
    mbarrier_wait(shared.q_empty(), turn % 2 ^ 1);
    mbarrier_expect(shared.q_full(), L::K_BOXES * L::Q_BOX);
    load_q<NOPE_BOXES>(maps, p.in, tile.at.q_begin / t, tile.at.q_begin % t + tile.first,
                       static_cast<int>(p.first_head) + tile.head, shared.base, L::Q_BOX,
                       shared.q_full());
  }

  __device__ void load_keys(const Tile &tile, int slot) {
    mbarrier_wait(shared.k_empty(block), S::parity(block) ^ 1);
    mbarrier_expect(shared.k_full(block), L::K_STAGE);
    load_k<NOPE_BOXES>(maps, p.in, tile.at.row, slot, tile.head, shared.k(block), L::KEY_BOX,
                       shared.k_full(block));
  }

  __device__ void load_values(const Tile &tile, int slot) {
    mbarrier_wait(shared.v_empty(block), S::parity(block) ^ 1);
    mbarrier_expect(shared.v_full(block), L::V_STAGE);
    load_v<L::V_BOXES>(maps, tile.at.row, slot, tile.head, shared.v(block), L::KEY_BOX,
                       shared.v_full(block));
  }

  __device__ void run(const Tile &tile) {
    load_queries(tile);
    turn++;
    for (int i = 0; i < tile.blocks; i++, block++) {
      load_keys(tile, tile.at.slot + i * KEYS);
      load_values(tile, tile.at.slot + i * KEYS);
    }
  }
};

template <class E, int NOPE_BOXES, int DV>
struct Consumer {
  using L = Layout<NOPE_BOXES, DV>;
  using S = Shared<NOPE_BOXES, DV>;
  static constexpr bool BF16 = E::dtype == DSO_BF16;

  const dso_cuda_mla_prefill_params &p;
  const dso_mla_inputs &in;
  S shared;
  int group, warp, lane;
  uint64_t queries;        // 描述符
  int turn = 0, base = 0;  // 第几块工作；这块工作的第 0 块键是第几块
  Place at;
  int head, first, blocks, row;  // row：这个线程的第一行（span 内），另一行再加 8

  float o[DV / 2];
  float s[SCORES];
  uint32_t prob[KEYS / 16][4];
  float m[2], l[2], keep[2];  // m：基准

  __device__ explicit Consumer(const dso_cuda_mla_prefill_params &params)
      : p(params),
        in(params.in),
        group(static_cast<int>(threadIdx.x) / GROUP),
        warp(static_cast<int>(threadIdx.x) / WARP),
        lane(static_cast<int>(threadIdx.x) % WARP),
        queries(uniform(k_major(shared.base + group * 64 * BOX_ROW))) {
    if (group == 1) named_barrier_arrive(TURN_BARRIER, CONSUMERS);  // 第 0 组先走
  }

  __device__ void begin(const Tile &tile) {
    at = tile.at, head = tile.head, first = tile.first, blocks = tile.blocks;
    row = first + warp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < DV / 2; i++) o[i] = 0.0f;
    m[0] = m[1] = -INFINITY, l[0] = l[1] = 0.0f;
  }

  __device__ void release(uint64_t *barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // 第 block 块的键、值的描述符；轮到之前先算好。
  __device__ uint64_t keys_at(int block) const { return uniform(k_major(shared.k(base + block))); }
  __device__ uint64_t values_at(int block) const {
    return uniform(mn_major(shared.v(base + block), L::KEY_BOX));
  }

  __device__ void score(uint64_t keys) {
#pragma unroll
    for (int c = 0; c < L::K_BOXES * 4; c++)
      wgmma<BF16, 0, 0>(s, advance(queries, c / 4 * L::Q_BOX + c % 4 * 32),
                        advance(keys, c / 4 * L::KEY_BOX + c % 4 * 32), c > 0);
    wgmma_commit();
  }

  __device__ void accumulate(uint64_t values) {
#pragma unroll
    for (int c = 0; c < KEYS / 16; c++)
      wgmma<BF16, 1>(o, prob[c], advance(values, c * 16 * BOX_ROW), true);
    wgmma_commit();
  }

  // 只有跨过因果的边、到了末尾或有遮盖的块才逐个判断。
  __device__ void hide(int block) {
    int end = (block + 1) * KEYS, first = row - lane / 4;
    bool all = end <= at.kv_len && first + 16 <= at.q_len && end <= visible_keys(in, at, first);
    if (all && !in.kv_mask) return;
    uint32_t seen = mask_bits(block);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int limit = row + 8 * h < at.q_len ? visible_keys(in, at, row + 8 * h) : 0;
      limit -= block * KEYS + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < KEYS / 4; i++) {
        int key = i / 2 * 8 + i % 2, to = i / 2 * 4 + 2 * h + i % 2;
        s[to] = key < limit && (seen >> i & 1) ? s[to] : -INFINITY;
      }
    }
  }

  // 这个线程的 32 个键（8 j + e）各一位；先收成一个数，免得许多读占着寄存器。
  __device__ uint32_t mask_bits(int block) const {
    if (!in.kv_mask) return ~0u;
    int first = block * KEYS + lane % 4 * 2;
    uint32_t bits = 0;
#pragma unroll 2
    for (int i = 0; i < KEYS / 4; i++) {
      int key = first + i / 2 * 8 + i % 2;
      bool seen = key < at.kv_len && slot_seen(in, at, at.slot + key);
      bits |= static_cast<uint32_t>(seen) << i;
    }
    return bits;
  }

  // 第 h 行的最大值。
  __device__ float row_top(int h) const {
    float x[KEYS / 8];
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) x[j] = fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]);
    return quad_max(max_of(x));
  }

  // 得分就地换成概率；keep 是旧结果的缩放，返回要不要缩放（整个 warp 一致）。
  __device__ bool softmax(int block) {
    hide(block);
    float scale = score_scale(in);
    bool moved = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      moved |= rebase(row_top(h) * scale, &m[h], &keep[h]);
      float base = finite_max(m[h]), sum = 0.0f;
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float &x = s[4 * j + 2 * h + e];
          x = fast_exp2(x * scale - base);
          sum += x;
        }
      l[h] = l[h] * keep[h] + sum;
    }
    return __any_sync(ALL_LANES, moved);
  }

  // 概率的片段就是 P · V 的左操作数片段。
  __device__ void pack() {
#pragma unroll
    for (int c = 0; c < KEYS / 16; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int at0 = 4 * (2 * c + i / 2) + 2 * (i % 2);
        prob[c][i] = E::pack(s[at0], s[at0 + 1]);
      }
  }

  __device__ void rescale() {
#pragma unroll
    for (int i = 0; i < DV / 2; i++) o[i] *= keep[i / 2 % 2];
  }

  // 最后一块里 span 末尾之后的 V 清零；两组都到了才能用。
  __device__ void clear_tail() {
    int count = at.kv_len - (blocks - 1) * KEYS;
    if (count >= KEYS) return;
    unsigned char *v = shared.v(base + blocks - 1);
    for (int i = count * 8 + static_cast<int>(threadIdx.x); i < KEYS * 8; i += CONSUMERS)
      for (int box = 0; box < L::V_BOXES; box++)
        *reinterpret_cast<uint4 *>(v + box * L::KEY_BOX + i * 16) = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    named_barrier_sync(TAIL_BARRIER, CONSUMERS);
  }

  __device__ void attend() {
    mbarrier_wait(shared.k_full(base), S::parity(base));
    wgmma_fence();
    score(keys_at(0));
    wgmma_wait<0>();
    wgmma_settle(s);
    release(shared.k_empty(base));
    softmax(0);
    pack();
    for (int block = 1; block < blocks; block++) {
      int now = base + block;
      mbarrier_wait(shared.k_full(now), S::parity(now));
      mbarrier_wait(shared.v_full(now - 1), S::parity(now - 1));
      uint64_t keys = keys_at(block), values = values_at(block - 1);
      named_barrier_sync(TURN_BARRIER + group, CONSUMERS);
      wgmma_fence();
      score(keys);
      accumulate(values);
      named_barrier_arrive(TURN_BARRIER + 1 - group, CONSUMERS);
      wgmma_wait<1>();
      wgmma_settle(s);
      release(shared.k_empty(now));
      bool moved = softmax(block);
      wgmma_wait<0>();
      wgmma_settle(o);
      release(shared.v_empty(now - 1));
      if (moved) rescale();
      pack();
    }
    int last = base + blocks - 1;
    mbarrier_wait(shared.v_full(last), S::parity(last));
    clear_tail();
    wgmma_fence();
    accumulate(values_at(blocks - 1));
    wgmma_wait<0>();
    wgmma_settle(o);
    release(shared.v_empty(last));
  }

  // 经共享内存（Q 里这个 warp 的 16 行）换成整行写出。
  __device__ void store() {
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = quad_sum(l[h]);
      inverse[h] = inverse_of(sum);
      int64_t to = (at.q_begin + row + 8 * h) * in.heads + p.first_head + head;
      if (lane % 4 == 0 && row + 8 * h < at.q_len)
        p.lse[to] = sum == 0.0f ? -INFINITY : m[h] / LOG2_E + logf(sum);
    }
    named_barrier_sync(GROUP_BARRIER + group, GROUP);  // 没有 warp 还在读 Q
#pragma unroll
    for (int i = 0; i < DV / 2; i += 8) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; j++)
        pairs[j] = E::pack(o[i + 2 * j] * inverse[j % 2], o[i + 2 * j + 1] * inverse[j % 2]);
      stmatrix_x4(staged(lane % 16, i * 2 + lane / 16 * 8), pairs);
    }
    __syncwarp();
    for (int i = lane; i < 16 * (DV / 8); i += WARP) {
      int line = i / (DV / 8), column = i % (DV / 8) * 8, query = first + warp * 16 + line;
      if (query >= at.q_len || column >= in.v_dim) continue;  // dv 是 8 的倍数
      int64_t to = (at.q_begin + query) * in.heads + p.first_head + head;
      *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(p.out) + to * in.v_dim + column) =
          *reinterpret_cast<const uint4 *>(staged(line, column));
    }
    fence_proxy_async();
    __syncwarp();
    release(shared.q_empty());
  }

  // 结果的第 line 行（这个 warp 内）第 column 列在共享内存里的位置。
  __device__ unsigned char *staged(int line, int column) const {
    return shared.base + column / BOX_COLUMNS * L::Q_BOX +
           swizzled(warp * 16 + line, column % BOX_COLUMNS);
  }

  __device__ void run(const Tile &tile) {
    begin(tile);
    mbarrier_wait(shared.q_full(), turn % 2);
    if (blocks > 0) attend();
    store();
    turn++, base += blocks;
  }
};

template <class E, int NOPE_BOXES, int DV>
__global__ __launch_bounds__(THREADS,
                             1) void mla_prefill_sm90(const __grid_constant__ PrefillMaps maps,
                                                      dso_cuda_mla_prefill_params p, int tiles) {
  if (threadIdx.x == 0) Shared<NOPE_BOXES, DV>().start();
  __syncthreads();
  grid_wait();
  if (threadIdx.x >= CONSUMERS) {
    registers_decrease<PREFILL_PRODUCER_REGISTERS>();
    if (threadIdx.x >= CONSUMERS + WARP) return;
    Producer<NOPE_BOXES, DV> producer(maps, p);
    each_tile(p, tiles, [&](const Tile &tile) {
      if (threadIdx.x == CONSUMERS) producer.run(tile);
      __syncwarp();
    });
  } else {
    registers_increase<PREFILL_CONSUMER_REGISTERS>();
    Consumer<E, NOPE_BOXES, DV> consumer(p);
    each_tile(p, tiles, [&](const Tile &tile) { consumer.run(tile); });
  }
}

template <class E, int NOPE_BOXES, int DV>
cudaError_t run(const dso_cuda_mla_prefill_params *p, int tiles, int sms, cudaStream_t stream) {
  PrefillMaps maps;
  cudaError_t error = make_prefill_maps(*p, ROWS, KEYS, &maps);
  if (error != cudaSuccess) return error;
  int64_t total = tiles * p->heads;
  auto ctas = static_cast<unsigned>(total < sms ? total : sms);
  return launch(mla_prefill_sm90<E, NOPE_BOXES, DV>, dim3(ctas), dim3(THREADS),
                Layout<NOPE_BOXES, DV>::BYTES, stream, maps, *p, tiles);
}

template <class E>
cudaError_t pick(const dso_cuda_mla_prefill_params *p, int tiles, int sms, cudaStream_t stream) {
  if (p->in.nope_dim <= 64 && p->in.v_dim <= 64) return run<E, 1, 64>(p, tiles, sms, stream);
  return run<E, 2, 128>(p, tiles, sms, stream);
}

}  // namespace

namespace dso {

bool prefill_sm90_fits(const dso_mla_inputs &in, const Device &device) {
  auto positive = [](int64_t a, int64_t b) { return a > 0 && b > 0; };
  return device.major == 9 && device.shared_limit >= SHARED_SM90 && !in.pages && in.nope_dim > 0 &&
         in.nope_dim <= 128 && in.rope_dim <= 64 && in.v_dim <= 128 &&
         positive(in.q_hs, in.t == 1 ? 1 : in.q_ts) && (in.q_bs > 0 || in.b == 1) &&
         positive(in.s == 1 ? 1 : in.rope_ts, in.b == 1 ? 1 : in.rope_bs);
}

cudaError_t run_prefill_sm90(const dso_cuda_mla_prefill_params *p, int tiles, int sms,
                             cudaStream_t stream) {
  return p->dtype == DSO_BF16 ? pick<Bf16>(p, tiles, sms, stream)
                              : pick<F16>(p, tiles, sms, stream);
}

}  // namespace dso
