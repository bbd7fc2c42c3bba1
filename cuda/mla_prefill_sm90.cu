// 展开式注意力的前向（Hopper）：TMA 搬运，wgmma 累加；K、V 的展开与按头分组同 mla_prefill.cu。
//
// 一块 128 个查询、一个头：一个生产者 warp，两个消费者组（4 个 warp）各 64 行。做法见 FlashAttention-3
// （arXiv 2407.08608）：每一步先发出下一块的得分与这一块的 P · V，再算下一块的 softmax，两种运算因此重叠；
// 两组轮流发（具名屏障），一组算 softmax 时另一组占着矩阵单元。P 留在寄存器里。
//
// span 末尾之后的 V 可能是别人的 NaN（0 * NaN 会混进来），所以最后一块的那些行在共享内存里清零；被 kv_mask
// 遮住的由调用者在展开之前清零（mla_latents.cu）。
#include <tma.cuh>

#include "mla_prefill.cuh"
#include "tile_sm90.cuh"

namespace {

using namespace dso;

constexpr int ROWS = PREFILL_ROWS, KEYS = PREFILL_KEYS_SM90, STAGES = 2;
constexpr int GROUP = 4 * WARP, GROUPS = 2, CONSUMERS = GROUPS * GROUP;
constexpr int THREADS = CONSUMERS + GROUP;  // 生产者占一组，只有一个线程干活：寄存器才让得出来
constexpr int SCORES = KEYS / 2;            // 每线程的得分数
constexpr int TURN_BARRIER = 1, TAIL_BARRIER = TURN_BARRIER + GROUPS;

struct Maps {
  CUtensorMap q, k, v, rope;
};

// 共享内存：Q、各级的 K（含旋转部分）与 V，都由 64 列的块组成；末尾是 mbarrier。
template <int NOPE_BOXES, int DV>
struct Layout {
  static constexpr int K_BOXES = NOPE_BOXES + 1, V_BOXES = DV / BOX_COLUMNS;
  static constexpr int Q_BOX = ROWS * BOX_ROW, KEY_BOX = KEYS * BOX_ROW;
  static constexpr int K_STAGE = K_BOXES * KEY_BOX, V_STAGE = V_BOXES * KEY_BOX;
  static constexpr int K = K_BOXES * Q_BOX, V = K + STAGES * K_STAGE;
  static constexpr int BARRIERS = V + STAGES * V_STAGE;
  static constexpr int BYTES = BARRIERS + (1 + 4 * STAGES) * 8;
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
  __device__ uint64_t *k_full(int block) const { return barrier(1 + block % STAGES); }
  __device__ uint64_t *k_empty(int block) const { return barrier(1 + STAGES + block % STAGES); }
  __device__ uint64_t *v_full(int block) const { return barrier(1 + 2 * STAGES + block % STAGES); }
  __device__ uint64_t *v_empty(int block) const { return barrier(1 + 3 * STAGES + block % STAGES); }
  // 第 block 块用它那一级的第几轮：full 等这一轮的奇偶，empty 等上一轮的。
  __device__ static int parity(int block) { return block / STAGES % 2; }

  __device__ void start() const {
    mbarrier_init(q_full(), 1);
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(k_full(i), 1), mbarrier_init(v_full(i), 1);
      mbarrier_init(k_empty(i), CONSUMERS / WARP), mbarrier_init(v_empty(i), CONSUMERS / WARP);
    }
    mbarrier_init_fence();
  }
};

// 一个线程发出全部拷贝。
template <int NOPE_BOXES, int DV>
__device__ void produce(const Maps &maps, const dso_mla_inputs &in, const Place &at, int first,
                        int full_head, int head, int blocks) {
  using L = Layout<NOPE_BOXES, DV>;
  Shared<NOPE_BOXES, DV> shared;
  int nope = static_cast<int>(in.nope_dim), t = static_cast<int>(in.t);
  mbarrier_expect(shared.q_full(), L::K_BOXES * L::Q_BOX);
  for (int i = 0; i < L::K_BOXES; i++)
    tma_load(shared.base + i * L::Q_BOX, &maps.q, shared.q_full(),
             i < NOPE_BOXES ? i * BOX_COLUMNS : nope, full_head, at.q_begin % t + first,
             at.q_begin / t);
  for (int block = 0; block < blocks; block++) {
    int slot = at.slot + block * KEYS;
    mbarrier_wait(shared.k_empty(block), Shared<NOPE_BOXES, DV>::parity(block) ^ 1);
    mbarrier_expect(shared.k_full(block), L::K_STAGE);
    for (int i = 0; i < NOPE_BOXES; i++)
      tma_load(shared.k(block) + i * L::KEY_BOX, &maps.k, shared.k_full(block), i * BOX_COLUMNS,
               head, slot, at.row);
    // 没有旋转部分时从界外读：TMA 填 0，得分的循环不必分两种。
    tma_load(shared.k(block) + NOPE_BOXES * L::KEY_BOX, &maps.rope, shared.k_full(block),
             in.rope_dim > 0 ? 0 : NOPE_BOXES * BOX_COLUMNS, 0, slot, at.row);
    mbarrier_wait(shared.v_empty(block), Shared<NOPE_BOXES, DV>::parity(block) ^ 1);
    mbarrier_expect(shared.v_full(block), L::V_STAGE);
    for (int i = 0; i < L::V_BOXES; i++)
      tma_load(shared.v(block) + i * L::KEY_BOX, &maps.v, shared.v_full(block), i * BOX_COLUMNS,
               head, slot, at.row);
  }
}

template <class E, int NOPE_BOXES, int DV>
struct Consumer {
  using L = Layout<NOPE_BOXES, DV>;
  using S = Shared<NOPE_BOXES, DV>;
  static constexpr bool BF16 = E::dtype == DSO_BF16;

  const dso_cuda_mla_prefill_params &p;
  const dso_mla_inputs &in;
  const Place &at;
  S shared;
  int head, blocks, group, lane, row;  // row：这个线程的第一行（span 内），另一行再加 8

  float o[DV / 2] = {};
  float s[SCORES];
  uint32_t prob[KEYS / 16][4];
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f}, keep[2];

  __device__ Consumer(const dso_cuda_mla_prefill_params &params, const Place &place, int first,
                      int h, int n)
      : p(params),
        in(params.in),
        at(place),
        head(h),
        blocks(n),
        group(static_cast<int>(threadIdx.x) / GROUP),
        lane(static_cast<int>(threadIdx.x) % WARP) {
    row = first + static_cast<int>(threadIdx.x) / WARP * 16 + lane / 4;
  }

  __device__ void release(uint64_t *barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  }

  __device__ void score(int block) {
    uint64_t q = k_major(shared.base + group * 64 * BOX_ROW), k = k_major(shared.k(block));
#pragma unroll
    for (int c = 0; c < L::K_BOXES * 4; c++)
      wgmma<BF16, 0, 0>(s, advance(q, c / 4 * L::Q_BOX + c % 4 * 32),
                        advance(k, c / 4 * L::KEY_BOX + c % 4 * 32), c > 0);
    wgmma_commit();
  }

  __device__ void accumulate(int block) {
    uint64_t v = mn_major(shared.v(block), L::KEY_BOX);
#pragma unroll
    for (int c = 0; c < KEYS / 16; c++)
      wgmma<BF16, 1>(o, prob[c], advance(v, c * 16 * BOX_ROW), true);
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

  // 得分就地换成概率；keep 是旧结果的缩放。
  __device__ void softmax(int block) {
    hide(block);
    float scale = score_scale(in);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = s[2 * h];
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++)
        top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      top = fmaxf(m[h], quad_max(top) * scale);
      float base = finite_max(top), sum = 0.0f;
      keep[h] = fast_exp2(m[h] - base), m[h] = top;
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
    unsigned char *v = shared.v(blocks - 1);
    for (int i = count * 8 + static_cast<int>(threadIdx.x); i < KEYS * 8; i += CONSUMERS)
      for (int box = 0; box < L::V_BOXES; box++)
        *reinterpret_cast<uint4 *>(v + box * L::KEY_BOX + i * 16) = make_uint4(0, 0, 0, 0);
    fence_proxy_async();
    named_barrier_sync(TAIL_BARRIER, CONSUMERS);
  }

  __device__ void run() {
    mbarrier_wait(shared.q_full(), 0);
    if (group == 1) named_barrier_arrive(TURN_BARRIER, CONSUMERS);  // 第 0 组先走
    mbarrier_wait(shared.k_full(0), 0);
    wgmma_fence();
    score(0);
    wgmma_wait<0>();
    wgmma_settle(s);
    release(shared.k_empty(0));
    softmax(0);
    pack();
    for (int block = 1; block < blocks; block++) {
      mbarrier_wait(shared.k_full(block), S::parity(block));
      mbarrier_wait(shared.v_full(block - 1), S::parity(block - 1));
      named_barrier_sync(TURN_BARRIER + group, CONSUMERS);
      wgmma_fence();
      score(block);
      accumulate(block - 1);
      named_barrier_arrive(TURN_BARRIER + 1 - group, CONSUMERS);
      wgmma_wait<1>();
      wgmma_settle(s);
      release(shared.k_empty(block));
      softmax(block);
      wgmma_wait<0>();
      wgmma_settle(o);
      release(shared.v_empty(block - 1));
      rescale();
      pack();
    }
    mbarrier_wait(shared.v_full(blocks - 1), S::parity(blocks - 1));
    clear_tail();
    wgmma_fence();
    accumulate(blocks - 1);
    wgmma_wait<0>();
    wgmma_settle(o);
  }

  __device__ void store() {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = quad_sum(l[h]);
      if (row + 8 * h >= at.q_len) continue;
      int64_t to = (at.q_begin + row + 8 * h) * in.heads + p.first_head + head;
      if (lane % 4 == 0) p.lse[to] = sum == 0.0f ? -INFINITY : m[h] / LOG2_E + logf(sum);
      float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
      for (int j = 0; j < DV / 8; j++) {
        int column = j * 8 + lane % 4 * 2;
        if (column >= in.v_dim) continue;  // dv 是 8 的倍数，两列同在
        auto *pair =
            reinterpret_cast<uint32_t *>(static_cast<uint16_t *>(p.out) + to * in.v_dim + column);
        *pair = E::pack(o[4 * j + 2 * h] * inverse, o[4 * j + 2 * h + 1] * inverse);
      }
    }
  }
};

template <class E, int NOPE_BOXES, int DV>
__global__ __launch_bounds__(THREADS, 1) void mla_prefill_sm90(const __grid_constant__ Maps maps,
                                                               dso_cuda_mla_prefill_params p) {
  Place at;
  int first, head = static_cast<int>(blockIdx.y);
  // 靠后的查询看得多、耗时长，先做。
  if (!find_tile(p.in, ROWS, gridDim.x - 1 - blockIdx.x, &at, &first)) return;
  int last = first + ROWS < at.q_len ? first + ROWS : at.q_len;
  int blocks = (visible_keys(p.in, at, last - 1) + KEYS - 1) / KEYS;
  if (threadIdx.x == 0) Shared<NOPE_BOXES, DV>().start();
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    registers_decrease<PREFILL_PRODUCER_REGISTERS>();
    if (threadIdx.x == CONSUMERS && blocks > 0)
      produce<NOPE_BOXES, DV>(maps, p.in, at, first, static_cast<int>(p.first_head) + head, head,
                              blocks);
  } else {
    registers_increase<PREFILL_CONSUMER_REGISTERS>();
    Consumer<E, NOPE_BOXES, DV> consumer(p, at, first, head, blocks);
    if (blocks > 0) consumer.run();
    consumer.store();
  }
}

cudaError_t make_maps(const dso_cuda_mla_prefill_params &p, Maps *maps) {
  const dso_mla_inputs &in = p.in;
  int64_t width = in.nope_dim + in.v_dim, row = p.heads * width;
  int64_t t_step = in.t == 1 ? in.q_hs * in.heads : in.q_ts;  // 只有一个的一维，步长随便
  TensorBox q{in.q,
              p.dtype,
              4,
              {in.nope_dim + in.rope_dim, in.heads, in.t, in.b},
              {1, in.q_hs, t_step, in.q_bs},
              {BOX_COLUMNS, 1, ROWS, 1}};
  TensorBox k{p.kv,
              p.dtype,
              4,
              {in.nope_dim, p.heads, in.s, in.b},
              {1, width, row, in.s * row},
              {BOX_COLUMNS, 1, KEYS, 1}};
  TensorBox v = k;
  v.base = static_cast<const uint16_t *>(p.kv) + in.nope_dim, v.dims[0] = in.v_dim;
  TensorBox rope{in.rope,
                 p.dtype,
                 4,
                 {in.rope_dim, 1, in.s, in.b},
                 {1, in.rope_dim, in.rope_ts, in.rope_bs},
                 {BOX_COLUMNS, 1, KEYS, 1}};
  cudaError_t error = make_tensor_map(&maps->q, q);
  if (error == cudaSuccess) error = make_tensor_map(&maps->k, k);
  if (error == cudaSuccess) error = make_tensor_map(&maps->v, v);
  // 没有旋转部分：借用 K 的描述，从界外读。
  if (error == cudaSuccess) error = make_tensor_map(&maps->rope, in.rope_dim > 0 ? rope : k);
  return error;
}

template <class E, int NOPE_BOXES, int DV>
cudaError_t run(const dso_cuda_mla_prefill_params *p, dim3 grid, cudaStream_t stream) {
  Maps maps;
  cudaError_t error = make_maps(*p, &maps);
  if (error != cudaSuccess) return error;
  return launch(mla_prefill_sm90<E, NOPE_BOXES, DV>, grid, dim3(THREADS),
                Layout<NOPE_BOXES, DV>::BYTES, stream, maps, *p);
}

template <class E>
cudaError_t pick(const dso_cuda_mla_prefill_params *p, dim3 grid, cudaStream_t stream) {
  if (p->in.nope_dim <= 64 && p->in.v_dim <= 64) return run<E, 1, 64>(p, grid, stream);
  return run<E, 2, 128>(p, grid, stream);
}

}  // namespace

namespace dso {

bool prefill_sm90_fits(const dso_mla_inputs &in, const Device &device) {
  auto positive = [](int64_t a, int64_t b) { return a > 0 && b > 0; };
  return device.major == 9 && device.shared_limit >= Layout<2, 128>::BYTES && !in.pages &&
         in.nope_dim > 0 && in.nope_dim <= 128 && in.rope_dim <= 64 && in.v_dim <= 128 &&
         positive(in.q_hs, in.t == 1 ? 1 : in.q_ts) && (in.q_bs > 0 || in.b == 1) &&
         positive(in.s == 1 ? 1 : in.rope_ts, in.b == 1 ? 1 : in.rope_bs);
}

cudaError_t run_prefill_sm90(const dso_cuda_mla_prefill_params *p, dim3 grid, cudaStream_t stream) {
  return p->dtype == DSO_BF16 ? pick<Bf16>(p, grid, stream) : pick<F16>(p, grid, stream);
}

}  // namespace dso
