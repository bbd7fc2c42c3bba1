// 吸收式解码（Hopper）：TMA 把键成块拷进环形的缓冲，wgmma 累加；工作的划分、部分结果与合并同 mla_decode.cu。
//
// 一块 64 个键读进来一次，既当键又当值；一个 warp 是生产者，只发 TMA，其余是消费者（4 个 warp 一组）：
//   行少（8、16、32）：键放在 wgmma 的 M 一维，Sᵀ [64, ROWS] = 块 · Qᵀ，Oᵀ [r, ROWS] += 块的前 r 列ᵀ · Pᵀ，
//     头再少也不必补到 64 行；一个消费者组。
//   行多（64）：S [64, 64] = Q · 块ᵀ，两个消费者组各管隔一块的得分与 softmax，O [64, r] 各管一半的列；
//     两块一起走，一组做 softmax 时另一组的矩阵乘正在算。
// 缓冲里每 64 列一个块（tile_sm90.cuh）；最后一块先放旋转的键，得分算完之后原地换成 P。
#include <cstddef>
#include <tma.cuh>

#include "config.cuh"
#include "mla_decode.cuh"
#include "mma.cuh"
#include "tile_sm90.cuh"

namespace {

using namespace dso;

constexpr int GROUP = 4 * WARP;  // 一个 wgmma 的线程数
constexpr int PARTS = 3;         // 一级缓冲分开放行的部分：潜变量的前一半、后一半、旋转的键
constexpr int TAIL = 2;
// 具名屏障；后两种一组一个：组内的，与“这组的 P 写好了”（写的组报到，另一组等）。
constexpr int CONSUMERS_BARRIER = 1, GROUP_BARRIER = 2, READY_BARRIER = 4;

template <int RANK, int ROWS>
struct Shape {
  static constexpr bool FEW = ROWS <= 32;
  static constexpr int GROUPS = FEW ? 1 : 2;
  // 两个消费者组时生产者也占一组（只有第一个 warp 干活），好把它的寄存器让出来。
  static constexpr int CONSUMERS = GROUPS * GROUP, THREADS = CONSUMERS + (FEW ? WARP : GROUP);
  static constexpr int KEYS = DECODE_KEYS_SM90;
  static constexpr int BOXES = RANK / BOX_COLUMNS, HALF = BOXES / 2;
  static constexpr int BOX = KEYS * BOX_ROW, QUERY_BOX = ROWS * BOX_ROW;
  static constexpr int STAGE = (BOXES + 1) * BOX, QUERIES = (BOXES + 1) * QUERY_BOX;
  // 其余：至多 5 个 ROWS 的浮点数，与每级的 mbarrier：一块（64 列）一个等到达的，一部分一个等放行的。
  static constexpr int FLOATS = 5 * ROWS * 4, BARRIERS = (BOXES + 1 + PARTS) * 8;
  static constexpr int FIT = (SHARED_SM90 - QUERIES - FLOATS) / (STAGE + BARRIERS);
  static constexpr int STAGES = FIT < DECODE_STAGES_SM90 ? FIT : DECODE_STAGES_SM90;
  static constexpr int BYTES = STAGES * (STAGE + BARRIERS) + QUERIES + FLOATS;
  static_assert(STAGES >= 2, "放不下两级");
};

// 环里的位置：第几级、这一级用过几轮（的奇偶）。
struct Ring {
  int stage = 0, parity = 0;
  __device__ Ring next(int stages) const {
    return stage + 1 == stages ? Ring{0, parity ^ 1} : Ring{stage + 1, parity};
  }
};

template <int RANK, int ROWS>
struct Shared {
  using S = Shape<RANK, ROWS>;
  unsigned char *stages, *queries;
  float *floats;
  uint64_t *barriers;

  __device__ Shared() {
    stages = dynamic_shared();
    queries = stages + S::STAGES * S::STAGE;
    floats = reinterpret_cast<float *>(queries + S::QUERIES);
    barriers = reinterpret_cast<uint64_t *>(floats + 5 * ROWS);
  }
  __device__ unsigned char *stage(int i) const { return stages + i * S::STAGE; }
  __device__ uint64_t *full(int stage, int box) const {
    return barriers + stage * (S::BOXES + 1) + box;
  }
  __device__ uint64_t *empty(int stage, int part) const {
    return full(S::STAGES, 0) + stage * PARTS + part;
  }

  // 一半潜变量由用它的组放行（行少时只有一组），最后一块由所有消费者放行；一个 warp 报到一次。
  __device__ void start() const {
    for (int i = 0; i < S::STAGES; i++) {
      for (int box = 0; box <= S::BOXES; box++) mbarrier_init(full(i, box), 1);
      for (int part = 0; part < PARTS; part++)
        mbarrier_init(empty(i, part), part == TAIL ? S::CONSUMERS / WARP : GROUP / WARP);
    }
    mbarrier_init_fence();
  }
};

// ---- 生产者：整个 warp 找下一段，第一个线程发 TMA ----

template <int RANK, int ROWS>
struct Producer {
  using S = Shape<RANK, ROWS>;

  const dso_mla_inputs &in;
  const CUtensorMap *latent, *rope;
  Shared<RANK, ROWS> shared;
  Ring ring;

  __device__ void load_part(const Piece &piece, int slot, int part) {
    int first = part * S::HALF, count = part == TAIL ? 1 : S::HALF;
    // 没有旋转部分时从界外读：TMA 填 0，得分的循环不必分两种。
    int tail = in.rope_dim > 0 ? 0 : S::BOXES * BOX_COLUMNS;
    mbarrier_wait(shared.empty(ring.stage, part), ring.parity ^ 1);
    for (int i = first; i < first + count; i++) {
      uint64_t *full = shared.full(ring.stage, i);
      mbarrier_expect(full, S::BOX);
      tma_load(shared.stage(ring.stage) + i * S::BOX, part == TAIL ? rope : latent, full,
               part == TAIL ? tail : i * BOX_COLUMNS, slot, piece.at.row);
    }
  }

  __device__ void run(const Piece &piece) {
    for (int block = 0; block < piece.units; block++) {
      if (threadIdx.x % WARP == 0) {
        int slot = piece.at.slot + piece.key_begin + block * S::KEYS;
        for (int part = 0; part < PARTS; part++) load_part(piece, slot, part);
      }
      ring = ring.next(S::STAGES);
    }
    __syncwarp();
  }
};

// ---- 消费者的公共部分 ----

template <class E, int RANK, int ROWS>
struct Consumer {
  using S = Shape<RANK, ROWS>;
  static constexpr bool BF16 = E::dtype == DSO_BF16;

  const DecodeArgs &args;
  const dso_mla_inputs &in;
  Shared<RANK, ROWS> shared;
  Ring ring;
  int warp, lane;  // warp 是组内的

  __device__ explicit Consumer(const DecodeArgs &a)
      : args(a),
        in(a.in),
        warp(static_cast<int>(threadIdx.x) % GROUP / WARP),
        lane(static_cast<int>(threadIdx.x) % WARP) {}

  __device__ unsigned char *tile(Ring at) const { return shared.stage(at.stage); }
  __device__ void wait(Ring at, int box) const {
    mbarrier_wait(shared.full(at.stage, box), at.parity);
  }

  // 一组查询：吸收后的 r 列，再接旋转的 dr 列；不足的补 0。全部消费者一起。
  __device__ void load_queries(const Piece &piece) {
    for (int row = static_cast<int>(threadIdx.x) / WARP; row < ROWS; row += S::CONSUMERS / WARP) {
      int64_t at = row_at(args, piece, row);
      const auto *latent = static_cast<const uint16_t *>(args.q_abs) + (at < 0 ? 0 : at * in.rank);
      const auto *rope = static_cast<const uint16_t *>(in.q);
      if (at >= 0) rope += query_at(in, at / in.heads, at % in.heads) + in.nope_dim;
      for (int c = lane; c < (S::BOXES + 1) * 8; c += WARP) {
        int column = c * 8;
        bool part = column < RANK;
        bool ok = at >= 0 && (part ? column < in.rank : column - RANK < in.rope_dim);
        cp_async_16(shared.queries + c / 8 * S::QUERY_BOX + swizzled(row, c % 8 * 8),
                    part ? latent + (ok ? column : 0) : rope + (ok ? column - RANK : 0), ok);
      }
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
    named_barrier_sync(CONSUMERS_BARRIER, S::CONSUMERS);
  }

  // 发出这一块的得分；行少时左边是键，行多时左边是查询。到了 64 列就算 64 列，不等整块：
  // 缓冲只有两级，要等整块，刚放行的那一级来不及补上。
  template <int R>
  __device__ void score(Ring at, float (&s)[R]) {
    uint64_t keys = uniform(k_major(tile(at))), queries = uniform(k_major(shared.queries));
#pragma unroll
    for (int box = 0; box <= S::BOXES; box++) {
      wait(at, box);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < BOX_ROW; k += 32) {
        uint64_t key = advance(keys, box * S::BOX + k);
        uint64_t query = advance(queries, box * S::QUERY_BOX + k);
        wgmma<BF16, 0, 0>(s, S::FEW ? key : query, S::FEW ? query : key, box + k > 0);
      }
    }
    wgmma_commit();
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
    int64_t at = row_at(args, piece, row);
    Row to{nullptr, nullptr, l == 0.0f ? 0.0f : 1.0f / l,
           at < 0 ? 0 : static_cast<int>(in.rank) - column};
    if (piece.whole)
      to.whole = static_cast<uint16_t *>(args.o) + (at < 0 ? 0 : at * in.rank + column);
    else
      to.part = args.part + static_cast<int64_t>(piece.slot * ROWS + row) * in.rank + column;
    return to;
  }

  __device__ void release(Ring at, int part) const {
    if (lane == 0) mbarrier_arrive(shared.empty(at.stage, part));
  }
};

// ---- 行少：列是查询，行是键（得分）或潜变量的列（输出） ----

template <class E, int RANK, int ROWS>
struct Few : Consumer<E, RANK, ROWS> {
  using Base = Consumer<E, RANK, ROWS>;
  using S = Shape<RANK, ROWS>;
  using Base::args, Base::in, Base::shared, Base::ring, Base::warp, Base::lane, Base::tile;

  static constexpr int COLUMNS = ROWS / 4;  // 一个线程有几列查询
  float o[S::BOXES][ROWS / 2];
  float m[COLUMNS], l[COLUMNS];
  int limit[COLUMNS];

  __device__ explicit Few(const DecodeArgs &a) : Base(a) {}

  // 线程的第 i 列是哪个查询；它的两个键的得分在 s[value_of(i)]、s[value_of(i) + 2]。
  __device__ int query_of(int i) const { return i / 2 * 8 + lane % 4 * 2 + i % 2; }
  __device__ static constexpr int value_of(int i) { return i / 2 * 4 + i % 2; }

  // 在同一列的 8 个线程之间；跨 warp 的由 reduce 交换。
  template <class Combine>
  __device__ void reduce_columns(float (&x)[COLUMNS], Combine combine) {
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
      for (int step = 4; step < WARP; step *= 2)
        x[i] = combine(x[i], __shfl_xor_sync(ALL_LANES, x[i], step));
      if (lane < 4) shared.floats[warp * ROWS + query_of(i)] = x[i];
    }
    named_barrier_sync(GROUP_BARRIER, GROUP);
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      x[i] = shared.floats[query_of(i)];
#pragma unroll
      for (int w = 1; w < GROUP / WARP; w++)
        x[i] = combine(x[i], shared.floats[w * ROWS + query_of(i)]);
    }
  }

  // 得分变成 P（不写回共享内存），旧的输出乘上缩放。
  __device__ void softmax(const Piece &piece, int first, float (&s)[ROWS / 2]) {
    float scale = score_scale(in), top[COLUMNS];
    int index[2];
    bool seen[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      index[h] = first + warp * 16 + lane / 4 + 8 * h;
      seen[h] = this->usable(piece, index[h]);
    }
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float &x = s[value_of(i) + 2 * h];
        x = seen[h] && index[h] < limit[i] ? x * scale : -INFINITY;
      }
      top[i] = fmaxf(s[value_of(i)], s[value_of(i) + 2]);
    }
    reduce_columns(top, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      float next = fmaxf(m[i], top[i]), base = finite_max(next), keep = fast_exp2(m[i] - base);
      float &a = s[value_of(i)], &b = s[value_of(i) + 2];
      a = fast_exp2(a - base), b = fast_exp2(b - base);
      m[i] = next, l[i] = l[i] * keep + (a + b);
#pragma unroll
      for (int box = 0; box < S::BOXES; box++)
        o[box][value_of(i)] *= keep, o[box][value_of(i) + 2] *= keep;
    }
  }

  // Pᵀ 写成 [ROWS][64 个键]。
  __device__ void store_p(const float (&s)[ROWS / 2]) const {
    unsigned char *p = tile(ring) + S::BOXES * S::BOX;
#pragma unroll
    for (int i = 0; i < ROWS / 2; i += 4) {
      uint32_t pairs[2] = {E::pack(s[i], s[i + 1]), E::pack(s[i + 2], s[i + 3])};
      stmatrix_x2_trans(p + swizzled(i * 2 + lane % 8, warp * 16 + lane / 8 % 2 * 8), pairs);
    }
  }

  __device__ void accumulate() {
    uint64_t values = uniform(mn_major(tile(ring), S::BOX));
    uint64_t p = uniform(k_major(tile(ring) + S::BOXES * S::BOX));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < S::KEYS; k += 16)
#pragma unroll
      for (int box = 0; box < S::BOXES; box++)
        wgmma<Base::BF16, 1, 0>(o[box], advance(values, box * S::BOX + k * BOX_ROW),
                                advance(p, k * 2), true);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int box = 0; box < S::BOXES; box++) wgmma_settle(o[box]);
  }

  __device__ void finish(const Piece &piece) {
    reduce_columns(l, [](float a, float b) { return a + b; });
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      int row = query_of(i);
      if (!piece.whole && warp == 0 && lane < 4)
        args.part_m[piece.slot * ROWS + row] = m[i], args.part_l[piece.slot * ROWS + row] = l[i];
      auto to = this->row_of(piece, row, warp * 16 + lane / 4, l[i]);
#pragma unroll
      for (int box = 0; box < S::BOXES; box++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          to.write(box * BOX_COLUMNS + 8 * h, o[box][value_of(i) + 2 * h]);
    }
    named_barrier_sync(GROUP_BARRIER, GROUP);  // 下一段要重写 floats
  }

  __device__ void run(const Piece &piece) {
#pragma unroll
    for (int i = 0; i < COLUMNS; i++)
      m[i] = -INFINITY, l[i] = 0.0f, limit[i] = row_limit(args, piece, query_of(i));
#pragma unroll
    for (int box = 0; box < S::BOXES; box++)
#pragma unroll
      for (int i = 0; i < ROWS / 2; i++) o[box][i] = 0.0f;
    this->load_queries(piece);
    for (int block = 0; block < piece.units; block++) {
      int first = piece.key_begin + block * S::KEYS;
      float s[ROWS / 2];
      this->score(ring, s);
      wgmma_wait<0>();
      wgmma_settle(s);
      softmax(piece, first, s);  // 其中的屏障之后，没有 warp 还在读旋转的键
      store_p(s);
      this->clean(piece, ring, first, 0, S::BOXES);
      fence_proxy_async();
      named_barrier_sync(GROUP_BARRIER, GROUP);
      accumulate();
      for (int part = 0; part < PARTS; part++) this->release(ring, part);
      ring = ring.next(S::STAGES);
    }
    finish(piece);
  }
};

// ---- 行多：行是查询；第 W 组管第 W 半的列，与每对块里第 W 块的得分 ----
//
// 一对块（甲、乙）里两组的先后，横线之间同时进行：
//   第 0 组                              第 1 组
//   甲的得分（上一对的乙 · V 还在算）    乙的得分
//   softmax，写出 P 甲                   （等 P 甲）
//   O += P 甲 · V 甲                     O += P 甲 · V 甲，同时做乙的 softmax，写出 P 乙
//   （等 P 乙）O += P 乙 · V 乙          O += P 乙 · V 乙

template <class E, int RANK, int ROWS, int W>
struct Many : Consumer<E, RANK, ROWS> {
  using Base = Consumer<E, RANK, ROWS>;
  using S = Shape<RANK, ROWS>;
  using Base::args, Base::in, Base::shared, Base::ring, Base::warp, Base::lane, Base::tile;

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

  // 自己的一块：得分算完之后的 softmax 与写出 P。
  __device__ void weigh(const Piece &piece, Ring at, int block, float (&s)[32], float (&sum)[2]) {
    wgmma_settle(s);
    sum[0] = sum[1] = 0.0f;
    softmax(piece, piece.key_begin + block * S::KEYS, W, s, sum);
    publish(at, s);
  }

  // 两组各自的循环：一条 wgmma 没有完成时不经过分支（编译器会把它们排成串行），所以最后一对单独写。
  __device__ void attend_first(const Piece &piece) {
    const float none[2] = {0.0f, 0.0f};
    float s[32], sum[2];
    int block = 0;
    this->score(ring, s);
    wgmma_wait<0>();
    for (; block + 2 < piece.units; block += 2) {
      const Ring second = ring.next(S::STAGES), third = second.next(S::STAGES);
      weigh(piece, ring, block, s, sum);
      accumulate(piece, ring, block, sum);
      retire<0>(ring);
      receive(second);
      accumulate(piece, second, block + 1, none);
      this->score(third, s);
      retire<1>(second);
      wgmma_wait<0>();
      ring = third;
    }
    weigh(piece, ring, block, s, sum);
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
      this->score(second, s);
      wgmma_wait<0>();
      wgmma_settle(s);  // 没有完成的 wgmma 不跨过下面的分支，只跨过 softmax
      receive(ring);
      accumulate(piece, ring, block, none);
      weigh(piece, second, block + 1, s, sum);
      retire<0>(ring);
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
        args.part_m[piece.slot * ROWS + row] = top_of(row),
                                        args.part_l[piece.slot * ROWS + row] = total;
      auto to = Base::row_of(piece, row, W * RANK / 2 + lane % 4 * 2, total);
#pragma unroll
      for (int i = 0; i < RANK / 4; i += 4) to.write_pair(i * 2, o[i + 2 * h], o[i + 2 * h + 1]);
    }
    named_barrier_sync(CONSUMERS_BARRIER, S::CONSUMERS);  // 下一段要重写 floats
  }

  __device__ void run(const Piece &piece) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      l[h] = 0.0f, limit[h] = row_limit(args, piece, line_of(h));
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

// ---- 核 ----

template <class E, int RANK, int ROWS>
__global__ __launch_bounds__(Shape<RANK, ROWS>::THREADS, 1) void mla_decode_sm90_kernel(
    DecodeArgs args, const __grid_constant__ CUtensorMap latent,
    const __grid_constant__ CUtensorMap rope) {
  using S = Shape<RANK, ROWS>;
  int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) Shared<RANK, ROWS>().start();
  __syncthreads();
  if (thread >= S::CONSUMERS) {
    if constexpr (!S::FEW) registers_decrease<DECODE_PRODUCER_REGISTERS>();
    if (thread >= S::CONSUMERS + WARP) return;
    Producer<RANK, ROWS> producer{args.in, &latent, &rope, {}, {}};
    each_piece(args, thread == S::CONSUMERS, [&](const Piece &piece) { producer.run(piece); });
  } else if constexpr (S::FEW) {
    Few<E, RANK, ROWS> consumer(args);
    each_piece(args, false, [&](const Piece &piece) { consumer.run(piece); });
  } else {
    registers_increase<DECODE_CONSUMER_REGISTERS>();
    if (thread < GROUP) {
      Many<E, RANK, ROWS, 0> consumer(args);
      each_piece(args, false, [&](const Piece &piece) { consumer.run(piece); });
    } else {
      Many<E, RANK, ROWS, 1> consumer(args);
      each_piece(args, false, [&](const Piece &piece) { consumer.run(piece); });
    }
  }
}

// ---- 主机侧 ----

// 键的张量 [B, S, width]，一次 64 列、64 个槽位；界外（含不足 64 的列）填 0。
cudaError_t cache_map(CUtensorMap *map, const DecodeArgs &args, const void *data, int64_t width,
                      int64_t bs, int64_t ts) {
  return make_tensor_map(map, {data,
                               args.dtype,
                               3,
                               {width, args.in.s, args.in.b},
                               {1, ts, bs},
                               {BOX_COLUMNS, DECODE_KEYS_SM90, 1}});
}

template <class E, int RANK, int ROWS>
cudaError_t run(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  using S = Shape<RANK, ROWS>;
  if (bytes) {
    *bytes = S::BYTES;
    return cudaSuccess;
  }
  const dso_mla_inputs &in = args.in;
  CUtensorMap latent, rope;
  cudaError_t error = cache_map(&latent, args, in.latent, in.rank, in.latent_bs, in.latent_ts);
  rope = latent;
  if (error == cudaSuccess && in.rope_dim > 0)
    error = cache_map(&rope, args, in.rope, in.rope_dim, in.rope_bs, in.rope_ts);
  if (error != cudaSuccess) return error;
  return launch(mla_decode_sm90_kernel<E, RANK, ROWS>,
                dim3(static_cast<unsigned>(args.schedule.ctas)), dim3(S::THREADS),
                static_cast<size_t>(S::BYTES), stream, args, latent, rope);
}

template <class E, int RANK>
cudaError_t pick_rows(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  switch (args.schedule.rows) {
    case 8:
      return run<E, RANK, 8>(args, bytes, stream);
    case 16:
      return run<E, RANK, 16>(args, bytes, stream);
    case 32:
      return run<E, RANK, 32>(args, bytes, stream);
    default:
      return run<E, RANK, 64>(args, bytes, stream);
  }
}

template <class E>
cudaError_t pick_rank(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  if (args.in.rank <= 128) return pick_rows<E, 128>(args, bytes, stream);
  if (args.in.rank <= 256) return pick_rows<E, 256>(args, bytes, stream);
  return pick_rows<E, 512>(args, bytes, stream);
}

}  // namespace

cudaError_t dso::run_decode_sm90(const DecodeArgs &args, int *bytes, cudaStream_t stream) {
  return args.dtype == DSO_BF16 ? pick_rank<Bf16>(args, bytes, stream)
                                : pick_rank<F16>(args, bytes, stream);
}
