// moe_experts 词元少时的路径：h、o 两步各一个核，权重只读一遍。
//
// 一个 warp 管 16 行权重（有门时 8 行 gate 与对应的 8 行 up，于是同一个线程得到一对，当场激活）、一块至多 32 个词元。
// 一个 CTA 4 个 warp：权重的行短时各管各的，长时几个 warp 各管 K 的一段，最后按次序相加。
#include "moe_codes_sm90.cuh"
#include "moe_direct.cuh"
#include "moe_small.cuh"
#include "moe_small_put.cuh"

namespace {

using namespace dso;
using namespace dso::small;

constexpr int LOG_WARPS = 2, WARPS = 1 << LOG_WARPS, THREADS = WARPS * WARP;

// 几步的读在途（连同尺度、零点），占 32 到 48 个寄存器：每个 SM 上 80 到 128 KiB。SETS 份 16 行一起读时减半。
template <Kind K, int SETS>
constexpr int AHEAD = SETS == 2 && Step<K>::words == 4 ? 2 : 4;

struct Work {
  const dso_cuda_moe_experts_params &p;
  dso_cuda_moe_tile tile;
  bool hidden, paired;        // paired：上是 gate，下是 up
  int split, first, columns;  // 2^split 个 warp 分 K；从第 first 列起

  // 一个 warp 管 2^wide 列。
  template <int SETS>
  __device__ __forceinline__ int wide() const {
    return (paired ? 3 : 4) + (SETS == 2 ? 1 : 0);
  }

  // 第 row 个词元（块内）的 x 或 h；没有的给第一个。
  __device__ __forceinline__ const uint16_t *input(int row) const {
    int at = tile.row + (row < tile.rows ? row : 0);
    if (hidden) return static_cast<const uint16_t *>(p.x.data) + token_of(p.routing, at) * p.x.rs;
    return static_cast<const uint16_t *>(p.h) + hidden_at(p, at);
  }
};

// 收尾时要的：块放在这里，循环里不占寄存器。
template <int COUNT>
struct Shared {
  float sums[COUNT];
  dso_cuda_moe_tile tile;
};

// int4、一块至多 8 行（X_ROWS）时 x 的来处。
constexpr int LOG_ROWS = 3, X_ROWS = 1 << LOG_ROWS;

struct Input {
  const uint16_t *row[X_ROWS];
  int depth;
};
struct Nothing {};

// 部分和在共享内存里的位置：一份 16 行、一份 8 个词元；value：上 0、1，下 2、3；片段里的第 g 列、第 c 个线程。
// g 在最低：写、读都没有库冲突。
template <int NT>
__device__ __forceinline__ int sum_at(int set, int t, int value, int c, int g) {
  return (((set * NT + t) * 4 + value) * 4 + c) * 8 + g;
}

// 一个结果：收尾，写出。
template <class E, Kind K>
__device__ __forceinline__ void put(const Work &work, const dso_expert &expert, int row, int n,
                                    float x, float u) {
  const dso_cuda_moe_experts_params &p = work.p;
  int64_t at = work.tile.row + row;
  auto y = static_cast<uint16_t>(E::pack(finished<E, K>(p, expert, work.hidden, n, x, u), 0.0f));
  if (work.hidden)
    static_cast<uint16_t *>(p.h)[hidden_at(p, at) + n] = y;
  else
    static_cast<uint16_t *>(p.o)[at * p.n + n] = y;
}

// 分 K 的各 warp 的部分和按次序相加，写出。
template <class E, Kind K, int NT, int SETS, int COUNT>
__device__ __forceinline__ void finish(const float (&acc)[SETS][NT][4], Work &work,
                                       Shared<COUNT> &kept) {
  float *sums = kept.sums;
  constexpr int EACH = SETS * NT * 4 * WARP;
  int thread = static_cast<int>(threadIdx.x), warp = thread / WARP;
#pragma unroll
  for (int s = 0; s < SETS; s++)
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[warp * EACH + sum_at<NT>(s, t, i, thread % 4, thread % WARP / 4)] = acc[s][t][i];
  __syncthreads();
  int wide = work.wide<SETS>(), all = wide + LOG_WARPS - work.split;
  work.tile = kept.tile, work.first = static_cast<int>(blockIdx.x) << all;
  if (thread >= work.tile.rows << all) return;
  dso_expert expert = expert_at(work.p.w, work.p.routing.experts, afresh(work.tile.expert));
  work.columns = columns_of(work.p, expert, work.hidden);
  // 相邻的线程是同一个词元相邻的列
#pragma unroll 1
  for (int index = thread; index < work.tile.rows << all; index += THREADS) {
    int row = index >> all, column = index & ((1 << all) - 1), n = work.first + column;
    if (n >= work.columns) continue;
    int inside = column & ((1 << wide) - 1), side = work.paired ? 0 : inside / 8 % 2;
    int set = SETS == 1 ? 0 : inside >> (wide - 1);
    const float *from = sums + (column >> wide << work.split) * EACH +
                        sum_at<NT>(set, row / 8, row % 2 + 2 * side, row % 8 / 2, inside % 8);
    float x = 0.0f, u = 0.0f;
    for (int w = 0; w < 1 << work.split; w++, from += EACH) {
      x += from[0];
      if (work.paired) u += from[2 * WARP];
    }
    put<E, K>(work, expert, row, n, x, u);
  }
}

template <class E, Kind K, int NT, int SETS, bool ONE, int COUNT>
__device__ __forceinline__ void compute(Work &work, const Source (&source)[2], int depth,
                                        Shared<COUNT> &kept) {
  using S = Step<K>;
  int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  int g = lane / 4, last = work.columns - 1;
  int first = work.first + (warp >> work.split << work.wide<SETS>());
  Rows rows[SETS];
#pragma unroll
  for (int s = 0; s < SETS; s++)
#pragma unroll
    for (int side = 0; side < 2; side++) {  // 越界的算了不写
      int n = first + (work.paired ? s * 8 : s * 16 + side * 8) + g;
      rows[s].put(side, source[side], min_of(n, last));
    }
  int steps = (depth + S::k - 1) / S::k, share = warp & ((1 << work.split) - 1);
  int each = (steps + (S::per_group << work.split) - 1) / S::per_group >> work.split;
  int begin = min_of(steps, share * each * S::per_group);
  int mine = first < work.columns ? min_of(steps - begin, each * S::per_group) : 0;
  Stream<E, K, NT, SETS, AHEAD<K, SETS>, ONE> stream(rows, begin, mine, depth);
  grid_wait();
  const uint16_t *x[NT];
#pragma unroll
  for (int t = 0; t < NT; t++) x[t] = work.input(t * 8 + g);
  stream.run(x);
  finish<E, K, NT, SETS>(stream.acc, work, kept);
}

// int4、一块 8 行时一圈几步（QUAD 的倍数）：每个 SM 上 5、6 块，在途的共 50 到 80 KiB。一圈的读到齐了才用，等的是一次显存，
// 所以块多比圈长好。
template <Kind K>
constexpr int LAP = K == INT4_32 ? 8 : 4;

// 分 K 的一路几步：QUAD 的倍数。
template <Kind K>
__device__ __forceinline__ int share_steps(int depth, int split) {
  int steps = (depth + Step<K>::k - 1) / Step<K>::k;
  return (steps + (QUAD << split) - 1) >> (LOG_QUAD + split) << LOG_QUAD;
}

// 动态共享内存里的一段 x [路][行]：行按实有的留（2 的幂），少时一段就长；行满、四路时一段正好一圈。行距多 32 字节：一次
// 读的 8 个线程（两行）不在同一个库。
template <Kind K>
struct Piece {
  static constexpr int PAD = 16, LAP_K = Step<K>::k * LAP<K>, MOST = LOG_ROWS + LOG_WARPS;
  static constexpr size_t bytes = ((LAP_K + PAD) << MOST) * sizeof(uint16_t);
  int rows, laps;  // 每路几行、几圈

  __device__ __forceinline__ Piece(int tokens, int split) {
    int log_rows = (tokens > 1) + (tokens > 2) + (tokens > 4);
    rows = 1 << log_rows, laps = 1 << (MOST - log_rows - split);
  }
  __device__ __forceinline__ uint16_t *at(int share, int row) const {
    return reinterpret_cast<uint16_t *>(dynamic_shared()) +
           (share * rows + row) * (laps * LAP_K + PAD);
  }
};

// 各路从自己的第 from 步起的一段 x；越过一行的填 0。
template <Kind K>
__device__ __forceinline__ void stage(const Input &input, int tokens, int split, int from) {
  Piece<K> piece(tokens, split);
  int depth = input.depth, each = share_steps<K>(depth, split);
  int chunks = min_of(piece.laps * Piece<K>::LAP_K, (each - from) * Step<K>::k) / 8;
#pragma unroll 1
  for (int row = 0; row < tokens; row++) {
    const uint16_t *base = input.row[row];
#pragma unroll 1
    for (int share = 0; share < 1 << split; share++)
#pragma unroll 2
      for (int i = static_cast<int>(threadIdx.x); i < chunks; i += THREADS) {
        int k = (share * each + from) * Step<K>::k + i * 8;
        cp_async_16(piece.at(share, row) + i * 8, base + (k < depth ? k : 0), k < depth);
      }
  }
  cp_async_commit();
  cp_async_wait<0>();
}

// int4、至多 8 个词元：x 一段一段地搬进共享内存，几个 warp 合用，见 CodeStream。各段之间要的都在共享内存里，循环里不占
// 寄存器。
template <class E, Kind K, int COUNT>
__device__ __forceinline__ void compute_codes(Work &work, const Source (&source)[2], int depth,
                                              Shared<COUNT> &kept, Input &input) {
  using S = Step<K>;
  int thread = static_cast<int>(threadIdx.x), lane = thread % WARP, warp = thread / WARP;
  int g = lane / 4, first = work.first + (warp >> work.split << work.wide<1>());
  // 只有一个 warp 等词元的下标，别的先读权重
  if (warp == WARPS - 1 && lane < X_ROWS) input.row[lane] = work.input(lane);
  if (thread == 0) input.depth = depth;
  Rows rows;
#pragma unroll
  for (int side = 0; side < 2; side++) {  // 越界的算了不写
    int n = first + (work.paired ? 0 : side * 8) + g;
    rows.put(side, source[side], min_of(n, work.columns - 1));
  }
  int steps = (depth + S::k - 1) / S::k, share = warp & ((1 << work.split) - 1);
  int each = share_steps<K>(depth, work.split), begin = min_of(steps, share * each);
  int mine = first < work.columns ? min_of(steps - begin, each) : 0;
  CodeStream<E, K, LAP<K>> stream(rows, source[0].wide() && source[1].wide(), begin, mine);
  const uint16_t *x = Piece<K>(work.tile.rows, work.split).at(share, g < work.tile.rows ? g : 0) +
                      lane_offset<K>(lane % 4);
  grid_wait();
  for (int from = 0;;) {
    __syncthreads();  // 上一段都用过了
    stage<K>(input, kept.tile.rows, work.split, from);
    __syncthreads();
    int laps = Piece<K>(kept.tile.rows, work.split).laps;
    stream.run(x, laps);
    from += laps * LAP<K>;
    if (from >= share_steps<K>(input.depth, work.split)) break;
  }
  finish<E, K, 1, 1>(stream.acc, work, kept);
}

// MOST：一块至多多少份（8 个）词元。一个 warp 管几份 16 行：int4 的权重少，词元多时读 x 就显得多，两份共用。
template <Kind K, int MOST>
constexpr int SETS_OF = Step<K>::int4 && MOST > 1 ? 2 : 1;

// 一个 SM 上至少几块：再多寄存器就要溢出。int4 宁可块多：一圈 8 步、4 块（在途的一样多）在 H200 上慢 15 %。
template <Kind K, int MOST, bool ONE>
constexpr int RESIDENT = MOST == 1       ? (K == INT4_64 || ONE ? 6
                                            : K == FP8_128      ? 4
                                                                : 5)
                         : Step<K>::int4 ? 2
                                         : 3;

// ONE：每块只有一个词元（不排序时）；一个词元时 768 块，一个 SM 6 块才不必分两波，所以只有 16 位的用它。
template <class E, Kind K, int MOST, bool ONE>
__global__ __launch_bounds__(THREADS, (RESIDENT<K, MOST, ONE>)) void moe_small_kernel(
    dso_cuda_moe_experts_params p, bool hidden, int split, Part part) {
  constexpr int SETS = SETS_OF<K, MOST>;
  constexpr bool CODES = Step<K>::int4 && MOST == 1;
  __shared__ Shared<WARPS * SETS * MOST * 4 * WARP> kept;
  __shared__ std::conditional_t<CODES, Input, Nothing> input;
  // h 之前的核写块、下标、x；o 之前是 h：块、下标、权重都已在，先读
  if (hidden) grid_wait();
  grid_release();
  dso_cuda_moe_tile at = tile_at(p.routing, static_cast<int>(blockIdx.y));
  if (skips(p, at, part)) {
    grid_wait();
    return;
  }
  Work work{p, at, hidden, hidden && p.w.gated, split, 0, 0};
  Source source[2];
  int depth;
  {
    dso_expert e = expert_at(p.w, p.routing.experts, at.expert);
    work.columns = columns_of(p, e, hidden), depth = static_cast<int>(hidden ? p.k : e.inner);
    source[0] = hidden ? source_of<K>(e.gate, e.gate_quant) : source_of<K>(e.down, e.down_quant);
    source[1] = work.paired ? source_of<K>(e.up, e.up_quant) : source[0];
  }
  work.first = static_cast<int>(blockIdx.x) << (work.wide<SETS>() + LOG_WARPS - split);
  if (work.first >= work.columns) {
    grid_wait();
    return;
  }
  if (threadIdx.x == 0) kept.tile = at;
  if constexpr (CODES) {
    compute_codes<E, K>(work, source, depth, kept, input);
  } else if constexpr (MOST == 1) {
    compute<E, K, 1, SETS, ONE>(work, source, depth, kept);
  } else {
    if (at.rows <= 8)
      compute<E, K, 1, SETS, ONE>(work, source, depth, kept);
    else if (at.rows <= 16)
      compute<E, K, 2, SETS, false>(work, source, depth, kept);
    else
      compute<E, K, 4, SETS, false>(work, source, depth, kept);
  }
}

struct Call {
  const dso_cuda_moe_experts_params &p;
  bool hidden;
  Part part;
  cudaStream_t stream;
};

// 2 的几次方个 warp 分 K：每个 warp 至少读 MOE_SMALL_WARP_BYTES，除非那样一来 warp 太少。
int split_of(int64_t groups, int64_t bytes) {
  int split = LOG_WARPS;
  while (split > 0 && bytes >> split < MOE_SMALL_WARP_BYTES &&
         groups << (split - 1) >= MOE_SMALL_WARPS)
    split--;
  return split;
}

template <class E, Kind K, int MOST, bool ONE>
cudaError_t run(const Call &c) {
  using S = Step<K>;
  const dso_cuda_moe_routing &r = c.p.routing;
  constexpr int SETS = SETS_OF<K, MOST>;
  int64_t columns = c.hidden ? hidden_columns(c.p) : c.p.n;
  int64_t depth = c.hidden ? c.p.k : hidden_columns(c.p);
  int64_t wide = (c.hidden && c.p.w.gated ? 8 : 16) * SETS;
  int64_t tiles = r.tile_rows > 0 ? r.most_tiles : r.tokens * (r.top_k + (r.shared ? 1 : 0));
  int split =
      split_of(tiles * ceil_div(columns, wide), SETS * 16 * S::row_bytes * ceil_div(depth, S::k));
  dim3 grid(static_cast<unsigned>(ceil_div(columns, wide << (LOG_WARPS - split))),
            static_cast<unsigned>(tiles));
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  size_t bytes = S::int4 && MOST == 1 ? Piece<K>::bytes : 0;
  return launch(moe_small_kernel<E, K, MOST, ONE>, grid, dim3(THREADS), bytes, c.stream, c.p,
                c.hidden, split, c.part);
}

cudaError_t choose(const Call &c, Kind kind) {
  const dso_cuda_moe_routing &r = c.p.routing;
  if (r.tile_rows == 0 && !c.hidden) return moe_direct(c.p, kind, c.stream);
  return with_types(c.p.dtype, kind, [&](auto element, auto k) {
    using E = decltype(element);
    if (r.tile_rows == 0) return run<E, k(), 1, k() == PLAIN>(c);
    return r.tile_rows <= 8 ? run<E, k(), 1, false>(c) : run<E, k(), 4, false>(c);
  });
}

}  // namespace

cudaError_t dso::moe_small(const dso_cuda_moe_experts_params &p, bool hidden, cudaStream_t stream) {
  auto run = [&](Part part, Kind kind) {
    bool codes = moe_codes_sm90_fits(p, hidden, part, kind);
    return codes ? moe_codes_sm90(p, hidden, part, kind, stream)
                 : choose({p, hidden, part, stream}, kind);
  };
  Kind routed = kind_of(p.w.first), shared = p.routing.shared ? kind_of(p.w.shared) : routed;
  if (routed == shared) return run(ALL, routed);
  cudaError_t error = run(ROUTED, routed);
  return error == cudaSuccess ? run(SHARED, shared) : error;
}
