// moe_experts 的 Hopper 路径：分组的矩阵乘，TMA 搬运，wgmma 累加；h、o 两步是同一个核。
//
// CTA 常驻，一个 SM 一个，依次做几块（一块行、一段列）：一块收尾时下一块的操作数已经在路上。一块 128 行 x 256 列权重，
// 两个消费者组各 64 行；有门时 256 列是 128 列 gate 接着对应的 128 列 up（一条 wgmma），同一个线程得到两者，激活在写出时。
// 两组错开：第 1 组等第 0 组先走 LEAD 步才开始一块，所以一组写出时另一组还占着矩阵单元。
//
// x 的行由 token 收集：生产者的 4 个 warp 用 cp.async 按 TMA 的交错写进共享内存，写完时到达同一个 mbarrier；权重是
// [K, 行, 专家] 的张量，TMA 原地读，列、K 越界的填 0。行越界的（下一个专家的、没写过的）只影响自己那一行，不写出。
#include <tma.cuh>

#include "config.cuh"
#include "mma.cuh"
#include "moe_act.cuh"
#include "moe_experts.cuh"
#include "tile_sm90.cuh"

namespace {

using namespace dso;

constexpr int ROWS = MOE_ROWS, COLUMNS = MOE_COLUMNS_SM90, STAGES = MOE_STAGES_SM90;
constexpr int GROUP = 4 * WARP, GROUPS = 2, CONSUMERS = GROUPS * GROUP;
constexpr int THREADS = CONSUMERS + GROUP;
constexpr int GROUP_ROWS = ROWS / GROUPS, WARP_ROWS = 16;
constexpr int HALF = COLUMNS / 2;  // 一次写出的列数；有门时 gate、up 各这么多
constexpr int LEAD = 2, LEAD_BARRIER = 1;
static_assert(GROUP_ROWS == 64 && HALF == 2 * BOX_COLUMNS,
              "wgmma 的 M 是 64；写出按两个 64 列的块");
static_assert(LEAD < STAGES, "第 0 组领先的步数受级数所限");

// 共享内存：各级的 A [128, 64]、B [256, 64]；各 warp 写出用的 [16, 128]；mbarrier。
constexpr int A_BYTES = ROWS * BOX_ROW, B_BYTES = COLUMNS * BOX_ROW, STAGE = A_BYTES + B_BYTES;
constexpr int STAGED_BOX = WARP_ROWS * BOX_ROW, STAGED_WARP = HALF / BOX_COLUMNS * STAGED_BOX;
constexpr int STAGED = STAGES * STAGE, BARRIERS = STAGED + CONSUMERS / WARP * STAGED_WARP;
constexpr int BYTES = BARRIERS + 2 * STAGES * 8;
static_assert(BYTES <= SHARED_SM90, "共享内存放不下");

// 有门的 h、没有门的 h、o。
enum Product { GATED, PLAIN, OUTPUT };

// a 只有算 o 时用（h 的行），up 只有有门时用。
struct Operands {
  CUtensorMap a, b, up;
};

struct Maps {
  Operands routed, shared;
};

struct Shared {
  unsigned char *base = dynamic_shared();

  // step 是这个 CTA 从头数起的第几步（64 个 k）。
  __device__ unsigned char *a(int step) const { return base + step % STAGES * STAGE; }
  __device__ unsigned char *b(int step) const { return a(step) + A_BYTES; }
  __device__ uint64_t *full(int step) const {
    return reinterpret_cast<uint64_t *>(base + BARRIERS) + step % STAGES;
  }
  __device__ uint64_t *empty(int step) const { return full(step) + STAGES; }
  // 第 step 步用它那一级的第几轮：full 等这一轮的奇偶，empty 等上一轮的。
  __device__ static int parity(int step) { return step / STAGES % 2; }

  // gathered：A 由 GROUP 个线程的 cp.async 写。
  __device__ void start(bool gathered) const {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(full(i), gathered ? 1 + GROUP : 1);
      mbarrier_init(empty(i), CONSUMERS / WARP);
    }
    mbarrier_init_fence();
  }
};

// 一块行的第 first 列起的一段。
struct Work {
  dso_cuda_moe_tile tile;
  int first;           // 算 h 时是中间宽里的第几列
  int columns, depth;  // 这个专家的列数、K
  bool shared;

  __device__ int steps() const { return (depth + BOX_COLUMNS - 1) / BOX_COLUMNS; }
};

// 这个 CTA 的各份工作。相邻的 MOE_GROUP 块行与全部的列块一起做，同时在做的 CTA 因此共用 L2 里的权重与 x。
// AHEAD：下一份的块先读好，读的延迟盖在这一份里；生产者读过之后，消费者再读就在 L1 里。
template <Product P, bool AHEAD, class Run>
__device__ void each_work(const dso_cuda_moe_experts_params &p, unsigned column_blocks, Run run) {
  const dso_cuda_moe_routing &r = p.routing;
  auto tiles = static_cast<unsigned>(r.most_tiles);
  unsigned total = tiles * column_blocks, each = MOE_GROUP * column_blocks;
  Work next = {};
  auto fetch = [&](unsigned n) {
    unsigned first = n / each * MOE_GROUP, left = tiles - first, inside = n % each;
    unsigned many = left < MOE_GROUP ? left : MOE_GROUP;
    next.tile = r.tiles[first + inside % many];
    next.first = static_cast<int>(inside / many) * (P == GATED ? HALF : COLUMNS);
  };
  if (AHEAD) fetch(blockIdx.x);
  for (unsigned n = blockIdx.x; n < total; n += gridDim.x) {
    if (!AHEAD) fetch(n);
    Work now = next;
    if (AHEAD && n + gridDim.x < total) fetch(n + gridDim.x);
    now.shared = now.tile.expert >= r.experts;
    int inner = static_cast<int>(now.shared ? p.w.shared.inner : p.w.first.inner);
    now.columns = P == OUTPUT ? static_cast<int>(p.n) : inner;
    now.depth = P == OUTPUT ? inner : static_cast<int>(p.k);
    if (now.tile.rows > 0 && now.first < now.columns) run(now);
  }
}

template <Product P>
struct Producer {
  static constexpr int COPIES = ROWS / (GROUP / 8);  // 每线程每步拷几段（16 字节）

  const Maps &maps;
  const dso_cuda_moe_experts_params &p;
  Shared shared;
  int thread, step = 0;

  __device__ Producer(const Maps &m, const dso_cuda_moe_experts_params &params)
      : maps(m), p(params), thread(static_cast<int>(threadIdx.x) - CONSUMERS) {}

  // 一个线程发出。
  __device__ void load(const Work &w, int k) {
    const Operands &from = w.shared ? maps.shared : maps.routed;
    uint64_t *full = shared.full(step);
    int e = w.shared ? 0 : w.tile.expert;
    mbarrier_expect(full, P == OUTPUT ? STAGE : B_BYTES);
    if (P == OUTPUT) {
      int slots = static_cast<int>(p.routing.tokens * p.routing.top_k);
      tma_load(shared.a(step), &from.a, full, k, w.shared ? w.tile.row - slots : w.tile.row);
    }
    tma_load(shared.b(step), &from.b, full, k, w.first, e);
    if (P == GATED) tma_load(shared.b(step) + B_BYTES / 2, &from.up, full, k, w.first, e);
  }

  // 8 个线程一行，隔 16 行一段。
  __device__ void gather(const int (&token)[COPIES], int k) {
    int column = thread % 8 * 8;
    unsigned char *to = shared.a(step) + swizzled(thread / 8, column);
    const auto *x = static_cast<const uint16_t *>(p.x.data) + k + column;
    bool inside = k + column < p.k;
#pragma unroll
    for (int i = 0; i < COPIES; i++) {
      bool valid = inside && token[i] >= 0;
      cp_async_16(to + i * (GROUP / 8) * BOX_ROW, valid ? x + token[i] * p.x.rs : nullptr, valid);
    }
    mbarrier_arrive_copies(shared.full(step));
  }

  __device__ void run(const Work &w) {
    int token[COPIES];
    if (P != OUTPUT) {
#pragma unroll
      for (int i = 0; i < COPIES; i++) {
        int row = thread / 8 + i * (GROUP / 8);
        token[i] = row < w.tile.rows ? p.routing.token[w.tile.row + row] : -1;
      }
    }
    for (int k = 0; k < w.depth; k += BOX_COLUMNS, step++) {
      mbarrier_wait(shared.empty(step), Shared::parity(step) ^ 1);
      if (thread == 0) load(w, k);
      if (P != OUTPUT) gather(token, k);
    }
  }
};

template <class E, Product P>
struct Consumer {
  static constexpr bool BF16 = E::dtype == DSO_BF16;

  const dso_cuda_moe_experts_params &p;
  Shared shared;
  int group, warp, lane, step = 0;
  float acc[COLUMNS / 2];  // 4 j + 2 h + e：第 8 h 行起、第 8 j + e 列起

  __device__ explicit Consumer(const dso_cuda_moe_experts_params &params)
      : p(params),
        group(static_cast<int>(threadIdx.x) / GROUP),
        warp(static_cast<int>(threadIdx.x) / WARP),
        lane(static_cast<int>(threadIdx.x) % WARP) {}

  __device__ void release(int step) {
    if (lane == 0) mbarrier_arrive(shared.empty(step));
  }

  __device__ void issue(bool accumulate) {
    mbarrier_wait(shared.full(step), Shared::parity(step));
    if (P != OUTPUT) fence_proxy_async();  // cp.async 写的 A
    uint64_t a = k_major(shared.a(step) + group * GROUP_ROWS * BOX_ROW);
    uint64_t b = k_major(shared.b(step));
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < BOX_COLUMNS / 16; c++)
      wgmma<BF16, 0, 0>(acc, advance(a, c * 32), advance(b, c * 32), accumulate || c > 0);
    wgmma_commit();
    step++;
  }

  // 步数少于级数时不错开：否则第 0 组可能领先两块，具名屏障分不清是哪一块的。
  __device__ void multiply(int steps) {
    bool apart = steps >= STAGES;
    if (apart && group == 1) named_barrier_sync(LEAD_BARRIER, CONSUMERS);
    issue(false);
    for (int i = 1; i < steps; i++) {
      issue(true);
      if (apart && group == 0 && i == LEAD - 1) named_barrier_arrive(LEAD_BARRIER, CONSUMERS);
      wgmma_wait<1>();
      release(step - 2);
    }
    wgmma_wait<0>();
    wgmma_settle(acc);
    release(step - 1);
  }

  // 这一组没有行：只让出各级。
  __device__ void skip(int steps) {
    if (steps >= STAGES) named_barrier_sync(LEAD_BARRIER, CONSUMERS);
    for (int i = 0; i < steps; i++, step++) {
      mbarrier_wait(shared.full(step), Shared::parity(step));
      release(step);
    }
  }

  // acc 的第 FROM 个起的 COUNT 列加上偏置，first 是其中第 0 列。
  template <int FROM, int COUNT>
  __device__ void add_bias(const Work &w, const void *bias, int64_t stride, int first) {
    if (!bias) return;
#pragma unroll
    for (int j = 0; j < COUNT / 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        int column = first + j * 8 + lane % 4 * 2 + e;
        float b = column < w.columns ? load_one(bias, E::dtype, column * stride) : 0.0f;
        acc[FROM + 4 * j + e] += b, acc[FROM + 4 * j + 2 + e] += b;
      }
  }

  __device__ void add_biases(const Work &w) {
    dso_expert e = expert_at(p.w, p.routing.experts, w.tile.expert);
    if (P == GATED) {
      add_bias<0, HALF>(w, e.gate_bias, e.bias_step, w.first);
      add_bias<HALF / 2, HALF>(w, e.up_bias, e.bias_step, w.first);
    } else if (P == PLAIN) {
      add_bias<0, COLUMNS>(w, e.gate_bias, e.bias_step, w.first);
    } else {
      add_bias<0, COLUMNS>(w, e.down_bias, 1, w.first);
    }
  }

  // 这个 warp 写出的第 line 行第 column 列在共享内存里的位置。
  __device__ unsigned char *staged(int line, int column) const {
    return shared.base + STAGED + warp * STAGED_WARP + column / BOX_COLUMNS * STAGED_BOX +
           swizzled(line, column % BOX_COLUMNS);
  }

  // 结果写到哪里：块的第 0 行、第 0 列，行距。
  struct Place {
    uint16_t *to;
    int64_t rs;
  };
  __device__ Place result(const Work &w) const {
    if (P == OUTPUT) return {static_cast<uint16_t *>(p.o) + w.tile.row * p.n, p.n};
    return {static_cast<uint16_t *>(p.h) + hidden_at(p, w.tile.row),
            w.shared ? p.w.shared.inner : p.h_rs};
  }
  // 留给反向的 gate（up）。
  __device__ Place saved(const Work &w, bool up) const {
    SavedRow row = saved_row(p, w.tile.row);
    return {static_cast<uint16_t *>(p.saved) + row.at + (up ? row.up : 0),
            (P == GATED ? 2 : 1) * static_cast<int64_t>(row.up)};
  }

  // 从第 first 列起写出 128 列，value(i) 是第 i 个；经共享内存换成整行。
  template <class Value>
  __device__ void write(const Work &w, const Place &place, int first, Value value) {
#pragma unroll
    for (int i = 0; i < HALF / 2; i += 8) {
      uint32_t pairs[4];
#pragma unroll
      for (int j = 0; j < 4; j++) pairs[j] = E::pack(value(i + 2 * j), value(i + 2 * j + 1));
      stmatrix_x4(staged(lane % 16, i * 2 + lane / 16 * 8), pairs);
    }
    __syncwarp();
    int row = warp * WARP_ROWS, left = w.tile.rows - row;
    uint16_t *to = place.to + row * place.rs + first;
#pragma unroll 4
    for (int i = lane; i < WARP_ROWS * HALF / 8; i += WARP) {
      int line = i / (HALF / 8), column = i % (HALF / 8) * 8;
      if (line < left && first + column < w.columns)
        *reinterpret_cast<uint4 *>(to + line * place.rs + column) =
            *reinterpret_cast<const uint4 *>(staged(line, column));
    }
    __syncwarp();
  }

  // 写出全部的列；有门时是 128 列，另一半是 up。
  template <class Value>
  __device__ void write_all(const Work &w, const Place &place, Value value) {
#pragma unroll
    for (int part = 0; part < (P == GATED ? 1 : 2); part++)
      write(w, place, w.first + part * HALF, [&](int i) { return value(part * HALF / 2 + i); });
  }

  // 截断的激活都有门。
  __device__ void save(const Work &w) {
    if (P == PLAIN) return write_all(w, saved(w, false), [&](int i) { return acc[i]; });
    write_all(w, saved(w, false),
              [&](int i) { return kept_value(p.act, false, E::dtype, acc[i]); });
    write_all(w, saved(w, true),
              [&](int i) { return kept_value(p.act, true, E::dtype, acc[HALF / 2 + i]); });
  }

  // 激活的种类是常数时，逐个元素就没有分支。
  template <dso_act_kind KIND>
  __device__ void write_hidden(const Work &w) {
    dso_act act{KIND, p.act.alpha, p.act.limit};
    write_all(w, result(w), [&](int i) {
      return activate<true>(act, P == GATED, acc[i], P == GATED ? acc[HALF / 2 + i] : 0.0f);
    });
  }

  __device__ void store(const Work &w) {
    add_biases(w);
    if (P == OUTPUT) return write_all(w, result(w), [&](int i) { return acc[i]; });
    if (p.saved) save(w);
    switch (p.act.kind) {
      case DSO_SILU:
        return write_hidden<DSO_SILU>(w);
      case DSO_GELU:
        return write_hidden<DSO_GELU>(w);
      case DSO_GELU_TANH:
        return write_hidden<DSO_GELU_TANH>(w);
      case DSO_RELU:
        return write_hidden<DSO_RELU>(w);
      case DSO_RELU2:
        return write_hidden<DSO_RELU2>(w);
      case DSO_CLIPPED:
        return write_hidden<DSO_CLIPPED>(w);
      case DSO_CLIPPED_SILU:
        return write_hidden<DSO_CLIPPED_SILU>(w);
    }
  }

  __device__ void run(const Work &w) {
    if (group * GROUP_ROWS >= w.tile.rows) return skip(w.steps());
    multiply(w.steps());
    store(w);
  }
};

template <class E, Product P>
__global__ __launch_bounds__(THREADS, 1) void moe_experts_sm90(const __grid_constant__ Maps maps,
                                                               dso_cuda_moe_experts_params p,
                                                               unsigned column_blocks) {
  if (threadIdx.x == 0) Shared().start(P != OUTPUT);
  __syncthreads();
  grid_wait();
  if (threadIdx.x >= CONSUMERS) {
    registers_decrease<MOE_PRODUCER_REGISTERS>();
    if (P == OUTPUT && threadIdx.x > CONSUMERS) return;  // 只有一个线程发 TMA
    Producer<P> producer(maps, p);
    each_work<P, true>(p, column_blocks, [&](const Work &w) { producer.run(w); });
  } else {
    registers_increase<MOE_CONSUMER_REGISTERS>();
    Consumer<E, P> consumer(p);
    each_work<P, false>(p, column_blocks, [&](const Work &w) { consumer.run(w); });
  }
}

// 权重 [专家, rows, k] 的描述，一次 box 行；step 是相邻专家的字节数。
cudaError_t map_weights(CUtensorMap *map, const dso_mat &w, int64_t rows, int64_t k,
                        int64_t experts, int64_t step, int box) {
  return make_tensor_map(
      map, {w.data, w.dtype, 3, {k, rows, experts}, {1, w.rs, step / 2}, {BOX_COLUMNS, box, 1}});
}

// 一个专家（或一叠）的操作数；h、rows、rs：它们的 h。
cudaError_t make_operands(Operands *to, const dso_cuda_moe_experts_params &p, Product product,
                          const dso_expert &e, int64_t experts, int64_t gate_step,
                          int64_t down_step, const void *h, int64_t rows, int64_t rs) {
  if (product == OUTPUT) {
    cudaError_t error =
        make_tensor_map(&to->a, {h, p.dtype, 2, {e.inner, rows}, {1, rs}, {BOX_COLUMNS, ROWS}});
    if (error != cudaSuccess) return error;
    return map_weights(&to->b, e.down, p.n, e.inner, experts, down_step, COLUMNS);
  }
  int box = product == GATED ? HALF : COLUMNS;
  cudaError_t error = map_weights(&to->b, e.gate, e.inner, p.k, experts, gate_step, box);
  if (error != cudaSuccess || product == PLAIN) return error;
  return map_weights(&to->up, e.up, e.inner, p.k, experts, gate_step, box);
}

cudaError_t make_maps(Maps *maps, const dso_cuda_moe_experts_params &p, Product product) {
  const dso_cuda_moe_routing &r = p.routing;
  int64_t slots = r.tokens * r.top_k;
  cudaError_t error = make_operands(&maps->routed, p, product, p.w.first, r.experts, p.w.gate_step,
                                    p.w.down_step, p.h, slots, p.h_rs);
  if (error != cudaSuccess || !r.shared) return error;
  const void *h = static_cast<const uint16_t *>(p.h) + slots * p.h_rs;
  return make_operands(&maps->shared, p, product, p.w.shared, 1, 0, 0, h, r.tokens,
                       p.w.shared.inner);
}

template <class E, Product P>
cudaError_t run(const dso_cuda_moe_experts_params &p, int sms, cudaStream_t stream) {
  Maps maps = {};
  cudaError_t error = make_maps(&maps, p, P);
  if (error != cudaSuccess) return error;
  int64_t blocks = ceil_div(P == OUTPUT ? p.n : hidden_columns(p), P == GATED ? HALF : COLUMNS);
  int64_t total = p.routing.most_tiles * blocks;  // 各块的结果放得进显存，所以不到 2^31
  if (total == 0) return cudaSuccess;
  dim3 grid(static_cast<unsigned>(total < sms ? total : sms));
  return launch(moe_experts_sm90<E, P>, grid, dim3(THREADS), BYTES, stream, maps, p,
                static_cast<unsigned>(blocks));
}

template <class E>
cudaError_t choose(const dso_cuda_moe_experts_params &p, bool hidden, int sms,
                   cudaStream_t stream) {
  if (!hidden) return run<E, OUTPUT>(p, sms, stream);
  return p.w.gated ? run<E, GATED>(p, sms, stream) : run<E, PLAIN>(p, sms, stream);
}

// 没有量化，行、专家的间隔 TMA 都能走（不是 expand 出来的 0）。
bool weights_fit(const dso_cuda_moe_experts_params &p, const dso_expert &e) {
  bool rows = e.gate.rs > 0 && e.down.rs > 0 && (!p.w.gated || e.up.rs > 0);
  bool bias = e.gate_bias || e.up_bias || e.down_bias;
  return e.inner > 0 && rows && e.gate.dtype == p.dtype && e.down.dtype == p.dtype &&
         (!bias || e.bias_dtype == p.dtype);
}

}  // namespace

bool dso::moe_sm90_fits(const dso_cuda_moe_experts_params &p, const Device &device) {
  const dso_cuda_moe_weights &w = p.w;
  bool stacked = p.routing.experts == 1 || (w.gate_step > 0 && w.down_step > 0);
  return device.major == 9 && device.shared_limit >= BYTES && p.dtype != DSO_F32 && p.k > 0 &&
         p.routing.experts > 0 && !w.list && !w.transposed && stacked && weights_fit(p, w.first) &&
         (!p.routing.shared || weights_fit(p, w.shared));
}

cudaError_t dso::moe_sm90(const dso_cuda_moe_experts_params &p, bool hidden, cudaStream_t stream) {
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  return p.dtype == DSO_BF16 ? choose<Bf16>(p, hidden, device.sms, stream)
                             : choose<F16>(p, hidden, device.sms, stream);
}
