// moe_codes_sm90.cu 的数据：一步的计划（主机填），共享内存怎样分，工作怎样分给 CTA 与 warp。
#pragma once

#include <tma.cuh>

#include <cstdlib>

#include "config.cuh"
#include "moe_common.cuh"
#include "moe_small_codes.cuh"
#include "tile_sm90.cuh"

namespace dso::codes {

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

inline size_t shared_bytes(int stages, int stage_bytes, int64_t rows, int64_t pitch) {
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
__device__ inline int next_row(int row, int rows, int next, int most) {
  return row + rows + next > most ? 0 : row + rows;
}

// ---- 主机上：填计划 ----

// 一个矩阵（有门时两个，同样的形状）；experts、step：几个专家、相隔几字节。
struct Source {
  const dso_mat *mat[2];
  const dso_quant *quant[2];
  int64_t columns, depth, experts, step, scale_step, zero_step;
  bool paired;
};

inline Source source_of(const dso_cuda_moe_experts_params &p, bool hidden, bool shared) {
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

inline int64_t distance(const Source &s) {
  return static_cast<const char *>(s.mat[1]->data) - static_cast<const char *>(s.mat[0]->data);
}

inline bool zeros_fit(const Source &s, int side) {
  const uint8_t *zero = s.quant[side]->zero;
  return !zero || (reinterpret_cast<uintptr_t>(zero) % 4 == 0 && s.quant[side]->groups % 4 == 0 &&
                   s.zero_step % 4 == 0);
}

// TMA 能走：行、专家、gate 与 up 的间隔都是正的 16 的倍数（没有次序的取绝对值）；零点 4 个一读。
inline bool fits(const Source &s) {
  if (s.experts <= 0 || s.columns <= 0 || s.depth <= 0 || s.mat[0]->rs <= 0) return false;
  if (s.experts > 1 && (s.step <= 0 || s.step % 16 != 0)) return false;
  if (!zeros_fit(s, 0)) return false;
  if (!s.paired) return true;
  int64_t apart = distance(s);
  return apart != 0 && apart % 16 == 0 && s.mat[0]->rs == s.mat[1]->rs && zeros_fit(s, 1) &&
         !s.quant[0]->zero == !s.quant[1]->zero && s.quant[0]->groups == s.quant[1]->groups;
}

// 尺度能由 TMA 读：各间隔都是 16 的倍数；gate、up 的先后与码的相同。
inline bool scales_aligned(const Source &s) {
  const dso_quant &q = *s.quant[0];
  if (q.zero || q.groups % 4 != 0 || reinterpret_cast<uintptr_t>(q.scale) % 16 != 0) return false;
  if (s.experts > 1 && (s.scale_step <= 0 || s.scale_step % 16 != 0)) return false;
  if (!s.paired) return true;
  int64_t apart = s.quant[1]->scale - q.scale;
  return apart % 4 == 0 && apart != 0 && (apart < 0) == (distance(s) < 0);
}

inline cudaError_t fill(Matrix *m, const Source &s, bool aligned, int quads) {
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

inline int bytes_per_stage(Kind kind, bool aligned) {
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
inline Room room_of(const dso_cuda_moe_experts_params &p, bool hidden, Kind kind, bool aligned,
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

}  // namespace dso::codes
