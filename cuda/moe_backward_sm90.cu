// moe_experts_backward 的 Hopper 路径：分组的矩阵乘，cp.async 搬运，wgmma 累加；操作数与写出见
// moe_backward_product.cuh。
//
// 一块 128 行 x 256 列，两个消费者组各 64 行，一级 64 个 k。wgmma 的两边都可以按 [行][k] 或 [k][行] 读，所以权重、x、dY、
// 中间量都原地读，不转置、不复制；行由 token 收集，长短不一，所以两边都由生产者的 4 个 warp 用 cp.async 按 128 字节的
// 交错写进共享内存（TMA 要规则的张量），越界的填 0，写完时到达 mbarrier。
//
// CTA 常驻，一个 SM 一个，依次做几块：一块收尾时下一块的操作数已经在路上。两组错开：第 1 组等第 0 组先走 LEAD 步，
// 所以一组写出时另一组还占着矩阵单元。
#include <ptx_sm90.cuh>

#include "config.cuh"
#include "mma.cuh"
#include "moe_backward_product.cuh"
#include "tile_sm90.cuh"

namespace {

using namespace dso;

constexpr int ROWS = MOE_ROWS, COLUMNS = MOE_BACKWARD_COLUMNS_SM90,
              STAGES = MOE_BACKWARD_STAGES_SM90, DEPTH = BOX_COLUMNS;
constexpr int GROUP = 4 * WARP, GROUPS = 2, CONSUMERS = GROUPS * GROUP;
constexpr int THREADS = CONSUMERS + GROUP;
constexpr int GROUP_ROWS = ROWS / GROUPS, WARP_ROWS = 16;
constexpr int LEAD = 2, LEAD_BARRIER = 1;
static_assert(GROUP_ROWS == 64 && DEPTH == 64, "wgmma 的 M 是 64，[k][列] 的块是 64 x 64");
static_assert(LEAD < STAGES, "第 0 组领先的步数受级数所限");

// 共享内存：各级的 A、B；各 warp 写出用的 fp32 [16, 64]；mbarrier。
constexpr int BOX = DEPTH * BOX_ROW;  // [k][列] 的一块
constexpr int A_BYTES = ROWS * BOX_ROW, B_BYTES = COLUMNS * BOX_ROW, STAGE = A_BYTES + B_BYTES;
constexpr int PART = 64, STAGED_WARP = WARP_ROWS * PART * 4;
constexpr int STAGED = STAGES * STAGE, BARRIERS = STAGED + CONSUMERS / WARP * STAGED_WARP;
constexpr int BYTES = BARRIERS + 2 * STAGES * 8;
static_assert(BYTES <= SHARED_SM90, "共享内存放不下");

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

  __device__ void start() const {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(full(i), GROUP);
      mbarrier_init(empty(i), CONSUMERS / WARP);
    }
    mbarrier_init_fence();
  }
};

// ---- 这个 CTA 的各份工作：run(块, 第几块列) ----

// 相邻的 MOE_GROUP 块行与全部的列块一起做：同时在做的 CTA 共用 L2 里的权重与行。
template <class Run>
__device__ __forceinline__ void each_tile(const dso_cuda_moe_routing &r, unsigned column_blocks,
                                          Run run) {
  auto tiles = static_cast<unsigned>(r.most_tiles);
  unsigned total = tiles * column_blocks, each = MOE_GROUP * column_blocks;
  for (unsigned n = blockIdx.x; n < total; n += gridDim.x) {
    unsigned first = n / each * MOE_GROUP, left = tiles - first, inside = n % each;
    unsigned many = left < MOE_GROUP ? left : MOE_GROUP;
    dso_cuda_moe_tile tile = r.tiles[first + inside % many];
    if (tile.rows > 0) run(tile, static_cast<int>(inside / many));
  }
}

// 一个专家的各块相邻：run(专家, 第一行, 第一列)。
template <class Run>
__device__ __forceinline__ void each_weight(unsigned experts, unsigned row_blocks,
                                            unsigned column_blocks, Run run) {
  unsigned each = row_blocks * column_blocks;
  for (unsigned n = blockIdx.x; n < experts * each; n += gridDim.x) {
    unsigned at = n % each;
    run(static_cast<int>(n / each), static_cast<int>(at % row_blocks * ROWS),
        static_cast<int>(at / row_blocks * COLUMNS));
  }
}

__device__ inline int steps_of(int depth) { return (depth + DEPTH - 1) / DEPTH; }

// ---- 生产者 ----

struct Producer {
  static constexpr int LINES = GROUP / 8;  // 8 个线程一行（64 个元素），隔 LINES 行一段

  Shared shared;
  int line, column, step = 0;

  __device__ Producer()
      : line((static_cast<int>(threadIdx.x) - CONSUMERS) / 8),
        column(static_cast<int>(threadIdx.x) % 8 * 8) {}

  __device__ __forceinline__ static void copy(unsigned char *to, const uint16_t *from, bool valid) {
    cp_async_16(to, valid ? from : nullptr, valid);
  }

  template <bool WIDE>
  __device__ __forceinline__ void rows(const RowOperands<WIDE> &w, int first) {
    constexpr int A_COPIES = ROWS / LINES, B_COPIES = COLUMNS / LINES, K_COPIES = DEPTH / LINES,
                  BOXES = COLUMNS / BOX_COLUMNS;
    int per = steps_of(w.depth), a[A_COPIES];
#pragma unroll
    for (int i = 0; i < A_COPIES; i++) a[i] = w.left_index(line + i * LINES);
#pragma unroll 1
    for (int s = 0; s < per * w.segments; s++, step++) {
      bool second = s >= per;
      int k0 = (second ? s - per : s) * DEPTH;
      mbarrier_wait(shared.empty(step), Shared::parity(step) ^ 1);
      unsigned char *to = shared.a(step) + swizzled(line, column);
      const uint16_t *left = w.left_base + (k0 + column + (second ? w.left_next : 0));
      bool inside = k0 + column < w.depth;
#pragma unroll
      for (int i = 0; i < A_COPIES; i++)
        copy(to + i * LINES * BOX_ROW, left + a[i] * w.left_rs, inside && a[i] >= 0);
      to += A_BYTES;
      int64_t skip = second ? w.high - w.low : 0;
      if (WIDE) {
        int64_t rs = w.right_stride(second);
        int c = first + column;
        const uint16_t *from = w.low + (skip + (k0 + line) * rs + c);
#pragma unroll
        for (int i = 0; i < K_COPIES; i++, from += LINES * rs) {
          bool valid = k0 + line + i * LINES < w.depth;
#pragma unroll
          for (int j = 0; j < BOXES; j++)
            copy(to + j * BOX + i * LINES * BOX_ROW, from + j * BOX_COLUMNS,
                 valid && c + j * BOX_COLUMNS < w.columns);
        }
      } else {
        skip += k0 + column;
#pragma unroll 4
        for (int i = 0; i < B_COPIES; i++) {
          const uint16_t *from = w.right(first + line + i * LINES);
          copy(to + i * LINES * BOX_ROW, from + skip, inside && from);
        }
      }
      mbarrier_arrive_copies(shared.full(step));
    }
  }

  template <class E>
  __device__ __forceinline__ void weights(const WeightProduct<E> &w, int m0, int n0) {
    constexpr int COPIES = DEPTH / LINES, A_BOXES = ROWS / BOX_COLUMNS,
                  B_BOXES = COLUMNS / BOX_COLUMNS;
    const uint16_t *a[A_BOXES], *b[B_BOXES];
#pragma unroll
    for (int i = 0; i < A_BOXES; i++) a[i] = w.left.column(m0 + i * BOX_COLUMNS + column);
#pragma unroll
    for (int i = 0; i < B_BOXES; i++) b[i] = w.right.column(n0 + i * BOX_COLUMNS + column);
    int token[COPIES];
    const int32_t *tokens = w.in.routing.token + w.rows.begin;
    auto find = [&](int s) {
#pragma unroll
      for (int i = 0; i < COPIES; i++) {
        int row = s * DEPTH + line + i * LINES;
        token[i] = row < w.rows.rows ? tokens[row] : 0;
      }
    };
    find(0);
#pragma unroll 1
    for (int s = 0; s < steps_of(w.rows.rows); s++, step++) {
      mbarrier_wait(shared.empty(step), Shared::parity(step) ^ 1);
      unsigned char *to = shared.a(step) + swizzled(line, column);
#pragma unroll
      for (int i = 0; i < COPIES; i++, to += LINES * BOX_ROW) {
        int row = s * DEPTH + line + i * LINES;
        bool inside = row < w.rows.rows;
        int64_t left = (w.left.gathered ? token[i] : row) * w.left.rs,
                right = (w.right.gathered ? token[i] : row) * w.right.rs;
#pragma unroll
        for (int j = 0; j < A_BOXES; j++) copy(to + j * BOX, a[j] + left, inside && a[j]);
#pragma unroll
        for (int j = 0; j < B_BOXES; j++)
          copy(to + A_BYTES + j * BOX, b[j] + right, inside && b[j]);
      }
      mbarrier_arrive_copies(shared.full(step));
      find(s + 1);
    }
  }
};

// ---- 消费者 ----

// A_MN、B_MN：操作数按 [k][行]、[k][列] 存。
template <class E, bool A_MN, bool B_MN>
struct Consumer {
  static constexpr bool BF16 = E::dtype == DSO_BF16;

  Shared shared;
  int group, warp, lane, step = 0;
  float acc[COLUMNS / 2];  // 4 j + 2 h + e：第 8 h 行起、第 8 j + e 列起

  __device__ Consumer()
      : group(static_cast<int>(threadIdx.x) / GROUP),
        warp(static_cast<int>(threadIdx.x) / WARP),
        lane(static_cast<int>(threadIdx.x) % WARP) {}

  __device__ void release(int step) {
    if (lane == 0) mbarrier_arrive(shared.empty(step));
  }

  __device__ __forceinline__ void issue(bool accumulate) {
    mbarrier_wait(shared.full(step), Shared::parity(step));
    fence_proxy_async();  // cp.async 写的
    // 各组的 64 行：[k][行] 时正好一块。
    const unsigned char *left = shared.a(step) + group * (A_MN ? BOX : GROUP_ROWS * BOX_ROW);
    uint64_t a = A_MN ? mn_major(left, BOX) : k_major(left);
    uint64_t b = B_MN ? mn_major(shared.b(step), BOX) : k_major(shared.b(step));
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < DEPTH / 16; c++)
      wgmma<BF16, A_MN, B_MN>(acc, advance(a, c * (A_MN ? 16 * BOX_ROW : 32)),
                              advance(b, c * (B_MN ? 16 * BOX_ROW : 32)), accumulate || c > 0);
    wgmma_commit();
    step++;
  }

  // steps 大于 0。步数少于级数时不错开：否则第 0 组可能领先两块，具名屏障分不清是哪一块的。
  __device__ __forceinline__ void multiply(int steps) {
    bool apart = steps >= STAGES;
    if (apart && group == 1) named_barrier_sync(LEAD_BARRIER, CONSUMERS);
    issue(false);
#pragma unroll 1
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

  // 写出用的一块里第 line 行第 column 列：4 个一段，与行号的低 3 位异或，没有库冲突。
  __device__ float *staged(int line, int column) const {
    auto *tile = reinterpret_cast<float *>(shared.base + STAGED + warp * STAGED_WARP);
    return tile + line * PART + ((column / 4) ^ (line % 8)) * 4 + column % 4;
  }

  template <int PART_AT>
  __device__ __forceinline__ void stage() {
#pragma unroll
    for (int j = 0; j < PART / 8; j++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float *from = acc + PART_AT * PART / 2 + 4 * j + 2 * h;
        float *to = staged(lane / 4 + 8 * h, j * 8 + lane % 4 * 2);
        *reinterpret_cast<float2 *>(to) = make_float2(from[0], from[1]);
      }
  }

  // 经共享内存换成每线程一行的 8 列：finish(块内的行, 列, 8 个结果, 这里要用的)，每行 8 个线程，依次 4 段列。要用的由 fetch
  // 从显存读，两行一起发出，头两行在写进共享内存之前：逐行读、逐行等，写出要占到矩阵乘的一半。再多寄存器放不下。
  // finish 很长，只展开一份。
  template <class Fetch, class Finish>
  __device__ __forceinline__ void write(bool empty, Fetch fetch, Finish finish) {
    constexpr int STEP = WARP / 8, LINES = WARP_ROWS / STEP;
    int column = lane % 8 * 8, first = lane / 8, row = warp * WARP_ROWS + first;
#pragma unroll 1
    for (int part = 0; part < COLUMNS / PART; part++) {
      int at = part * PART + column;
      auto kept = fetch(row, at);
      if (part == 0) stage<0>();
      if (part == 1) stage<1>();
      if (part == 2) stage<2>();
      if (part == 3) stage<3>();
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < LINES; i++) {
        int line = i * STEP;
        Vec<8> v = {};
        if (!empty) {
          float4 low = *reinterpret_cast<const float4 *>(staged(first + line, column)),
                 high = *reinterpret_cast<const float4 *>(staged(first + line, column + 4));
          v = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
        }
        auto used = kept;
        if (i + 1 < LINES) kept = fetch(row + line + STEP, at);
        finish(row + line, at, v, used);
      }
      __syncwarp();
    }
  }
};

// ---- 核 ----

template <class E, bool WIDE>
__global__ __launch_bounds__(THREADS, 1) void moe_rows_sm90(BackwardParams p, BackwardStep step,
                                                            unsigned column_blocks) {
  if (threadIdx.x == 0) Shared().start();
  __syncthreads();
  grid_wait();
  if (threadIdx.x >= CONSUMERS) {
    registers_decrease<MOE_BACKWARD_PRODUCER_REGISTERS>();
    Producer producer;
    each_tile(p.in.routing, column_blocks, [&](const dso_cuda_moe_tile &tile, int block) {
      RowOperands<WIDE> w(p, tile, step);
      if (block * COLUMNS < w.columns) producer.rows(w, block * COLUMNS);
    });
  } else {
    registers_increase<MOE_BACKWARD_CONSUMER_REGISTERS>();
    Consumer<E, false, WIDE> consumer;
    int64_t parts = ceil_of(hidden_columns(p.in), PART);
    each_tile(p.in.routing, column_blocks, [&](const dso_cuda_moe_tile &tile, int block) {
      RowShape shape(p, step, tile.expert);
      int first = block * COLUMNS, steps = steps_of(shape.depth) * shape.segments;
      if (first >= shape.columns) return;
      if (consumer.group * GROUP_ROWS >= tile.rows) return consumer.skip(steps);
      if (steps > 0) consumer.multiply(steps);
      RowResults<E> w(p, tile, step);
      using Kept = typename RowResults<E>::Kept;
      // 一个 warp 的 16 行各由一个线程读一次，用到时再传：每行都读，两次访存的延迟也每行一次。
      float weight = w.weight_of(consumer.warp * WARP_ROWS + consumer.lane % WARP_ROWS);
      consumer.write(
          steps == 0, [&](int row, int column) { return w.fetch(row, first + column); },
          [&](int row, int column, const Vec<8> &v, const Kept &kept) {
            float own = __shfl_sync(ALL_LANES, weight, row % WARP_ROWS);
            float dot = w.finish(row, first + column, v, kept, own);
            if (step != HIDDEN_GRAD) return;
#pragma unroll
            for (int other = 4; other > 0; other /= 2)
              dot += __shfl_xor_sync(ALL_LANES, dot, other);
            if (column % PART == 0 && row < tile.rows && first + column < w.columns)
              p.partial[(tile.row + row) * parts + (first + column) / PART] = dot;
          });
    });
  }
}

template <class E>
__global__ __launch_bounds__(THREADS, 1) void moe_weights_sm90(BackwardParams p, WeightStep step,
                                                               unsigned experts,
                                                               unsigned row_blocks,
                                                               unsigned column_blocks) {
  if (threadIdx.x == 0) Shared().start();
  __syncthreads();
  grid_wait();
  if (threadIdx.x >= CONSUMERS) {
    registers_decrease<MOE_BACKWARD_PRODUCER_REGISTERS>();
    Producer producer;
    each_weight(experts, row_blocks, column_blocks, [&](int e, int m, int n) {
      WeightProduct<E> w(p, step, e);
      if (w.wanted(m, n)) producer.weights(w, m, n);
    });
  } else {
    registers_increase<MOE_BACKWARD_CONSUMER_REGISTERS>();
    Consumer<E, true, true> consumer;
    each_weight(experts, row_blocks, column_blocks, [&](int e, int m, int n) {
      WeightProduct<E> w(p, step, e);
      if (!w.wanted(m, n)) return;
      int steps = steps_of(w.rows.rows);
      if (steps > 0) consumer.multiply(steps);
      consumer.write(
          steps == 0, [](int, int) { return 0; },
          [&](int row, int column, const Vec<8> &v, int) { w.finish(m + row, n + column, v); });
    });
  }
}

// ---- 主机侧 ----

cudaError_t grid_of(int64_t total, dim3 *grid) {
  Device device;
  cudaError_t error = device_of(&device);
  *grid = dim3(static_cast<unsigned>(total < device.sms ? total : device.sms));
  return error;
}

template <class E, bool WIDE>
cudaError_t run(const BackwardParams &p, BackwardStep step, cudaStream_t stream) {
  int64_t blocks = ceil_div(row_step_columns(p.in, step), COLUMNS);
  int64_t total = p.in.routing.most_tiles * blocks;  // 各块的结果放得进显存，所以不到 2^31
  if (total == 0) return cudaSuccess;
  dim3 grid;
  cudaError_t error = grid_of(total, &grid);
  if (error != cudaSuccess) return error;
  return launch(moe_rows_sm90<E, WIDE>, grid, dim3(THREADS), BYTES, stream, p, step,
                static_cast<unsigned>(blocks));
}

}  // namespace

namespace dso {

bool moe_backward_sm90_fits(const dso_cuda_moe_experts_params &p) {
  Device device;
  return p.dtype != DSO_F32 && device_of(&device) == cudaSuccess && device.major == 9 &&
         device.shared_limit >= BYTES;
}

cudaError_t moe_backward_rows_sm90(const BackwardParams &p, BackwardStep step,
                                   cudaStream_t stream) {
  bool wide = is_wide(p.in, step);
  if (p.in.dtype == DSO_BF16)
    return wide ? run<Bf16, true>(p, step, stream) : run<Bf16, false>(p, step, stream);
  return wide ? run<F16, true>(p, step, stream) : run<F16, false>(p, step, stream);
}

cudaError_t moe_backward_weights_sm90(const BackwardParams &p, WeightStep step,
                                      cudaStream_t stream) {
  WeightShape shape = weight_shape(p.in, step);
  int64_t rows = ceil_div(shape.rows, ROWS), columns = ceil_div(shape.columns, COLUMNS);
  int64_t experts = experts_of(p.in.routing), total = experts * rows * columns;
  if (total == 0) return cudaSuccess;
  dim3 grid;
  cudaError_t error = grid_of(total, &grid);
  if (error != cudaSuccess) return error;
  auto kernel = p.in.dtype == DSO_BF16 ? moe_weights_sm90<Bf16> : moe_weights_sm90<F16>;
  return launch(kernel, grid, dim3(THREADS), BYTES, stream, p, step, static_cast<unsigned>(experts),
                static_cast<unsigned>(rows), static_cast<unsigned>(columns));
}

}  // namespace dso
