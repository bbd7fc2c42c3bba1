// 按专家排行：稳定的计数排序，结果同 csrc/moe_common.c 的 dso_moe_sort，另给出 slot 到行的反查与分块。
//
// 每个 CTA 一段连续的 slot，每个 warp 其中连续的一份（slot 少时平分），各 warp 自己一份直方图，因此次序只由下标决定：
//   count    各段的直方图；
//   scan     一个 CTA：各专家在各段的起点、begin、tiles；
//   scatter  各段再数一遍，写出行。
// 只有一段时（解码）三步在一个核里做完。全程不必知道行数，也没有原子操作。
#include <assert.h>

#include "config.cuh"
#include "moe_common.cuh"

namespace {

using namespace dso;

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int BATCH = 4;  // 一个线程一次读几个 slot

// 共享内存：scan [WARPS]、hist [WARPS][experts]。
struct Sorter {
  const dso_cuda_moe_routing &r;
  int experts, slots, thread, warp, lane;
  int chunk;  // 一个 warp 的 slot：只有一段时各 warp 平分
  unsigned long long *scan;
  int *hist;

  __device__ explicit Sorter(const dso_cuda_moe_routing &routing)
      : r(routing),
        experts(static_cast<int>(routing.experts)),
        slots(static_cast<int>(routing.tokens * routing.top_k)),
        thread(static_cast<int>(threadIdx.x)),
        warp(thread / WARP),
        lane(thread % WARP),
        chunk(min_of(slots, MOE_SORT_SLOTS)) {
    chunk = (chunk + THREADS - 1) / THREADS * WARP;
    scan = reinterpret_cast<unsigned long long *>(dynamic_shared());
    hist = reinterpret_cast<int *>(scan + WARPS);
  }

  // 依次看本 warp 的 slot：visit(slot, 专家, 之前本 warp 里同一专家的个数)。
  template <class Visit>
  __device__ void each_slot(int block, Visit visit) {
    int first = block * MOE_SORT_SLOTS + warp * chunk;
    int last = first + min_of(chunk, slots - first);
    int *mine = hist + warp * experts;
    for (int base = first; base < last; base += BATCH * WARP) {
      int64_t index[BATCH];
      int expert[BATCH];  // 哨兵与末尾之外的是 experts
      unsigned same[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; i++)
        index[i] = base + i * WARP + lane < last ? r.index[base + i * WARP + lane] : experts;
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        assert(index[i] >= 0);
        expert[i] = index[i] < experts ? static_cast<int>(index[i]) : experts;
        if (base + i * WARP < last) same[i] = __match_any_sync(ALL_LANES, expert[i]);
      }
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        if (base + i * WARP >= last) break;
        int e = expert[i], slot = base + i * WARP + lane, at = 0;
        int before = __popc(same[i] & ((1u << lane) - 1));
        if (e < experts) at = mine[e] + before;
        __syncwarp();
        if (e < experts && before == 0) mine[e] += __popc(same[i]);
        __syncwarp();
        visit(slot, e, at);
      }
    }
  }

  // 本 warp 的直方图；不碰全局内存，可以在 grid_wait 之前。
  __device__ void clear() {
#pragma unroll 4
    for (int e = lane; e < experts; e += WARP) hist[warp * experts + e] = 0;
    __syncwarp();
  }

  __device__ void count(int block) {
    each_slot(block, [](int, int, int) {});
    __syncthreads();
  }

  // 专家 e 在各 warp 的个数换成起点，第一个从 at 起。
  __device__ void offsets(int e, int at) {
    int n[WARPS];
#pragma unroll
    for (int w = 0; w < WARPS; w++) n[w] = hist[w * experts + e];
#pragma unroll
    for (int w = 0; w < WARPS; w++) hist[w * experts + e] = at, at += n[w];
  }

  __device__ void scatter(int block) {
    auto top_k = static_cast<unsigned>(r.top_k);
    each_slot(block, [&](int slot, int e, int at) {
      if (slot >= slots) return;
      r.row[slot] = e < experts ? at : -1;
      if (e == experts) return;
      r.slot[at] = slot;
      r.token[at] = static_cast<int>(static_cast<unsigned>(slot) / top_k);
    });
  }

  // count(e) 是专家 e 的行数：写出 begin 与 tiles，place(e, 起点)。一个线程一个专家，行数（低 32 位）与块数（高 32 位）
  // 一起求前缀和，各自写出自己的块：块平均只有一两个。
  template <class Count, class Place>
  __device__ void layout(Count count, Place place) {
    int tile = static_cast<int>(r.tile_rows);
    unsigned long long passed = 0;
    for (int base = 0; base < experts; base += THREADS) {
      int e = base + thread, n = e < experts ? count(e) : 0, tiles = (n + tile - 1) / tile;
      unsigned long long own =
          static_cast<unsigned long long>(tiles) << 32 | static_cast<unsigned>(n);
      unsigned long long sum = own;
#pragma unroll
      for (int step = 1; step < WARP; step *= 2) {
        unsigned long long other = __shfl_up_sync(ALL_LANES, sum, static_cast<unsigned>(step));
        if (lane >= step) sum += other;
      }
      if (base > 0) __syncthreads();  // 上一次的 scan 都读过了
      if (lane == WARP - 1) scan[warp] = sum;
      __syncthreads();
      unsigned long long before = passed + sum - own;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        if (w < warp) before += scan[w];
        passed += scan[w];
      }
      if (e >= experts) continue;
      int row = static_cast<int>(before);
      int at = static_cast<int>(before >> 32);
      r.begin[e] = row;
      place(e, row);
#pragma unroll 1
      for (int i = 0; i < tiles; i++)
        put(at + i, {e, row + i * tile, min_of(tile, n - i * tile), 0});
    }
    int routed = static_cast<int>(passed >> 32), tokens = static_cast<int>(r.tokens);
    if (thread == 0) r.begin[experts] = static_cast<int>(passed), r.begin[experts + 1] = routed;
    int shared = r.shared ? (tokens + tile - 1) / tile : 0;
#pragma unroll 1
    for (int i = routed + thread; i < r.most_tiles; i += THREADS) {
      dso_cuda_moe_tile t = {experts, 0, 0, 0};
      int at = (i - routed) * tile;
      if (i < routed + shared) t.row = slots + at, t.rows = min_of(tile, tokens - at);
      put(i, t);
    }
  }

  // 一次写 16 字节。
  __device__ void put(int i, dso_cuda_moe_tile t) const {
    static_assert(sizeof(uint4) == sizeof t, "");
    reinterpret_cast<uint4 *>(r.tiles)[i] =
        make_uint4(static_cast<unsigned>(t.expert), static_cast<unsigned>(t.row),
                   static_cast<unsigned>(t.rows), 0);
  }

  __device__ void shared_rows(int64_t first, int64_t step) {
#pragma unroll 1
    for (int64_t t = first; r.shared && t < r.tokens; t += step)
      r.token[slots + t] = static_cast<int32_t>(t);
  }

  // 本段专家 e 的个数。
  __device__ int block_count(int e) const {
    int n = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) n += hist[w * experts + e];
    return n;
  }
};

__global__ __launch_bounds__(THREADS) void moe_sort_single(dso_cuda_moe_routing r) {
  Sorter s(r);
  s.clear();
  grid_release();
  grid_wait();
  s.count(0);
  s.layout([&](int e) { return s.block_count(e); }, [&](int e, int row) { s.offsets(e, row); });
  __syncthreads();
  s.scatter(0);
  s.shared_rows(s.thread, THREADS);
}

// counts [段][experts]
__global__ __launch_bounds__(THREADS) void moe_sort_count(dso_cuda_moe_routing r) {
  Sorter s(r);
  s.clear();
  grid_release();
  grid_wait();
  s.count(static_cast<int>(blockIdx.x));
  for (int e = s.thread; e < s.experts; e += THREADS)
    r.counts[static_cast<int64_t>(blockIdx.x) * s.experts + e] = s.block_count(e);
  s.shared_rows(static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x,
                static_cast<int64_t>(gridDim.x) * THREADS);
}

// counts 换成各段在专家内的起点。
__global__ __launch_bounds__(THREADS) void moe_sort_scan(dso_cuda_moe_routing r, int blocks) {
  grid_release();
  grid_wait();
  Sorter s(r);
  constexpr int AHEAD = 8;  // 一次读几段
  auto count = [&](int e) {
    int total = 0;
    for (int b = 0; b < blocks; b += AHEAD) {
      int32_t *at = r.counts + static_cast<int64_t>(b) * s.experts + e;
      int n[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; i++) n[i] = b + i < blocks ? at[i * s.experts] : 0;
#pragma unroll
      for (int i = 0; i < AHEAD; i++) {
        if (b + i < blocks) at[i * s.experts] = total;
        total += n[i];
      }
    }
    return total;
  };
  s.layout(count, [](int, int) {});
}

__global__ __launch_bounds__(THREADS) void moe_sort_scatter(dso_cuda_moe_routing r) {
  Sorter s(r);
  s.clear();
  grid_release();
  grid_wait();
  s.count(static_cast<int>(blockIdx.x));
  for (int e = s.thread; e < s.experts; e += THREADS)
    s.offsets(e, r.begin[e] + r.counts[static_cast<int64_t>(blockIdx.x) * s.experts + e]);
  __syncthreads();
  s.scatter(static_cast<int>(blockIdx.x));
}

int64_t blocks_of(const dso_cuda_moe_routing &r) {
  int64_t blocks = ceil_div(r.tokens * r.top_k, MOE_SORT_SLOTS);
  return blocks < 1 ? 1 : blocks;
}

size_t shared_bytes(int64_t experts) {
  return static_cast<size_t>(WARPS * 8 + WARPS * experts * 4);
}

}  // namespace

size_t dso_cuda_moe_sort_place(dso_cuda_moe_routing *r, void *memory) {
  int64_t slots = r->tokens * r->top_k, tile = r->tile_rows;
  // 每个有行的专家至多一个不满的块。
  int64_t partial = slots < r->experts ? slots : r->experts;
  r->most_tiles = slots / tile + partial;
  if (r->most_tiles > slots) r->most_tiles = slots;
  if (r->shared) r->most_tiles += ceil_div(r->tokens, tile);
  size_t used = 0;
  auto take = [&](int64_t count) {
    int32_t *at = memory ? static_cast<int32_t *>(memory) + used / 4 : nullptr;
    used += static_cast<size_t>(ceil_div(count * 4, 16) * 16);
    return at;
  };
  r->tiles = reinterpret_cast<dso_cuda_moe_tile *>(take(r->most_tiles * 4));
  r->begin = take(r->experts + 2);
  r->token = take(slots + (r->shared ? r->tokens : 0));
  r->slot = take(slots), r->row = take(slots);
  r->counts = take(blocks_of(*r) * r->experts);
  return used;
}

int64_t dso_cuda_moe_most_experts(void) {
  Device device;
  if (device_of(&device) != cudaSuccess) return 0;
  return (device.shared_limit - WARPS * 8) / (WARPS * 4);
}

cudaError_t dso_cuda_moe_sort(const dso_cuda_moe_routing *r, cudaStream_t stream) {
  int64_t blocks = blocks_of(*r);
  size_t bytes = shared_bytes(r->experts);
  dim3 grid(static_cast<unsigned>(blocks)), threads(THREADS);
  if (blocks == 1) return launch(moe_sort_single, grid, threads, bytes, stream, *r);
  cudaError_t error = launch(moe_sort_count, grid, threads, bytes, stream, *r);
  if (error == cudaSuccess)
    error = launch(moe_sort_scan, dim3(1), threads, bytes, stream, *r, static_cast<int>(blocks));
  if (error == cudaSuccess) error = launch(moe_sort_scatter, grid, threads, bytes, stream, *r);
  return error;
}
