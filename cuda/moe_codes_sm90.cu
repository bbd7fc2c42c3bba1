// moe_experts 的 Hopper 路径：int4 的专家、一块至多 8 个词元；h、o 两步是同一个核。
//
// 受限于读权重。CTA 常驻，一个 SM 一个：起头只有一次；权重由 TMA 搬进共享内存，一条指令 2 KiB，地址、越界都由它算，省下的指令
// 留给解码。全部工作排成一列（块、份、段，见 Line），平分给各 CTA，边界在份上：
//   份：16 行权重（有门时 8 行 gate 与对应的 8 行 up），整个 K；一个 warp 做完，从寄存器直接激活、写出；
//   段：一份的 K 分成至多 MOE_CODES_PIECES 段，每段从 0 加起，各段的和再依次相加。所以一份由哪几个 warp 做，逐位相同。
// 一个 CTA 的各份，各 warp 轮着做（于是大致同时走到下一块，x 不必同时留许多块）；最后不够一个 warp 一份的，按段平分：一份分在
// 几个 warp 时由做头一段的收尾，它最后才做到这里，别的一开始就做，各段的和写在共享内存里。
//
// 每个 warp 有自己的几级（共享内存），自己读：用完一级随即读后面的一级，所以没有“空”的 mbarrier，一个 warp 慢了不拖累别的，发 TMA
// 的指令也分给了各个 warp。
//
// 一块的 x（整个 K）在共享内存里，各 warp 合用；另有一个 warp 专管它：按行收集，放得下时提前一块读。
//
// 16 行按 [行][128 字节] 放，128 字节交错；片段的第 g 行是其中的第几行取 g 的位序颠倒，8、16 字节的读都没有库冲突。
#include <tma.cuh>

#include <cstdlib>

#include "config.cuh"
#include "moe_codes_sm90.cuh"
#include "moe_small_put.cuh"
#include "tile_sm90.cuh"

namespace {

using namespace dso;
using namespace dso::small;

constexpr int WARPS = MOE_CODES_WARPS, CONSUMERS = WARPS * WARP, THREADS = CONSUMERS + WARP;
constexpr int ROWS = 16, TOKENS = 8;  // mma 的 M、N
constexpr int STAGE_K = 2 * BOX_ROW, STAGE = ROWS * BOX_ROW;
constexpr int PIECES = MOE_CODES_PIECES;
// 一行 x 多 32 字节：一次读的 8 个线程（两个词元）不在同一个库。
constexpr int PAD = 16;

// 一步一组、组是 128 的两步一组：那样 x 的读没有库冲突。尺度、零点按 4 组（一行里从 4 的倍数起）读。
template <Kind K>
struct Format {
  static constexpr Kind unit = K == INT4_128 ? INT4_64 : K;
  static constexpr int group = K == INT4_32 ? 32 : K == INT4_64 ? 64 : 128;
  static constexpr int steps = STAGE_K / Step<unit>::k;  // 一级几步
  static constexpr int groups = STAGE_K / group;         // 一级里一行几组
  static constexpr int quads = groups < 4 ? 1 : groups / 4;
  static constexpr int scale_bytes = ROWS * quads * 16, zero_bytes = ROWS * quads * 4;
};

// 路由的（共享的）专家的一个矩阵。有门时是 gate、up 两个，描述的第三维从地址低的起；swapped：那是
// up。
struct Matrix {
  CUtensorMap codes, scales;
  const float *scale[2];
  const uint8_t *zero[2];
  int64_t scale_step, zero_step;  // 相邻的专家，字节
  int groups, columns, depth;
  int units, stages, piece, pieces;  // 几份；一份几级；一段几级；几段
  bool swapped;
};

struct Plan {
  Matrix routed, shared;
  int stages, pitch, rows;  // 每个 warp 几级；一行 x 的元素数；放得下几行
  int shared_tiles;
  bool hidden, paired, zeros, biased;
  bool aligned;  // 见 Reader
};

// 这个 CTA 的份：从第 first_unit 份起，各 warp 轮着做 rounds 份；余下的不够各做一份，是 [begin, end) 段，各 warp 平分。
// 块 [first, last]。放在共享内存里：用得少，循环里不占寄存器。
struct Job {
  int first_unit, rounds, begin, end;
  int first, last, first_shared;  // first_shared：共享专家的第一块
  __device__ int border(int warp) const { return begin + (end - begin) * warp / WARPS; }
};

// 一个 warp 走到哪里：还有 rounds 个整份（连同这一份）；没有整份了，还有 left 级。
struct Walk {
  int tile, unit, stage, rounds, left;
  __device__ bool more() const { return rounds > 0 || left > 0; }
};

// 一个 warp 正在做的块：结果从第几个元素起、行距、行数；整份之后从哪里接着做。也在共享内存里。
struct Block {
  int64_t at;
  int rs, rows;
  Walk tail;
};

// 共享内存。
struct Shared {
  unsigned char *base = dynamic_shared();
  int stages, pitch, rows;
  int scale_bytes, zero_bytes;

  __device__ int all() const { return WARPS * stages; }
  __device__ unsigned char *codes(int stage) const { return base + stage * STAGE; }
  __device__ unsigned char *scales(int stage) const { return codes(all()) + stage * scale_bytes; }
  __device__ unsigned char *zeros(int stage) const { return scales(all()) + stage * zero_bytes; }
  __device__ unsigned char *heads(int warp) const {
    return zeros(all()) + warp * (PIECES - 1) * WARP * 16;
  }
  __device__ uint16_t *x(int row) const {
    return reinterpret_cast<uint16_t *>(heads(WARPS)) + row * pitch;
  }
  __device__ uint64_t *full(int stage) const {
    return reinterpret_cast<uint64_t *>(x(rows)) + stage;
  }
  __device__ uint64_t *head(int warp) const { return full(all()) + warp; }
  // 读到了一块的 x；第 i 块（这个 CTA 从头数起）的排好了、用完了。
  __device__ uint64_t *x_read() const { return head(WARPS) + 4; }
  __device__ uint64_t *x_full(int i) const { return head(WARPS) + i % 2; }
  __device__ uint64_t *x_empty(int i) const { return head(WARPS) + 2 + i % 2; }

  __device__ Block *block(int warp) const { return reinterpret_cast<Block *>(x_read() + 1) + warp; }
  __device__ Job *job() const { return reinterpret_cast<Job *>(block(WARPS)); }

  // 没有零点的都是 8。
  __device__ void clear_zeros() const {
    auto *to = reinterpret_cast<uint32_t *>(zeros(0));
    for (int i = static_cast<int>(threadIdx.x); i < all() * zero_bytes / 4; i += THREADS)
      to[i] = 0x08080808u;
  }

  __device__ void start(bool aligned) const {
    for (int i = 0; i < all(); i++) mbarrier_init(full(i), aligned ? 1 : 1 + WARP);
    for (int w = 0; w < WARPS; w++) mbarrier_init(head(w), 1);
    for (int i = 0; i < 2; i++) mbarrier_init(x_full(i), 1), mbarrier_init(x_empty(i), WARPS);
    mbarrier_init(x_read(), 1);
    mbarrier_init_fence();
  }
};

size_t shared_bytes(int stages, int stage_bytes, int64_t rows, int64_t pitch) {
  return static_cast<size_t>(WARPS * (stages * (stage_bytes + 8) + (PIECES - 1) * WARP * 16 + 8) +
                             rows * pitch * 2 + 5 * 8) +
         WARPS * sizeof(Block) + sizeof(Job);
}

struct Spot {
  int tile, unit, stage;
  int before;  // 这之前共几级
};

// 全部工作：路由的各块，再是共享专家的；位置以段计，也数份。
struct Line {
  const Plan &plan;
  int first_shared, edge;  // 路由的块数（共享专家的第一块）；共享专家的从哪里起

  __device__ Line(const Plan &p, int routed)
      : plan(p), first_shared(routed), edge(routed * p.routed.units * p.routed.pieces) {}
  __device__ int total() const {
    return edge + plan.shared_tiles * plan.shared.units * plan.shared.pieces;
  }
  __device__ bool on_shared(int position) const {
    return position >= edge && plan.shared_tiles > 0;
  }
  // 末尾也可以。
  __device__ Spot at(int position) const {
    bool shared = on_shared(position);
    const Matrix &m = shared ? plan.shared : plan.routed;
    if (shared) position -= edge;
    int unit = position / m.pieces, tile = unit / m.units;
    int stage = min_of((position - unit * m.pieces) * m.piece, m.stages);
    int before = unit * m.stages + stage;
    if (shared) before += first_shared * plan.routed.units * plan.routed.stages;
    return {tile + (shared ? first_shared : 0), unit - tile * m.units, stage, before};
  }
  // 第 i 个 CTA 从哪里起：各 CTA 差不多一样多，落在份的边上。
  __device__ int border(int i) const {
    int all = total(), ctas = static_cast<int>(gridDim.x), each = all / ctas;
    int at = each * i + min_of(i, all - each * ctas);
    bool shared = on_shared(at);
    int inside = at - (shared ? edge : 0);
    return at - inside % (shared ? plan.shared.pieces : plan.routed.pieces);
  }
  // 第几份；一份的第一段。
  __device__ int unit_at(int position) const {
    if (!on_shared(position)) return position / plan.routed.pieces;
    return first_shared * plan.routed.units + (position - edge) / plan.shared.pieces;
  }
  __device__ int start_of(int unit) const {
    int routed = first_shared * plan.routed.units;
    if (unit < routed) return unit * plan.routed.pieces;
    return edge + (unit - routed) * plan.shared.pieces;
  }
};

// 一份做完，走到下一份；还有才调用。
__device__ __forceinline__ void advance(Walk &walk, const Plan &plan, const Shared &shared,
                                        int warp) {
  if (walk.rounds == 1) {
    walk = shared.block(warp)->tail;
    return;
  }
  walk.stage = 0, walk.unit += walk.rounds > 0 ? WARPS : 1;
  if (walk.rounds > 0) walk.rounds--;
  for (;;) {
    int units = walk.tile < shared.job()->first_shared ? plan.routed.units : plan.shared.units;
    if (walk.unit < units) return;
    walk.unit -= units, walk.tile++;
  }
}

// 各块的 x 放在第几行起：接在上一块之后，most 行里放不下就从头。
__device__ int next_row(int row, int rows, int next, int most) {
  return row + rows + next > most ? 0 : row + rows;
}

// ---- x ----

// 按次序把各块的 x 读进共享内存，就地排成 Multiply 的另一种次序；一块的与前一块的不相重时，前一块还在用就读。
__device__ void load_inputs(const Plan &plan, const dso_cuda_moe_experts_params &p,
                            const Shared &shared) {
  const dso_cuda_moe_routing &r = p.routing;
  int lane = static_cast<int>(threadIdx.x) % WARP, row = 0, rows = 0;
  int first = shared.job()->first, blocks = shared.job()->last - first + 1;
  for (int i = 0; i < blocks; i++) {
    dso_cuda_moe_tile tile = r.tiles[first + i];
    const Matrix &m = first + i >= shared.job()->first_shared ? plan.shared : plan.routed;
    int64_t from = 0;  // 第 lane 行在 x（h）的第几个元素
    if (lane < tile.rows)
      from = plan.hidden ? r.token[tile.row + lane] * p.x.rs : hidden_at(p, tile.row + lane);
    int before = row, next = i > 0 ? next_row(row, rows, tile.rows, shared.rows) : 0;
    if (i > 1) mbarrier_wait(shared.x_empty(i), (i / 2 & 1) ^ 1);
    if (i > 0 && next < before + rows && before < next + tile.rows)
      mbarrier_wait(shared.x_empty(i - 1), (i - 1) / 2 & 1);
    row = next, rows = tile.rows;
    // 一行之后到整级，是 0：补齐的码是什么都可以
    for (int t = 0; t < rows; t++)
      for (int k = m.depth + lane * 8; k < m.stages * STAGE_K; k += WARP * 8)
        *reinterpret_cast<uint4 *>(shared.x(row + t) + k) = make_uint4(0, 0, 0, 0);
    fence_proxy_async();  // 这里原来是排过的
    __syncwarp();
    const auto *base = static_cast<const uint16_t *>(plan.hidden ? p.x.data : p.h);
    if (elected()) mbarrier_expect(shared.x_read(), rows * m.depth * 2);
    for (int t = 0; t < rows; t++) {
      const uint16_t *at = base + __shfl_sync(ALL_LANES, from, t);
      if (elected()) bulk_load(shared.x(row + t), at, m.depth * 2, shared.x_read());
    }
    mbarrier_wait(shared.x_read(), i & 1);
    for (int t = 0; t < rows; t++)
#pragma unroll 4
      for (int k = lane * 8; k < m.depth; k += WARP * 8) {
        auto *at = reinterpret_cast<uint4 *>(shared.x(row + t) + k);
        *at = alternate(*at);
      }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(shared.x_full(i));
  }
}

// ---- 权重 ----

// 当前的 warp；广播一次，编译器才知道一个 warp 里都一样，地址就在标量寄存器里。
__device__ __forceinline__ int this_warp() {
  return __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x) / WARP, 0);
}

// 一个 warp 读的一头：比用的一头早几级。
// ALIGNED：尺度也由 TMA 读（没有零点，行对齐到 16 字节）；否则尺度、零点由各个线程拷。
template <Kind K, bool ALIGNED>
struct Reader {
  using F = Format<K>;

  const Plan &plan;
  const dso_cuda_moe_routing &r;
  const Shared &shared;
  int warp;
  Walk walk;
  int first = 0;  // 这一份的第一列
  int expert = 0, next_expert = 0;
  int next_tile = -1;  // 它的专家已读好
  const Matrix *matrix = nullptr;
  int stages = 0;  // 一份几级

  __device__ __forceinline__ Reader(const Plan &p, const dso_cuda_moe_routing &routing,
                                    const Shared &s, int w, const Walk &from)
      : plan(p), r(routing), shared(s), warp(w), walk(from) {
    if (walk.more()) enter();
  }

  // 读下一级，放在第 to 级。越界的 TMA 填 0。
  __device__ __forceinline__ void fetch(int to) {
    if (!walk.more()) return;
    uint64_t *full = shared.full(to);
    if (elected()) {
      mbarrier_expect(full, ALIGNED ? STAGE + F::scale_bytes : STAGE);
      tma_load(shared.codes(to), &matrix->codes, full, walk.stage * BOX_COLUMNS, first, 0, expert);
      if (ALIGNED)
        tma_load(shared.scales(to), &matrix->scales, full, walk.stage * F::groups / 4 * 8, first, 0,
                 expert);
    }
    if (!ALIGNED) copy(to);
    if (walk.rounds == 0) walk.left--;
    if (++walk.stage < stages || !walk.more()) return;
    int before = walk.tile;
    advance(walk, plan, shared, warp);
    if (walk.tile != before)
      enter();
    else
      first = walk.unit * (plan.paired ? 8 : ROWS);
  }

 private:
  // 换一块；再下一块的专家先读好。
  __device__ __forceinline__ void enter() {
    bool on_shared = walk.tile >= shared.job()->first_shared;
    matrix = on_shared ? &plan.shared : &plan.routed, stages = matrix->stages;
    first = walk.unit * (plan.paired ? 8 : ROWS);
    if (walk.tile != next_tile) next_expert = r.tiles[walk.tile].expert;
    expert = on_shared ? 0 : next_expert;
    next_tile = walk.tile + 1;
    if (next_tile < r.most_tiles) next_expert = r.tiles[next_tile].expert;
  }

  // 尺度、零点由各个线程拷；越界的填 0。
  __device__ __forceinline__ void copy(int to) const {
    const Matrix &m = *matrix;
    int lane = static_cast<int>(threadIdx.x) % WARP, from = walk.stage * F::groups / 4 * 4;
    int height = plan.paired ? ROWS : m.columns - first;  // 几行在界内
#pragma unroll 1
    for (int i = lane; i < ROWS * F::quads * 4; i += WARP) {
      int row = i / (F::quads * 4), at = from + i % (F::quads * 4);
      const float *scale =
          static_cast<const float *>(after(m.scale[row / 8], expert * m.scale_step)) +
          (first + row % 8) * m.groups + at;
      cp_async_4(shared.scales(to) + i * 4, scale, at < m.groups && row < height);
    }
    int row = lane / F::quads, at = from + lane % F::quads * 4;
    if (plan.zeros && row < ROWS) {
      const uint8_t *zero =
          static_cast<const uint8_t *>(after(m.zero[row / 8], expert * m.zero_step)) +
          (first + row % 8) * m.groups + at;
      cp_async_4(shared.zeros(to) + lane * 4, zero, at < m.groups && row < height);
    }
    mbarrier_arrive_copies(shared.full(to));
  }
};

// 用的一头：一个 warp 的 [begin, end) 段。
template <class E, Kind K, bool ALIGNED>
struct Consumer {
  using F = Format<K>;
  using S = Step<F::unit>;
  using Sums = float[1][1][4];
  static constexpr int QUAD = F::groups < 4 ? F::groups : 4;  // 尺度一次读几个

  const Plan &plan;
  const dso_cuda_moe_experts_params &p;
  const Shared &shared;
  Reader<K, ALIGNED> &reader;

  int warp, lane;
  int column;    // 片段里的第 lane / 4 行是 8 行里的哪一行：位序颠倒，128 字节交错的读就没有库冲突
  int codes_at;  // 本线程在一级里从第几个字节读起
  int stage = 0, parity = 0;         // 用到自己的第几级
  int block = 0, row = 0, rows = 0;  // 这个 CTA 的第几块；它的 x 从第几行起，有几行

  __device__ __forceinline__ Consumer(const Plan &whole, const dso_cuda_moe_experts_params &params,
                                      const Shared &s, Reader<K, ALIGNED> &from)
      : plan(whole),
        p(params),
        shared(s),
        reader(from),
        warp(this_warp()),
        lane(static_cast<int>(threadIdx.x) % WARP) {
    int g = lane / 4;
    column = (g & 1) << 2 | (g & 2) | g >> 2;
    codes_at = swizzled(column, lane % 4 * 2 * S::words);
  }

  // ---- 块 ----

  __device__ __forceinline__ void open() {
    int at = shared.job()->first + block;
    dso_cuda_moe_tile tile = p.routing.tiles[at];
    row = block > 0 ? next_row(row, rows, tile.rows, shared.rows) : 0, rows = tile.rows;
    if (lane == 0) {
      bool routed = at < shared.job()->first_shared;
      int64_t rs = plan.hidden ? (routed ? p.h_rs : p.w.shared.inner) : p.n;
      int64_t from = plan.hidden ? hidden_at(p, tile.row) : tile.row * p.n;
      Block *mine = shared.block(warp);
      mine->at = from, mine->rs = static_cast<int>(rs), mine->rows = rows;
    }
    __syncwarp();
    mbarrier_wait(shared.x_full(block), block / 2 & 1);
  }

  // 走到第 to 块：路过的、用完的各块都放行。
  __device__ __forceinline__ void reach(int to) {
    while (shared.job()->first + block < to) {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(shared.x_empty(block));
      block++;
      open();
    }
  }

  // 本线程的 x 从第几个数起。一块里没有的词元给一个有的，那一列不用：余数相同的，一次读的就仍不在同一个库。
  __device__ __forceinline__ int input() const {
    int g = lane / 4, token = g < rows ? g : g & (rows >= 4 ? 3 : rows >= 2 ? 1 : 0);
    return afresh((row + token) * shared.pitch + lane_offset<F::unit>(lane % 4));
  }

  // ---- 一级 ----

  // x：本线程在这一级里的第一个 k；group：这一级的第一组是 4 组里的第几个。
  __device__ __forceinline__ void multiply(Sums &acc, int from, const uint16_t *x,
                                           int group) const {
    const unsigned char *codes = shared.codes(from);
    Words<QUAD> scale[2][F::quads];
    uint32_t zero[2][F::quads];
#pragma unroll
    for (int side = 0; side < 2; side++)
#pragma unroll
      for (int i = 0; i < F::quads; i++) {
        int quad = (side * 8 + column) * F::quads + i;
        scale[side][i] = *reinterpret_cast<const Words<QUAD> *>(shared.scales(from) + quad * 16 +
                                                                (QUAD < 4 ? group * 4 : 0));
        if (!ALIGNED)
          zero[side][i] = reinterpret_cast<const uint32_t *>(shared.zeros(from))[quad] >> group * 8;
      }
#pragma unroll
    for (int u = 0; u < F::steps; u++) {
      constexpr int GROUPS = F::groups, STEPS = F::steps;
      int g = u * GROUPS / STEPS;
      Words<S::words> w[1][2];
      Group group_of[1];
#pragma unroll
      for (int side = 0; side < 2; side++) {
        w[0][side] = *reinterpret_cast<const Words<S::words> *>(codes + side * (STAGE / 2) +
                                                                (codes_at ^ (u * S::row_bytes)));
        group_of[0].scale[side] = __uint_as_float(scale[side][g / 4].v[g % 4]);
        if (!ALIGNED) group_of[0].zero[side] = zero[side][g / 4] >> (g % 4 * 8);
      }
      Multiply<E, F::unit, 1, 1, true>::step(acc, w, group_of, [&](int, int k) {
        return *reinterpret_cast<const Words<S::x_words> *>(x + u * S::k + k);
      });
    }
  }

  // 等到、用完、随即读后面的一级。
  __device__ __forceinline__ void next(Sums &acc, int s, int x) {
    int from = warp * shared.stages + stage;
    mbarrier_wait(shared.full(from), parity);
    multiply(acc, from, shared.x(0) + x + s * STAGE_K, s * F::groups % 4);
    __syncwarp();
    reader.fetch(from);
    if (++stage == shared.stages) stage = 0, parity ^= 1;
  }

  // ---- 一份 ----

  __device__ __forceinline__ float4 *heads(int of) const {
    return reinterpret_cast<float4 *>(shared.heads(of)) + lane;
  }

  // 余下的 count 段由后面的 warp 做：从第 border(warp + 1) 段起，依次加上。
  __device__ __forceinline__ void collect(float (&total)[4], int count) const {
    const Job &job = *shared.job();
    int owner = afresh(warp) + 1, at = job.border(owner);
    for (int end = at + count; at < end; at++) {
      while (at >= job.border(owner + 1)) owner++;
      mbarrier_wait(shared.head(owner), 0);
      float4 more = heads(owner)[(at - job.border(owner)) * WARP];
      total[0] += more.x, total[1] += more.y, total[2] += more.z, total[3] += more.w;
    }
  }

  // 本线程的是第 2 (lane % 4) 个词元起的两个；上 8 行，下 8 行（有门时是 gate、up）。
  __device__ __forceinline__ void put(const float (&total)[4], const Matrix &m, int unit) const {
    dso_expert expert = {};
    if (plan.biased)
      expert =
          expert_at(p.w, p.routing.experts, p.routing.tiles[shared.job()->first + block].expert);
    const Block &mine = *shared.block(warp);
    int first = unit * (plan.paired ? 8 : ROWS), token = lane % 4 * 2;
    uint16_t *to = static_cast<uint16_t *>(plan.hidden ? p.h : p.o) + mine.at + token * mine.rs;
    bool swap = plan.paired && m.swapped;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int n = first + half * 8;
      if (half == 1 && (plan.paired || n >= m.columns)) break;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float x = total[2 * half + e], u = total[2 + e];
        if (half == 0 && swap) u = x, x = total[2 + e];
        x = finished<E, K>(p, expert, plan.hidden, n + column, x, u);
        if (token + e < mine.rows)
          to[e * mine.rs + n + column] = static_cast<uint16_t>(E::pack(x, 0.0f));
      }
    }
  }

  __device__ __forceinline__ void run(Walk at) {
    open();
    while (at.more()) {
      reach(at.tile);
      const Matrix &m = at.tile >= shared.job()->first_shared ? plan.shared : plan.routed;
      int x = input();
      int stop = at.rounds > 0 ? m.stages : min_of(m.stages, at.stage + at.left), kept = 0;
      bool head = at.stage > 0;  // 这一份由前面的 warp 收尾
      if (at.rounds == 0) at.left -= stop - at.stage;
      float total[4] = {};
      while (at.stage < stop) {
        Sums acc = {};
        int last = min_of(at.stage + m.piece, m.stages);
        for (; at.stage < last; at.stage++) next(acc, at.stage, x);
        const float (&sum)[4] = acc[0][0];
        if (head)
          heads(afresh(warp))[kept++ * WARP] = make_float4(sum[0], sum[1], sum[2], sum[3]);
        else
#pragma unroll
          for (int i = 0; i < 4; i++) total[i] += sum[i];
      }
      if (head) {
        __syncwarp();
        if (lane == 0) mbarrier_arrive(shared.head(afresh(warp)));
      } else {
        if (stop < m.stages) collect(total, m.pieces - stop / m.piece);
        put(total, m, at.unit);
      }
      if (at.more()) advance(at, plan, shared, warp);
    }
    reach(shared.job()->last);
  }
};

// 一个 SM 上几块：两步的核同时在，各 96 个寄存器；少见的几份放不下，就不与另一步的同在。
template <Kind K, bool ALIGNED>
constexpr int RESIDENT = ALIGNED && K != INT4_128 ? 2 : 1;

template <class E, Kind K, bool ALIGNED>
__global__ __launch_bounds__(THREADS, (RESIDENT<K, ALIGNED>)) void moe_codes_kernel(
    const __grid_constant__ Plan plan, dso_cuda_moe_experts_params p) {
  using F = Format<K>;
  Shared shared{dynamic_shared(), plan.stages,    plan.pitch,
                plan.rows,        F::scale_bytes, ALIGNED ? 0 : F::zero_bytes};
  if (threadIdx.x == 0) shared.start(ALIGNED);
  if (!ALIGNED && !plan.zeros) shared.clear_zeros();
  // 同 moe_small_kernel：h 之前的核写块、x，先等再放行；o 之前是 h，块与权重都已在，先读
  if (plan.hidden) grid_wait();
  grid_release();
  if (!plan.hidden) read_early();
  if (threadIdx.x < WARP) {  // 两头各一个线程：除法很慢，一起算
    Line line(plan, p.routing.begin[p.routing.experts + 1]);
    int side = static_cast<int>(threadIdx.x) % 2;
    int at = line.border(static_cast<int>(blockIdx.x) + side), unit = line.unit_at(at);
    int tile = line.total() > 0 ? line.at(at > side ? at - side : 0).tile : 0;
    int end = __shfl_sync(ALL_LANES, at, 1), units = __shfl_sync(ALL_LANES, unit, 1) - unit;
    int last = __shfl_sync(ALL_LANES, tile, 1), rounds = units / WARPS;
    if (threadIdx.x == 0)
      *shared.job() = {unit, rounds,           line.start_of(unit + rounds * WARPS), end, tile,
                       last, line.first_shared};
  }
  __syncthreads();
  const Job &job = *shared.job();
  if (job.rounds == 0 && job.begin == job.end) {
    if (!plan.hidden) grid_wait();
    return;
  }
  if (threadIdx.x >= CONSUMERS) {
    if (!plan.hidden) grid_wait();
    load_inputs(plan, p, shared);
    return;
  }
  int warp = this_warp(), lane = static_cast<int>(threadIdx.x) % WARP;
  Line line(plan, job.first_shared);
  // 三个线程各算一处：第一份；余下的一段的起点、终点
  Spot at =
      line.at(lane == 0 ? line.start_of(job.first_unit + warp) : job.border(warp + lane / 2 % 2));
  int left = __shfl_sync(ALL_LANES, at.before, 2) - __shfl_sync(ALL_LANES, at.before, 1);
  if (lane == 1) shared.block(warp)->tail = {at.tile, at.unit, at.stage, 0, left};
  __syncwarp();
  Walk walk = shared.block(warp)->tail;
  at.tile = __shfl_sync(ALL_LANES, at.tile, 0), at.unit = __shfl_sync(ALL_LANES, at.unit, 0);
  if (job.rounds > 0) walk = {at.tile, at.unit, 0, job.rounds, 0};
  Reader<K, ALIGNED> reader(plan, p.routing, shared, warp, walk);
#pragma unroll 1
  for (int i = 0; i < plan.stages; i++) reader.fetch(warp * plan.stages + i);
  if (!plan.hidden) grid_wait();
  Consumer<E, K, ALIGNED>(plan, p, shared, reader).run(walk);
}

// ---- 启动 ----

// 一个矩阵（有门时两个，同样的形状）；experts、step：几个专家、相隔几字节。
struct Source {
  const dso_mat *mat[2];
  const dso_quant *quant[2];
  int64_t columns, depth, experts, step, scale_step, zero_step;
  bool paired;
};

Source source_of(const dso_cuda_moe_experts_params &p, bool hidden, bool shared) {
  const dso_cuda_moe_weights &w = p.w;
  const dso_expert &e = shared ? w.shared : w.first;
  bool paired = hidden && w.gated;
  Source s = {{hidden ? &e.gate : &e.down, &e.up},
              {hidden ? &e.gate_quant : &e.down_quant, &e.up_quant},
              hidden ? e.inner : p.n,
              hidden ? p.k : e.inner,
              1,
              0,
              0,
              0,
              paired};
  if (shared) return s;
  s.experts = p.routing.experts;
  s.step = hidden ? w.gate_step : w.down_step;
  s.scale_step = hidden ? w.gate_scale_step : w.down_scale_step;
  s.zero_step = hidden ? w.gate_zero_step : w.down_zero_step;
  return s;
}

int64_t distance(const Source &s) {
  return static_cast<const char *>(s.mat[1]->data) - static_cast<const char *>(s.mat[0]->data);
}

bool zeros_fit(const Source &s, int side) {
  const uint8_t *zero = s.quant[side]->zero;
  return !zero || (reinterpret_cast<uintptr_t>(zero) % 4 == 0 && s.quant[side]->groups % 4 == 0 &&
                   s.zero_step % 4 == 0);
}

// TMA 能走：行、专家、gate 与 up 的间隔都是正的 16 的倍数（没有次序的取绝对值）；零点 4 个一读。
bool fits(const Source &s) {
  if (s.experts <= 0 || s.columns <= 0 || s.depth <= 0 || s.mat[0]->rs <= 0) return false;
  if (s.experts > 1 && (s.step <= 0 || s.step % 16 != 0)) return false;
  if (!zeros_fit(s, 0)) return false;
  if (!s.paired) return true;
  int64_t apart = distance(s);
  return apart != 0 && apart % 16 == 0 && s.mat[0]->rs == s.mat[1]->rs && zeros_fit(s, 1) &&
         !s.quant[0]->zero == !s.quant[1]->zero && s.quant[0]->groups == s.quant[1]->groups;
}

// 尺度能由 TMA 读：各间隔都是 16 的倍数；gate、up 的先后与码的相同。
bool scales_aligned(const Source &s) {
  const dso_quant &q = *s.quant[0];
  if (q.zero || q.groups % 4 != 0 || reinterpret_cast<uintptr_t>(q.scale) % 16 != 0) return false;
  if (s.experts > 1 && (s.scale_step <= 0 || s.scale_step % 16 != 0)) return false;
  if (!s.paired) return true;
  int64_t apart = s.quant[1]->scale - q.scale;
  return apart % 4 == 0 && apart != 0 && (apart < 0) == (distance(s) < 0);
}

cudaError_t fill(Matrix *m, const Source &s, bool aligned, int quads) {
  int64_t apart = s.paired ? distance(s) : 0, groups = s.quant[0]->groups;
  m->swapped = apart < 0;
  for (int i = 0; i < 2; i++) {
    const dso_quant &q = *s.quant[s.paired ? (i == 1) != m->swapped : 0];
    int64_t below = s.paired || i == 0 ? 0 : 8 * groups;
    m->scale[i] = q.scale + below, m->zero[i] = q.zero ? q.zero + below : nullptr;
  }
  m->scale_step = s.scale_step, m->zero_step = s.zero_step;
  m->groups = static_cast<int>(groups), m->columns = static_cast<int>(s.columns);
  m->depth = static_cast<int>(s.depth);
  m->units = static_cast<int>(ceil_div(s.columns, s.paired ? 8 : ROWS));
  m->stages = static_cast<int>(ceil_div(s.depth, STAGE_K));
  m->piece = static_cast<int>(ceil_div(m->stages, PIECES));
  m->pieces = static_cast<int>(ceil_div(m->stages, m->piece));
  // 都当作 16 位的数搬，TMA 只看大小
  int sides = s.paired ? 2 : 1;
  int64_t width = groups * s.quant[0]->group / 4, step = s.step / 2;
  const void *base = m->swapped ? s.mat[1]->data : s.mat[0]->data;
  cudaError_t error = make_tensor_map(&m->codes, {base,
                                                  DSO_BF16,
                                                  4,
                                                  {width, s.columns, sides, s.experts},
                                                  {1, s.mat[0]->rs / 2, std::abs(apart) / 2, step},
                                                  {BOX_COLUMNS, ROWS / sides, sides, 1}});
  if (error != cudaSuccess || !aligned) return error;
  apart = s.paired ? m->scale[1] - m->scale[0] : 0;
  return make_tensor_map(&m->scales, {m->scale[0],
                                      DSO_BF16,
                                      4,
                                      {groups * 2, s.columns, sides, s.experts},
                                      {1, groups * 2, apart * 2, s.scale_step / 2},
                                      {quads * 8, ROWS / sides, sides, 1},
                                      true});
}

int bytes_per_stage(Kind kind, bool aligned) {
  auto bytes = [&](auto format) {
    using F = decltype(format);
    return STAGE + F::scale_bytes + (aligned ? 0 : F::zero_bytes);
  };
  return kind == INT4_32   ? bytes(Format<INT4_32>())
         : kind == INT4_64 ? bytes(Format<INT4_64>())
                           : bytes(Format<INT4_128>());
}

// 共享内存怎样分：几级，x 几行。
struct Room {
  int stages, rows;
  int64_t pitch;
};

// 与另一步的核同在一个 SM 上，放不下就独占；stages 为 0：放不下。余下的给 x：多放几行，下一块的就能先读。
Room room_of(const dso_cuda_moe_experts_params &p, bool hidden, Kind kind, bool aligned,
             int limit) {
  int64_t pitch = ceil_div(hidden ? p.k : hidden_columns(p), STAGE_K) * STAGE_K + PAD;
  int bytes = bytes_per_stage(kind, aligned);
  for (int most : {hidden ? MOE_CODES_HIDDEN_BYTES : MOE_CODES_OUTPUT_BYTES, limit}) {
    auto room = static_cast<size_t>(min_of(most, limit));
    Room r = {MOE_CODES_STAGES, TOKENS, pitch};
    while (r.stages > 0 && shared_bytes(r.stages, bytes, r.rows, pitch) > room) r.stages--;
    if (r.stages < MOE_CODES_LEAST) continue;
    while (r.rows < 2 * TOKENS && shared_bytes(r.stages, bytes, r.rows + 1, pitch) <= room)
      r.rows++;
    return r;
  }
  return {};
}

bool is_int4(Kind kind) { return kind == INT4_32 || kind == INT4_64 || kind == INT4_128; }

template <class E, Kind K>
cudaError_t run(const Plan &plan, const dso_cuda_moe_experts_params &p, int sms,
                cudaStream_t stream) {
  size_t bytes = shared_bytes(plan.stages, bytes_per_stage(K, plan.aligned), plan.rows, plan.pitch);
  auto kernel = plan.aligned ? moe_codes_kernel<E, K, true> : moe_codes_kernel<E, K, false>;
  cudaError_t error = prefer_shared(kernel);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(static_cast<unsigned>(sms)), dim3(THREADS), bytes, stream, plan, p);
}

template <class E>
cudaError_t choose(const Plan &plan, const dso_cuda_moe_experts_params &p, Kind kind, int sms,
                   cudaStream_t stream) {
  switch (kind) {
    case INT4_32:
      return run<E, INT4_32>(plan, p, sms, stream);
    case INT4_64:
      return run<E, INT4_64>(plan, p, sms, stream);
    default:
      return run<E, INT4_128>(plan, p, sms, stream);
  }
}

}  // namespace

bool dso::moe_codes_sm90_fits(const dso_cuda_moe_experts_params &p, bool hidden, Part part,
                              Kind kind) {
  const dso_cuda_moe_routing &r = p.routing;
  if (part == SHARED || !is_int4(kind) || r.tile_rows <= 0 || r.tile_rows > TOKENS ||
      r.most_tiles == 0)
    return false;
  bool shared = part == ALL && r.shared;
  if (p.w.list || p.w.transposed || p.w.paired || p.saved) return false;
  if (!fits(source_of(p, hidden, false)) || (shared && !fits(source_of(p, hidden, true))))
    return false;
  // 合在一起做的，有没有零点要一样
  const dso_quant &a = hidden ? p.w.first.gate_quant : p.w.first.down_quant;
  const dso_quant &b = hidden ? p.w.shared.gate_quant : p.w.shared.down_quant;
  if (shared && !a.zero != !b.zero) return false;
  int64_t widest = hidden ? hidden_columns(p) : p.n;
  if (r.most_tiles * ceil_div(widest, 8) * PIECES >= INT32_MAX) return false;
  Device device;
  return device_of(&device) == cudaSuccess && device.major == 9 &&
         room_of(p, hidden, kind, false, device.shared_limit).stages > 0;
}

cudaError_t dso::moe_codes_sm90(const dso_cuda_moe_experts_params &p, bool hidden, Part part,
                                Kind kind, cudaStream_t stream) {
  const dso_cuda_moe_routing &r = p.routing;
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  Plan plan = {};
  bool shared = part == ALL && r.shared;
  Source routed_from = source_of(p, hidden, false), shared_from = source_of(p, hidden, true);
  plan.aligned = scales_aligned(routed_from) && (!shared || scales_aligned(shared_from));
  int quads = kind == INT4_32 ? Format<INT4_32>::quads : 1;
  error = fill(&plan.routed, routed_from, plan.aligned, quads);
  if (error == cudaSuccess && shared) error = fill(&plan.shared, shared_from, plan.aligned, quads);
  if (error != cudaSuccess) return error;
  plan.hidden = hidden, plan.paired = hidden && p.w.gated;
  plan.shared_tiles = shared ? static_cast<int>(ceil_div(r.tokens, r.tile_rows)) : 0;
  const dso_expert &e = p.w.first;
  plan.biased = hidden ? e.gate_bias || e.up_bias : e.down_bias != nullptr;
  plan.zeros = plan.routed.zero[0] != nullptr;
  Room room = room_of(p, hidden, kind, plan.aligned, device.shared_limit);
  plan.stages = room.stages, plan.rows = room.rows, plan.pitch = static_cast<int>(room.pitch);
  return p.dtype == DSO_BF16 ? choose<Bf16>(plan, p, kind, device.sms, stream)
                             : choose<F16>(plan, p, kind, device.sms, stream);
}
