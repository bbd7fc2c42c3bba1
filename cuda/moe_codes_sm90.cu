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
#include "moe_codes_sm90.cuh"

#include "moe_codes_plan_sm90.cuh"
#include "moe_small_put.cuh"

namespace {

using namespace dso;
using namespace dso::codes;

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

// 用的一头。
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

// 还没有在设备上量过：DEEPSEEK_OPT_CUDA_CODES=1 才用（benchmarks/gpu_cases/moe.py 比较两者）。
bool wanted() {
  const char *chosen = std::getenv("DEEPSEEK_OPT_CUDA_CODES");
  return chosen && std::atoi(chosen) != 0;
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
  if (!wanted() || part == SHARED || !is_int4(kind) || r.tile_rows <= 0 || r.tile_rows > TOKENS ||
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
