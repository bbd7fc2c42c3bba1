// 吸收式解码（Hopper）：TMA 把键成块拷进环形的缓冲，wgmma 累加；工作的划分、部分结果与合并同别的路径。
//
// 一块 64 个键读进来一次，既当键又当值；3 个 warp 是生产者，只发 TMA，其余是消费者（4 个 warp 一组）：
//   行少（8、16、32）：键放在 wgmma 的 M 一维，Sᵀ [64, ROWS] = 块 · Qᵀ，Oᵀ [r, ROWS] += 块的前 r 列ᵀ · Pᵀ，
//     头再少也不必补到 64 行；一个消费者组。
//   行多（64）：S [64, 64] = Q · 块ᵀ，两个消费者组各管隔一块的得分与 softmax，O [64, r] 各管一半的列；
//     两块一起走。
// 缓冲里每 64 列一个块（tile_sm90.cuh）；最后一块先放旋转的键，得分算完之后原地换成 P。
#pragma once

#include <tma.cuh>

#include "config.cuh"
#include "mla_decode.cuh"
#include "mma.cuh"
#include "tile_sm90.cuh"

namespace dso::decode {

constexpr int GROUP = 4 * WARP;  // 一个 wgmma 的线程数
constexpr int PARTS = 3;         // 一级缓冲分开放行的部分：潜变量的前一半、后一半、旋转的键
constexpr int TAIL = 2;
// 具名屏障；GROUP、READY 一组一个：组内的，与“这组的 P 写好了”（写的组报到，另一组等）。
constexpr int CONSUMERS_BARRIER = 1, GROUP_BARRIER = 2, READY_BARRIER = 4;

// 一个 CTA ROWS 行，CTAS 个一个 cluster，合用读进来的键。
template <int RANK_, int ROWS_, int CTAS_>
struct Shape {
  static constexpr int RANK = RANK_, ROWS = ROWS_, CTAS = CTAS_;
  static constexpr bool FEW = ROWS <= 32;
  static constexpr int GROUPS = FEW ? 1 : 2;
  // 生产者一个 warp 管一部分；两个消费者组时占一组，好把它的寄存器让出来。
  static constexpr int CONSUMERS = GROUPS * GROUP, PRODUCERS = PARTS * WARP;
  static constexpr int THREADS = CONSUMERS + (FEW ? PRODUCERS : GROUP);
  static constexpr int KEYS = DECODE_KEYS_SM90;
  static constexpr int BOXES = RANK / BOX_COLUMNS, HALF = BOXES / 2;
  // 潜变量一次 TMA 几个 64 列：多了发得少，少了先到的先算。
  static constexpr int CHUNK = HALF < 2 ? HALF : 2, CHUNKS = HALF / CHUNK;
  static constexpr int BOX = KEYS * BOX_ROW, QUERY_BOX = ROWS * BOX_ROW;
  static constexpr int STAGE = (BOXES + 1) * BOX, QUERIES = (BOXES + 1) * QUERY_BOX;
  // 其余：4 个 ROWS 的浮点数，与每级的 mbarrier：一次 TMA 一个等到达的，一部分一个等放行的。
  static constexpr int FULLS = 2 * CHUNKS + 1;
  static constexpr int FLOATS = 4 * ROWS * 4, BARRIERS = (FULLS + PARTS) * 8;
  static constexpr int FIT = (SHARED_SM90 - QUERIES - FLOATS) / (STAGE + BARRIERS);
  static constexpr int STAGES = FIT < DECODE_STAGES_SM90 ? FIT : DECODE_STAGES_SM90;
  static constexpr int BYTES = STAGES * (STAGE + BARRIERS) + QUERIES + FLOATS;
  static_assert(STAGES >= 2, "放不下两级");
  static constexpr int AHEAD = FEW || STAGES > 2 ? 0 : DECODE_AHEAD_SM90;
};

// 环里的位置：第几级、这一级用过几轮（的奇偶）。
struct Ring {
  int stage = 0, parity = 0;
  __device__ Ring next(int stages) const {
    return stage + 1 == stages ? Ring{0, parity ^ 1} : Ring{stage + 1, parity};
  }
};

template <class S>
struct Shared {
  unsigned char *stages, *queries;
  float *floats;
  uint64_t *barriers;

  __device__ Shared() {
    stages = dynamic_shared();
    queries = stages + S::STAGES * S::STAGE;
    floats = reinterpret_cast<float *>(queries + S::QUERIES);
    barriers = reinterpret_cast<uint64_t *>(floats + 4 * S::ROWS);
  }
  __device__ unsigned char *stage(int i) const { return stages + i * S::STAGE; }
  __device__ uint64_t *full(int stage, int chunk) const {
    return barriers + stage * S::FULLS + chunk;
  }
  __device__ uint64_t *empty(int stage, int part) const {
    return full(S::STAGES, 0) + stage * PARTS + part;
  }

  // 一半潜变量由拿它当值的组放行，最后一块由读 P 的组放行（行少时只有一组）；一个 warp 报到一次，各 CTA 的都算。
  __device__ void start() const {
    for (int i = 0; i < S::STAGES; i++) {
      for (int chunk = 0; chunk < S::FULLS; chunk++) mbarrier_init(full(i, chunk), 1);
      for (int part = 0; part < PARTS; part++)
        mbarrier_init(empty(i, part), S::CTAS * GROUP / WARP);
    }
    mbarrier_init_fence();
  }
};

// ---- 生产者：几个 warp 各管一部分，整个 warp 找下一段，第一个线程发 TMA ----
//
// 发一次 TMA 连同算坐标要上百个周期，一个 warp 发全部就来不及：潜变量的前一半、后一半、旋转的键各由一个 warp 发。
// 有 cluster 时各 CTA 轮着发，一次写到每一个：从 L2 只读一遍。发的要等每个 CTA 都放行了；字节比自己的 mbarrier_expect
// 先到也不要紧：还差那一次到达，这一相不会提前结束。

template <class S>
struct Producer {
  const dso_mla_inputs &in;
  const CUtensorMap *latent, *rope;
  int part;  // 管哪一部分
  Shared<S> shared;
  Ring ring;
  bool started = false;

  // 没有旋转部分时从界外读：TMA 填 0，得分的循环不必分两种。
  __device__ int tail() const { return in.rope_dim > 0 ? 0 : S::BOXES * BOX_COLUMNS; }

  __device__ static int rank() { return S::CTAS == 1 ? 0 : cluster_rank(); }

  // 一级缓冲里我的这一部分，从 slot 起的一块。
  __device__ void load(const Piece &piece, Ring at, int slot) const {
    mbarrier_wait(shared.empty(at.stage, part), at.parity ^ 1);
    const int first = part * S::CHUNKS, count = part == TAIL ? 1 : S::CHUNKS, row = piece.at.row;
#pragma unroll 1
    for (int i = first; i < first + count; i++) {
      uint64_t *full = shared.full(at.stage, i);
      unsigned char *to = shared.stage(at.stage) + i * S::CHUNK * S::BOX;
      mbarrier_expect(full, part == TAIL ? S::BOX : S::CHUNK * S::BOX);
      if ((i + at.stage) % S::CTAS != rank()) continue;
      if constexpr (S::CTAS > 1) {
        constexpr unsigned ALL = (1u << S::CTAS) - 1;
        if (part == TAIL)
          tma_load_multicast(to, rope, full, ALL, tail(), slot, row);
        else
          tma_load_multicast(to, latent, full, ALL, 0, slot, i * S::CHUNK, row);
      } else if (part == TAIL) {
        tma_load(to, rope, full, tail(), slot, row);
      } else {
        tma_load(to, latent, full, 0, slot, i * S::CHUNK, row);
      }
    }
  }

  // 一段里从第 block 块起的 count 块（到末尾为止）读进 L2，各 CTA 分着。
  __device__ void prefetch(const Piece &piece, int block, int count) const {
    if constexpr (S::AHEAD > 0) {
      int slot = piece.at.slot + piece.key_begin + block * S::KEYS;
#pragma unroll 1
      for (; count > 0 && block < piece.units; block++, count--, slot += S::KEYS) {
#pragma unroll 1
        for (int i = rank(); i < 2 * S::CHUNKS; i += S::CTAS)
          tma_prefetch(latent, 0, slot, i * S::CHUNK, piece.at.row);
        if (rank() == 0 && in.rope_dim > 0) tma_prefetch(rope, 0, slot, piece.at.row);
      }
    }
  }

  // 从第 block 块起的 count 块（一对，或一段最后的一块）：先读先放行的，第 i 块先放行的是第 i 组当值用的一半。
  // 读前一半的在两块之间预读提前 AHEAD 块的：第二块还没有放行。
  __device__ void load_blocks(const Piece &piece, int slot, int block, int count) const {
#pragma unroll 1
    for (int i = 0; i < count; i++) {
      const int which = part == 1 ? count - 1 - i : i;
      load(piece, which ? ring.next(S::STAGES) : ring, slot + which * S::KEYS);
      if (part == 0 && i == 0) prefetch(piece, block + S::AHEAD, count);
    }
  }

  __device__ void run(const Piece &piece) {
    int slot = piece.at.slot + piece.key_begin;
    bool first = threadIdx.x % WARP == 0;
    if (first && part == 0 && started)  // 上一段还没有算完，这一段的头几块已经可以读了
      prefetch(piece, 0, S::AHEAD);
#pragma unroll 1
    for (int block = 0; block < piece.units; block += S::GROUPS, slot += S::GROUPS * S::KEYS) {
      const int count = piece.units - block < S::GROUPS ? 1 : S::GROUPS;
      if (first) load_blocks(piece, slot, block, count);
      for (int i = 0; i < count; i++) ring = ring.next(S::STAGES);
    }
    started = true;
    __syncwarp();
  }
};

// ---- 消费者的公共部分 ----

template <class E, class S>
struct Consumer {
  static constexpr bool BF16 = E::dtype == DSO_BF16;

  const DecodeArgs &args;
  const dso_mla_inputs &in;
  Shared<S> shared;
  Ring ring;
  int warp, lane;  // warp 是组内的

  __device__ explicit Consumer(const DecodeArgs &a)
      : args(a),
        in(a.in),
        warp(static_cast<int>(threadIdx.x) % GROUP / WARP),
        lane(static_cast<int>(threadIdx.x) % WARP) {}

  // 第 row 行在组内是第几行：cluster 的各 CTA 依次接着。
  __device__ static int of_group(int row) {
    return S::CTAS == 1 ? row : cluster_rank() * S::ROWS + row;
  }
  // 第 row 行在部分结果里的下标。
  __device__ int part_at(const Piece &piece, int row) const {
    return piece.slot * S::CTAS * S::ROWS + of_group(row);
  }

  __device__ unsigned char *tile(Ring at) const { return shared.stage(at.stage); }
  // 等第 box 个 64 列到达：一次 TMA 的几个一起到。
  __device__ void wait(Ring at, int box) const {
    mbarrier_wait(shared.full(at.stage, box / S::CHUNK), at.parity);
  }

  // 一组查询：吸收后的 r 列，再接旋转的 dr 列；不足的补 0。全部消费者一起。地址要几次除法：一个线程算一行，再广播。
  __device__ void load_queries(const Piece &piece) {
    constexpr int WARPS = S::CONSUMERS / WARP;
    const int first = static_cast<int>(threadIdx.x) / WARP;
    const auto *latents = static_cast<const uint16_t *>(args.q_abs);
    const auto *ropes = static_cast<const uint16_t *>(in.q) + in.nope_dim;
    int64_t mine =
        lane < S::ROWS / WARPS ? row_at(args, piece, of_group(first + lane * WARPS)) : -1;
    int64_t tail = mine < 0 ? 0 : query_at(in, mine / in.heads, mine % in.heads);
    for (int i = 0; i < S::ROWS / WARPS; i++) {
      const int row = first + i * WARPS;
      const int64_t at = __shfl_sync(ALL_LANES, mine, i);
      const auto *latent = latents + (at < 0 ? 0 : at * in.rank);
      const auto *rope = ropes + __shfl_sync(ALL_LANES, tail, i);
      for (int c = lane; c < (S::BOXES + 1) * 8; c += WARP) {
        int column = c * 8;
        bool part = column < S::RANK;
        bool ok = at >= 0 && (part ? column < in.rank : column - S::RANK < in.rope_dim);
        cp_async_16(shared.queries + c / 8 * S::QUERY_BOX + swizzled(row, c % 8 * 8),
                    part ? latent + (ok ? column : 0) : rope + (ok ? column - S::RANK : 0), ok);
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    named_barrier_sync(CONSUMERS_BARRIER, S::CONSUMERS);
  }

  // 发出这一块的得分里从 first 起 COUNT 个 64 列的部分，start 时从 0 起算；行少时左边是键，行多时左边是查询。
  // 到了一份就算一份，不等整块：缓冲只有两级，要等整块，刚放行的那一级来不及补上。
  template <int COUNT, int R>
  __device__ void score(Ring at, float (&s)[R], int first, bool start) {
    uint64_t keys = uniform(k_major(tile(at) + first * S::BOX));
    uint64_t queries = uniform(k_major(shared.queries + first * S::QUERY_BOX));
#pragma unroll
    for (int box = 0; box < COUNT; box++) {
      if (box % S::CHUNK == 0) wait(at, first + box);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < BOX_ROW; k += 32) {
        uint64_t key = advance(keys, box * S::BOX + k);
        uint64_t query = advance(queries, box * S::QUERY_BOX + k);
        wgmma<BF16, 0, 0>(s, S::FEW ? key : query, S::FEW ? query : key, !start || box + k > 0);
      }
    }
  }

  __device__ bool usable(const Piece &piece, int index) const {
    return index < piece.key_end && slot_seen(in, piece.at, piece.at.slot + index);
  }

  // 范围之外与被遮住的键可能是 NaN：0 * NaN 不是 0，所以当值用之前清掉 [begin, begin + boxes) 块里的那几行。
  // 返回有没有要清的（整个 CTA 一致）；之后要 fence_proxy_async 与屏障。
  __device__ bool clean(const Piece &piece, Ring at, int first, int begin, int boxes) const {
    if (first + S::KEYS <= piece.key_end && !in.kv_mask) return false;
    for (int key = warp; key < S::KEYS; key += GROUP / WARP) {
      if (usable(piece, first + key)) continue;
      for (int c = lane; c < boxes * 8; c += WARP)
        *reinterpret_cast<uint4 *>(tile(at) + (begin + c / 8) * S::BOX + key * BOX_ROW +
                                   c % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
    return true;
  }

  // 一行结果从 column 列起：完整的一段写归一化之后的 16 位，否则写部分结果。
  struct Row {
    uint16_t *whole;
    float *part;
    float inverse;
    int room;  // 还有几列；这组之外的行是 0
    __device__ void write(int offset, float x) const {
      if (offset >= room) return;
      if (whole)
        whole[offset] = static_cast<uint16_t>(E::pack(x * inverse, 0.0f));
      else
        part[offset] = x;
    }
    // 相邻的两个，offset 是偶数：r 与 column 是 8 的倍数，所以对齐，也不会只有一个在范围内。
    __device__ void write_pair(int offset, float x, float y) const {
      if (offset >= room) return;
      if (whole)
        *reinterpret_cast<uint32_t *>(whole + offset) = E::pack(x * inverse, y * inverse);
      else
        *reinterpret_cast<float2 *>(part + offset) = make_float2(x, y);
    }
  };

  __device__ Row row_of(const Piece &piece, int row, int column, float l) const {
    int64_t at = row_at(args, piece, of_group(row));
    Row to{nullptr, nullptr, l == 0.0f ? 0.0f : 1.0f / l,
           at < 0 ? 0 : static_cast<int>(in.rank) - column};
    if (piece.whole)
      to.whole = static_cast<uint16_t *>(args.o) + (at < 0 ? 0 : at * in.rank + column);
    else
      to.part = args.part + static_cast<int64_t>(part_at(piece, row)) * in.rank + column;
    return to;
  }

  __device__ void release(Ring at, int part) const {
    if constexpr (S::CTAS == 1) {
      if (lane == 0) mbarrier_arrive(shared.empty(at.stage, part));
    } else if (lane < S::CTAS) {
      mbarrier_arrive_at(shared.empty(at.stage, part), lane);
    }
  }
};

}  // namespace dso::decode
