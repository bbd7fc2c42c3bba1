// 吸收式解码（Hopper）：TMA 把键成块拷进环形的缓冲，wgmma 累加；工作的划分、部分结果与合并同别的路径。
//
// 一块 64 个键读进来一次，既当键又当值；一组 4 个 warp 里一个划分（依次找出各段）、3 个是生产者，只发 TMA，其余是消费者
// （4 个 warp 一组）：
//   行少（8、16、32）：键放在 wgmma 的 M 一维，Sᵀ [64, ROWS] = 块 · Qᵀ，Oᵀ [r, ROWS] += 块的前 r 列ᵀ · Pᵀ，
//     头再少也不必补到 64 行；一个消费者组。
//   行多（64）：S [64, 64] = Q · 块ᵀ，两个消费者组各管隔一块的得分与 softmax，O [64, r] 各管一半的列；
//     一对块错开着走。
// 缓冲里每 64 列一个块（tile_sm90.cuh）；最后一块先放旋转的键，得分算完之后原地换成 P。
#pragma once

#include <tma.cuh>

#include "config.cuh"
#include "mla_decode.cuh"
#include "mla_decode_pages_sm90.cuh"
#include "mma.cuh"
#include "tile_sm90.cuh"

namespace dso::decode {

constexpr int GROUP = 4 * WARP;  // 一个 wgmma 的线程数
constexpr int PARTS = 3;         // 一级缓冲分开放行的部分：潜变量的前一半、后一半、旋转的键
constexpr int TAIL = 2;
constexpr int PIECES = 4;  // 提前找出几段
// 具名屏障；GROUP、READY 一组一个：组内的，与“这组的 P 写好了”（写的组报到，另一组等）。
constexpr int CONSUMERS_BARRIER = 1, GROUP_BARRIER = 2, READY_BARRIER = 4;

// 一个 CTA ROWS 行，CTAS 个一个 cluster，合用读进来的键。
template <int RANK_, int ROWS_, int CTAS_>
struct Shape {
  static constexpr int RANK = RANK_, ROWS = ROWS_, CTAS = CTAS_;
  static constexpr bool FEW = ROWS <= 32;
  static constexpr int GROUPS = FEW ? 1 : 2;
  // 消费者之后是一组：生产者一个 warp 管一部分，最后一个 warp 划分。
  static constexpr int CONSUMERS = GROUPS * GROUP, PRODUCERS = PARTS * WARP;
  static constexpr int THREADS = CONSUMERS + GROUP;
  static_assert(PRODUCERS + WARP == GROUP, "一组：生产者与划分的");
  static constexpr int READERS = (CONSUMERS + PRODUCERS) / WARP;  // 几个 warp 要知道各段
  static constexpr int KEYS = DECODE_KEYS_SM90;
  static constexpr int BOXES = RANK / BOX_COLUMNS, HALF = BOXES / 2;
  // 潜变量一次 TMA 几个 64 列：多了发得少，少了先到的先算。
  static constexpr int CHUNK = HALF < 2 ? HALF : 2, CHUNKS = HALF / CHUNK;
  static constexpr int BOX = KEYS * BOX_ROW, QUERY_BOX = ROWS * BOX_ROW;
  static constexpr int STAGE = (BOXES + 1) * BOX, QUERIES = (BOXES + 1) * QUERY_BOX;
  // 查询有几份：行少时下一段的先读进来，不必排在已经发出的几块键之后；行多时放不下。
  static constexpr int ASKS = FEW ? 2 : 1;
  // 其余：4 个 ROWS 的浮点数，找出来的各段，与 mbarrier：每级的，一次 TMA 一个等到达的、一部分一个等放行的；各段、查询的。
  static constexpr int FULLS = 2 * CHUNKS + 1;
  static constexpr int FLOATS = 4 * ROWS * 4, BARRIERS = (FULLS + PARTS) * 8;
  static constexpr int REST =
      ASKS * (QUERIES + 16) + FLOATS + PIECES * (static_cast<int>(sizeof(Piece)) + 16);
  static constexpr int FIT = (SHARED_SM90 - REST) / (STAGE + BARRIERS);
  static constexpr int STAGES = FIT < DECODE_STAGES_SM90 ? FIT : DECODE_STAGES_SM90;
  static constexpr int BYTES = STAGES * (STAGE + BARRIERS) + REST;
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
  unsigned char *stages;
  float *floats;
  uint64_t *barriers;
  Piece *pieces;

  __device__ Shared() {
    stages = dynamic_shared();
    floats = reinterpret_cast<float *>(queries(S::ASKS));
    barriers = reinterpret_cast<uint64_t *>(floats + 4 * S::ROWS);
    pieces = reinterpret_cast<Piece *>(asked(0) + 2 * S::ASKS);
  }
  __device__ unsigned char *stage(int i) const { return stages + i * S::STAGE; }
  __device__ unsigned char *queries(int i) const { return stage(S::STAGES) + i * S::QUERIES; }
  __device__ uint64_t *full(int stage, int chunk) const {
    return barriers + stage * S::FULLS + chunk;
  }
  __device__ uint64_t *empty(int stage, int part) const {
    return full(S::STAGES, 0) + stage * PARTS + part;
  }
  // 第 i 段找出来了；都读过了。
  __device__ uint64_t *known(int i) const { return empty(S::STAGES, 0) + i; }
  __device__ uint64_t *taken(int i) const { return known(PIECES + i); }
  // 第 i 份查询到了；用完了。
  __device__ uint64_t *asked(int i) const { return known(2 * PIECES) + i; }
  __device__ uint64_t *answered(int i) const { return asked(S::ASKS + i); }

  // 一半潜变量由拿它当值的组放行，最后一块由读 P 的组放行（行少时只有一组）；一个 warp 报到一次，各 CTA 的都算。
  __device__ void start() const {
    for (int i = 0; i < S::STAGES; i++) {
      for (int chunk = 0; chunk < S::FULLS; chunk++) mbarrier_init(full(i, chunk), 1);
      for (int part = 0; part < PARTS; part++)
        mbarrier_init(empty(i, part), S::CTAS * GROUP / WARP);
    }
    for (int i = 0; i < PIECES; i++)
      mbarrier_init(known(i), 1), mbarrier_init(taken(i), S::READERS);
    for (int i = 0; i < S::ASKS; i++)  // 一次 TMA，与 WARP 个线程的 cp.async
      mbarrier_init(asked(i), 1 + WARP), mbarrier_init(answered(i), S::CONSUMERS / WARP);
    mbarrier_init_fence();
  }
};

// 这个 CTA 管的第一行在组内是第几行：cluster 的各 CTA 依次接着。
template <class S>
__device__ int first_row() {
  return S::CTAS == 1 ? 0 : cluster_rank() * S::ROWS;
}

// 一段里这个 CTA 的各行。
template <class S>
__device__ Lines lines_of(const DecodeArgs &args, const Piece &piece) {
  return dso::lines_of(args, piece, first_row<S>());
}

// ---- 划分：一个 warp 依次找出各段，读进各段的查询；其余的 warp 从共享内存里的环取 ----
//
// 找一段要上千个周期，冷启动时指令还要从显存取：不必每个 warp 各找一遍，后面的几段也找在前面。查询也由它读，而且（有两份时）
// 先读：生产者一知道就发出两级键，受限于显存时排在它们之后的读要等四五微秒。

template <class S>
struct Scheduler {
  const DecodeArgs &args;
  const dso_mla_inputs &in;
  const CUtensorMap *queries;
  Shared<S> shared;
  Ring at, ask;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % WARP; }

  __device__ void put(const Piece &piece) {
    mbarrier_wait(shared.taken(at.stage), at.parity ^ 1);
    if (lane() == 0) {
      shared.pieces[at.stage] = piece;
      mbarrier_arrive(shared.known(at.stage));
    }
    at = at.next(PIECES);
  }

  // 吸收后的 r 列由 TMA 读：各行相连。越过这一组的是别的词元的，界外是 0：只影响不写出的行。
  __device__ void read(const Piece &piece) {
    mbarrier_wait(shared.answered(ask.stage), ask.parity ^ 1);
    uint64_t *arrived = shared.asked(ask.stage);
    unsigned char *to = shared.queries(ask.stage);
    const Lines lines = lines_of<S>(args, piece);
    if (elected()) {
      mbarrier_expect(arrived, S::BOXES * S::QUERY_BOX);
      tma_load(to, queries, arrived, 0, static_cast<int>(lines.first), 0);
    }
    read_tails(to + S::BOXES * S::QUERY_BOX, piece, lines);
    mbarrier_arrive_copies(arrived);
    ask = ask.next(S::ASKS);
  }

  // 旋转的 dr 列，不足的补 0：8 个线程一行，各管 8 列。地址只除一次，之后逐行往前走。
  __device__ void read_tails(unsigned char *to, const Piece &piece, const Lines &lines) const {
    constexpr int EACH = WARP / 8;
    const int heads = static_cast<int>(in.heads), steps = static_cast<int>(in.t);
    const int column = lane() % 8 * 8, begin = lines.inside + lane() / 8;
    int token = begin / heads, head = begin - token * heads;
    token += piece.at.q_begin;
    int b = token / steps, t = token - b * steps;
    const auto *base = static_cast<const uint16_t *>(in.q);
    const auto *from = base + in.nope_dim + column + b * in.q_bs + t * in.q_ts + head * in.q_hs;
#pragma unroll 2
    for (int row = lane() / 8; row < S::ROWS; row += EACH) {
      const bool ok = column < in.rope_dim && row < lines.count;
      cp_async_16(to + swizzled(row, column), ok ? from : base, ok);
      from += EACH * in.q_hs;
      for (head += EACH; head >= heads; head -= heads) {
        from += in.q_ts - heads * in.q_hs;
        if (++t == steps) t = 0, from += in.q_bs - steps * in.q_ts;
      }
    }
  }

  // 最后一段之后是没有单位的一段。writer：恰好一个线程，记下要合并的。settled 时第一段的键已经可以读了，查询要等吸收。
  __device__ void run(int cta, bool writer) {
    Walk walk = start_walk(in, args.schedule, cta);
    Piece piece;
    bool more = next_piece(in, args.schedule, cta, &walk, &piece);
    bool known = args.settled && more;
    if (known) put(piece);
    grid_wait();
    if (writer) args.splits[cta].rows = 0;
    while (more) {
      if (writer) record_split(args, cta, piece);
      read(piece);
      if (!known) put(piece);
      more = next_piece(in, args.schedule, cta, &walk, &piece);
      known = more && S::ASKS == 1;  // 只有一份查询：要等上一段用完，键不必等
      if (known) put(piece);
    }
    put(Piece{});
  }
};

template <class S>
struct Pieces {
  Shared<S> shared;
  Ring at;

  // 下一段；没有了返回假。整个 warp 一起调用。
  __device__ bool next(Piece *piece) {
    mbarrier_wait(shared.known(at.stage), at.parity);
    *piece = shared.pieces[at.stage];
    __syncwarp();
    if (threadIdx.x % WARP == 0) mbarrier_arrive(shared.taken(at.stage));
    at = at.next(PIECES);
    return piece->units > 0;
  }
};

// ---- 生产者：几个 warp 各管一部分 ----
//
// 发一次 TMA 连同算坐标要上百个周期，一个 warp 发全部就来不及：潜变量的前一半、后一半、旋转的键各由一个 warp 发。整个 warp
// 走同样的路，坐标广播成一致的，只在发的时候选一个线程。
// 有 cluster 时各 CTA 轮着发，一次写到每一个：从 L2 只读一遍。发的要等每个 CTA 都放行了；字节比自己的 mbarrier_expect
// 先到也不要紧：还差那一次到达，这一相不会提前结束。
//
// 分页的缓存：一块键由几个框拼成（mla_decode_pages_sm90.cuh）。末尾之后没有可看的键的框不读：留在缓冲里的旧内容同界外的键
// 一样，得分换成 -INF，当值用之前清掉。

template <class S>
struct Producer {
  const dso_mla_inputs &in;
  const CUtensorMap *latent, *rope;
  int part;               // 管哪一部分
  PageList pages, later;  // 要读的；要预读的
  Shared<S> shared;
  Ring ring;
  bool started = false;

  __device__ Producer(const DecodeArgs &args, const CUtensorMap *latent, const CUtensorMap *rope,
                      int part)
      : in(args.in),
        latent(latent),
        rope(rope),
        part(part),
        pages(args.in, args.schedule.log_box),
        later(args.in, args.schedule.log_box) {}

  // 没有旋转部分时从界外读：TMA 填 0，得分的循环不必分两种。
  __device__ int tail() const { return in.rope_dim > 0 ? 0 : S::BOXES * BOX_COLUMNS; }

  __device__ static int rank() { return S::CTAS == 1 ? 0 : cluster_rank(); }
  __device__ static int same(int x) { return __shfl_sync(ALL_LANES, x, 0); }

  // 管的几次 TMA：从第 first_chunk() 个起的 chunks() 个。
  __device__ int first_chunk() const { return part * S::CHUNKS; }
  __device__ int chunks() const { return part == TAIL ? 1 : S::CHUNKS; }
  __device__ bool mine(Ring at, int i) const { return (i + at.stage) % S::CTAS == rank(); }

  // 第 i 次 TMA：从第 slot 个槽位、第 box 个 64 列起的一框，写到 to；row 是行，分页时是页。
  __device__ void copy(unsigned char *to, uint64_t *full, int row, int slot, int box) const {
    if constexpr (S::CTAS > 1) {
      constexpr unsigned ALL = (1u << S::CTAS) - 1;
      if (part == TAIL)
        tma_load_multicast(to, rope, full, ALL, tail(), slot, row);
      else
        tma_load_multicast(to, latent, full, ALL, 0, slot, box, row);
    } else if (part == TAIL) {
      tma_load(to, rope, full, tail(), slot, row);
    } else {
      tma_load(to, latent, full, 0, slot, box, row);
    }
  }

  // 一级缓冲里我的这一部分，第 row 行从 slot 起的一块。
  __device__ void load(Ring at, int row, int slot) const {
    mbarrier_wait(shared.empty(at.stage, part), at.parity ^ 1);
    if (!elected()) return;
#pragma unroll 1
    for (int i = first_chunk(); i < first_chunk() + chunks(); i++) {
      uint64_t *full = shared.full(at.stage, i);
      mbarrier_expect(full, part == TAIL ? S::BOX : S::CHUNK * S::BOX);
      if (mine(at, i))
        copy(shared.stage(at.stage) + i * S::CHUNK * S::BOX, full, row, slot, i * S::CHUNK);
    }
  }

  // 一块键在各页里的框：从第 begin 个起至多几个。
  __device__ int boxes_from(int begin) const {
    return min_of(pages.count - begin, S::KEYS >> pages.log_box);
  }
  // 一框一次 TMA 几个 64 列：框不满一块的高时，各列的框不相连，逐个读。
  __device__ int across() const { return S::KEYS >> pages.log_box == 1 ? S::CHUNK : 1; }

  // 分页：同样的一块，从这一段的第 begin 个框起。
  __device__ void load_pages(Ring at, int begin) {
    const int boxes = boxes_from(begin), box_bytes = BOX_ROW << pages.log_box;
    mbarrier_wait(shared.empty(at.stage, part), at.parity ^ 1);
    if (elected()) {
      const int bytes = boxes * box_bytes * (part == TAIL ? 1 : S::CHUNK);
#pragma unroll 1
      for (int i = first_chunk(); i < first_chunk() + chunks(); i++)
        mbarrier_expect(shared.full(at.stage, i), bytes);
    }
#pragma unroll 1
    for (int j = 0; j < boxes; j++) {
      int page, slot;
      pages.at(begin + j, &page, &slot);
      if (!elected()) continue;
      unsigned char *to = shared.stage(at.stage) + j * box_bytes;
#pragma unroll 1
      for (int i = first_chunk(); i < first_chunk() + chunks(); i++) {
        if (!mine(at, i)) continue;
        const int box = i * S::CHUNK, end = box + (part == TAIL ? 1 : S::CHUNK);
        for (int b = box; b < end; b += across())
          copy(to + b * S::BOX, shared.full(at.stage, i), page, slot, b);
      }
    }
  }

  // 从 slot 起的至多 count 块读进 L2，各 CTA 分着；由事最少的（读旋转的键的）来做。
  __device__ void prefetch(int row, int slot, int count) const {
    if constexpr (S::AHEAD > 0) {
      if (part != TAIL || !elected()) return;
#pragma unroll 1
      for (; count > 0; count--, slot += S::KEYS) {
#pragma unroll 1
        for (int i = rank(); i < 2 * S::CHUNKS; i += S::CTAS)
          tma_prefetch(latent, 0, slot, i * S::CHUNK, row);
        if (rank() == 0 && in.rope_dim > 0) tma_prefetch(rope, 0, slot, row);
      }
    }
  }

  // 分页：从第 begin 个框起的一块读进 L2，同上。
  __device__ void prefetch_pages(int begin) {
    if constexpr (S::AHEAD > 0) {
      if (part != TAIL) return;
      const int boxes = boxes_from(begin);
#pragma unroll 1
      for (int j = 0; j < boxes; j++) {
        int page, slot;
        later.at(begin + j, &page, &slot);
        if (!elected()) continue;
#pragma unroll 1
        for (int box = rank() * across(); box < S::BOXES; box += S::CTAS * across())
          tma_prefetch(latent, 0, slot, box, page);
        if (rank() == 0 && in.rope_dim > 0) tma_prefetch(rope, 0, slot, page);
      }
    }
  }

  // 分页：一段的各块。
  __device__ void run_pages(const Piece &piece) {
    const int units = same(piece.units), each = S::KEYS >> pages.log_box;
    pages.start(piece), later.start(piece);
    for (int block = 0; started && block < min_of(S::AHEAD, units); block++)
      prefetch_pages(block * each);
    started = true;
#pragma unroll 1
    for (int block = 0; block < units; block++) {
      load_pages(ring, block * each);
      if (S::AHEAD > 0 && block + S::AHEAD < units) prefetch_pages((block + S::AHEAD) * each);
      ring = ring.next(S::STAGES);
    }
  }

  // 一段的各块，预读提前 AHEAD 块的。
  __device__ void run(const Piece &piece) {
    if (in.pages) {
      run_pages(piece);
      return;
    }
    const int row = same(piece.at.row), units = same(piece.units);
    int slot = same(piece.at.slot + piece.key_begin);
    if (started)  // 上一段还没有算完，这一段的头几块已经可以读了
      prefetch(row, slot, min_of(S::AHEAD, units));
    started = true;
#pragma unroll 1
    for (int block = 0; block < units; block++, slot += S::KEYS) {
      load(ring, row, slot);
      if (block + S::AHEAD < units) prefetch(row, slot + S::AHEAD * S::KEYS, 1);
      ring = ring.next(S::STAGES);
    }
  }
};

// ---- 消费者的公共部分 ----

template <class E, class S>
struct Consumer {
  static constexpr bool BF16 = E::dtype == DSO_BF16;
  using Pieces = decode::Pieces<S>;

  const DecodeArgs &args;
  const dso_mla_inputs &in;
  Shared<S> shared;
  Ring ring, ask;
  unsigned char *queries = nullptr;  // 这一段的查询
  int warp, lane;                    // warp 是组内的

  __device__ explicit Consumer(const DecodeArgs &a)
      : args(a),
        in(a.in),
        warp(static_cast<int>(threadIdx.x) % GROUP / WARP),
        lane(static_cast<int>(threadIdx.x) % WARP) {}

  // 第 row 行在部分结果里的下标。
  __device__ int part_at(const Piece &piece, int row) const {
    return piece.slot * S::CTAS * S::ROWS + first_row<S>() + row;
  }

  __device__ unsigned char *tile(Ring at) const { return shared.stage(at.stage); }
  // 等第 box 个 64 列到达：一次 TMA 的几个一起到。
  __device__ void wait(Ring at, int box) const {
    mbarrier_wait(shared.full(at.stage, box / S::CHUNK), at.parity);
  }

  // 等这一段的查询。
  __device__ void wait_queries() {
    mbarrier_wait(shared.asked(ask.stage), ask.parity);
    fence_proxy_async();  // 旋转部分是 cp.async 写的
    queries = shared.queries(ask.stage);
  }
  // 这个 warp 不再读这一段的查询。
  __device__ void release_queries() {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.answered(ask.stage));
    ask = ask.next(S::ASKS);
  }

  // 发出这一块的得分；行少时左边是键，行多时左边是查询。
  // 到了一份就算一份，不等整块：缓冲只有两级，要等整块，刚放行的那一级来不及补上。
  template <int R>
  __device__ void score(Ring at, float (&s)[R]) {
    uint64_t keys = uniform(k_major(tile(at))), asking = uniform(k_major(queries));
#pragma unroll
    for (int box = 0; box <= S::BOXES; box++) {
      if (box % S::CHUNK == 0) wait(at, box);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < BOX_ROW; k += 32) {
        uint64_t key = advance(keys, box * S::BOX + k);
        uint64_t query = advance(asking, box * S::QUERY_BOX + k);
        wgmma<BF16, 0, 0>(s, S::FEW ? key : query, S::FEW ? query : key, box + k > 0);
      }
    }
    wgmma_commit();
  }

  __device__ bool usable(const Piece &piece, int index) const {
    return index >= piece.skip && index < piece.key_end &&
           slot_seen(in, piece.at, piece.at.slot + index);
  }

  // 范围之外与被遮住的键可能是 NaN：0 * NaN 不是 0，所以当值用之前清掉那几行。
  // 返回有没有要清的（整个 CTA 一致）；之后要 fence_proxy_async 与屏障。
  __device__ bool clean(const Piece &piece, Ring at, int first) const {
    if (first >= piece.skip && first + S::KEYS <= piece.key_end && !in.kv_mask) return false;
    for (int key = warp; key < S::KEYS; key += GROUP / WARP) {
      if (usable(piece, first + key)) continue;
      for (int c = lane; c < S::BOXES * 8; c += WARP)
        *reinterpret_cast<uint4 *>(tile(at) + c / 8 * S::BOX + key * BOX_ROW + c % 8 * 16) =
            make_uint4(0, 0, 0, 0);
    }
    return true;
  }

  // 没有归一化的结果：第 row 行从 column 列起写到哪里。
  __device__ float *part_of(const Piece &piece, int row, int column) const {
    return args.part + static_cast<int64_t>(part_at(piece, row)) * in.rank + column;
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
