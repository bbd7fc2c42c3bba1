// 按专家排行：稳定的计数排序，结果同 csrc/moe_common.c 的 dso_moe_sort，另给出 slot 到行的反查与分块。
//
// 每个 CTA 一段连续的 slot，每个 warp 其中连续的一份，各 warp 自己一份直方图，因此次序只由下标决定：
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
constexpr int CHUNK = MOE_SORT_SLOTS / WARPS;  // 一个 warp 的 slot

// 共享内存：hist [WARPS][experts]、begin [experts + 1]、tile_at [experts + 1]。
struct Sorter {
  const dso_cuda_moe_routing &r;
  int experts, warp, lane;
  int64_t slots;
  int *hist, *begin, *tile_at;

  __device__ explicit Sorter(const dso_cuda_moe_routing &routing)
      : r(routing),
        experts(static_cast<int>(routing.experts)),
        warp(static_cast<int>(threadIdx.x) / WARP),
        lane(static_cast<int>(threadIdx.x) % WARP),
        slots(routing.tokens * routing.top_k) {
    hist = reinterpret_cast<int *>(dynamic_shared());
    begin = hist + WARPS * experts, tile_at = begin + experts + 1;
  }

  // 第 slot 个的专家；哨兵与段外的是 experts。
  __device__ int expert_of(int64_t slot) const {
    if (slot >= slots) return experts;
    int64_t e = r.index[slot];
    assert(e >= 0);
    return e < experts ? static_cast<int>(e) : experts;
  }

  // 依次看本 warp 的 slot：visit(slot, 专家, 之前本 warp 里同一专家的个数)。
  template <class Visit>
  __device__ void each_slot(int block, Visit visit) {
    int64_t first = static_cast<int64_t>(block) * MOE_SORT_SLOTS + warp * CHUNK;
    int *mine = hist + warp * experts;
    for (int i = 0; i < CHUNK && first + i < slots; i += WARP) {
      int64_t slot = first + i + lane;
      int e = expert_of(slot);
      unsigned same = __match_any_sync(ALL_LANES, e);
      int before = __popc(same & ((1u << lane) - 1)), at = 0;
      if (e < experts) at = mine[e] + before;
      __syncwarp();
      if (e < experts && before == 0) mine[e] += __popc(same);
      __syncwarp();
      visit(slot, e, at);
    }
  }

  __device__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < WARPS * experts; i += THREADS) hist[i] = 0;
    __syncthreads();
  }

  __device__ void count(int block) {
    clear();
    each_slot(block, [](int64_t, int, int) {});
    __syncthreads();
  }

  // 各 warp 的个数换成起点，第一个从 start(e) 起；返回前各线程同步。
  template <class Start>
  __device__ void offsets(Start start) {
    for (int e = static_cast<int>(threadIdx.x); e < experts; e += THREADS) {
      int at = start(e);
      for (int w = 0; w < WARPS; w++) {
        int n = hist[w * experts + e];
        hist[w * experts + e] = at, at += n;
      }
    }
    __syncthreads();
  }

  __device__ void scatter(int block) {
    each_slot(block, [&](int64_t slot, int e, int at) {
      if (slot >= slots) return;
      r.row[slot] = e < experts ? at : -1;
      if (e == experts) return;
      r.slot[at] = static_cast<int32_t>(slot);
      r.token[at] = static_cast<int32_t>(slot / r.top_k);
    });
  }

  // begin、tile_at 里是各专家的行数、块数 [experts]（第 experts 个任意）；换成前缀和。一个 warp 执行。
  __device__ void prefix(int *values) const {
    int total = 0;
    for (int base = 0; base <= experts; base += WARP) {
      int e = base + lane, n = e < experts ? values[e] : 0, sum = n;
      for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_up_sync(ALL_LANES, sum, static_cast<unsigned>(step));
        if (lane >= step) sum += other;
      }
      if (e <= experts) values[e] = total + sum - n;
      total += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
  }

  // begin [e] 里是各专家的行数：换成起点，写出 begin 与 tiles。
  __device__ void layout() {
    int tile = static_cast<int>(r.tile_rows);
    for (int e = static_cast<int>(threadIdx.x); e < experts; e += THREADS)
      tile_at[e] = (begin[e] + tile - 1) / tile;
    __syncthreads();
    if (warp == 0) prefix(begin);
    if (warp == 1) prefix(tile_at);
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e <= experts; e += THREADS) r.begin[e] = begin[e];
    int routed = tile_at[experts], tokens = static_cast<int>(r.tokens);
    int shared = r.shared ? (tokens + tile - 1) / tile : 0;
    for (int i = static_cast<int>(threadIdx.x); i < r.most_tiles; i += THREADS) {
      dso_cuda_moe_tile t = {experts, 0, 0, 0};
      if (i < routed) {
        t.expert = last_not_above(tile_at, experts, i);
        t.row = begin[t.expert] + (i - tile_at[t.expert]) * tile;
        t.rows = min_of(tile, begin[t.expert + 1] - t.row);
      } else if (i < routed + shared) {
        int at = (i - routed) * tile;
        t.row = static_cast<int>(slots) + at, t.rows = min_of(tile, tokens - at);
      }
      r.tiles[i] = t;
    }
  }

  __device__ void shared_rows(int64_t first, int64_t step) {
    for (int64_t t = first; r.shared && t < r.tokens; t += step)
      r.token[slots + t] = static_cast<int32_t>(t);
  }

  // 本段各专家的个数之和。
  __device__ int block_count(int e) const {
    int n = 0;
    for (int w = 0; w < WARPS; w++) n += hist[w * experts + e];
    return n;
  }
};

__global__ __launch_bounds__(THREADS) void moe_sort_single(dso_cuda_moe_routing r) {
  start_next();
  Sorter s(r);
  s.count(0);
  for (int e = static_cast<int>(threadIdx.x); e < s.experts; e += THREADS)
    s.begin[e] = s.block_count(e);
  __syncthreads();
  s.layout();
  s.offsets([&](int e) { return s.begin[e]; });
  s.scatter(0);
  s.shared_rows(threadIdx.x, THREADS);
}

// counts [段][experts]
__global__ __launch_bounds__(THREADS) void moe_sort_count(dso_cuda_moe_routing r) {
  Sorter s(r);
  s.count(static_cast<int>(blockIdx.x));
  for (int e = static_cast<int>(threadIdx.x); e < s.experts; e += THREADS)
    r.counts[static_cast<int64_t>(blockIdx.x) * s.experts + e] = s.block_count(e);
  s.shared_rows(static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x,
                static_cast<int64_t>(gridDim.x) * THREADS);
}

// counts 换成各段在专家内的起点。
__global__ __launch_bounds__(THREADS) void moe_sort_scan(dso_cuda_moe_routing r, int blocks) {
  Sorter s(r);
  for (int e = static_cast<int>(threadIdx.x); e < s.experts; e += THREADS) {
    int total = 0;
    for (int b = 0; b < blocks; b++) {
      int32_t *at = r.counts + static_cast<int64_t>(b) * s.experts + e;
      int n = *at;
      *at = total, total += n;
    }
    s.begin[e] = total;
  }
  __syncthreads();
  s.layout();
}

__global__ __launch_bounds__(THREADS) void moe_sort_scatter(dso_cuda_moe_routing r) {
  Sorter s(r);
  s.count(static_cast<int>(blockIdx.x));
  s.offsets([&](int e) {
    return r.begin[e] + r.counts[static_cast<int64_t>(blockIdx.x) * s.experts + e];
  });
  s.scatter(static_cast<int>(blockIdx.x));
}

int64_t blocks_of(const dso_cuda_moe_routing &r) {
  int64_t blocks = ceil_div(r.tokens * r.top_k, MOE_SORT_SLOTS);
  return blocks < 1 ? 1 : blocks;
}

size_t shared_bytes(int64_t experts) {
  return static_cast<size_t>(((WARPS + 2) * experts + 2) * 4);
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
  r->begin = take(r->experts + 1);
  r->token = take(slots + (r->shared ? r->tokens : 0));
  r->slot = take(slots), r->row = take(slots);
  r->counts = take(blocks_of(*r) * r->experts);
  return used;
}

int64_t dso_cuda_moe_most_experts(void) {
  Device device;
  if (device_of(&device) != cudaSuccess) return 0;
  return (device.shared_limit / 4 - 2) / (WARPS + 2);
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
