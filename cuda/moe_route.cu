// moe_route：打分、（分组，）选 top-k、混合权重、计数；规则同 csrc/moe_route.c。
//
// 一个 warp 一个词元，得分与整数键在共享内存里。选择是一轮一轮取最大的键：键由浮点保序地换来（NaN 最大），
// 相同时取下标小的，取过的换成 GONE，所以与线程数、次序无关。计数是整数的原子加，只有一个 CTA 时不必先清零。
#include <ptx.cuh>

#include "config.cuh"
#include "dso_cuda.h"
#include "moe_key.cuh"

namespace {

using namespace dso;

constexpr int THREADS = MOE_ROUTE_WARPS * WARP;  // 至多

struct Router {
  const dso_moe_route_params &p;
  const dso_route_rule &rule;
  int experts, lane;
  int64_t token;
  float *score;  // [experts]
  int *key;      // [experts]
  int *group;    // [n_group]：组得分的键，选中的换成 GONE

  __device__ float *logits() const { return p.logits + token * p.experts; }

  // logits 加上偏置写出；score 里先放 logits。
  __device__ void load() {
    float *z = logits();
    for (int e = lane; e < experts; e += WARP) {
      float x = p.has_weight ? z[e] : load_one(p.x.data, p.x.dtype, token * p.x.rs + e);
      if (p.logit_bias) x += p.logit_bias[e];
      if (p.logit_bias || !p.has_weight) z[e] = x;
      score[e] = x;
    }
  }

  // softmax 的最大值不看 NaN：有 NaN 时和是 NaN，整行都是。
  __device__ void softmax(float *values, int count) const {
    float top = -INFINITY, sum = 0.0f;
    for (int e = lane; e < count; e += WARP) top = fmaxf(top, values[e]);
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, step));
    for (int e = lane; e < count; e += WARP) sum += values[e] = expf(values[e] - top);
    float inverse = 1.0f / warp_sum(sum);
    for (int e = lane; e < count; e += WARP) values[e] *= inverse;
  }

  __device__ void scores() const {
    if (rule.softmax_after) return;
    if (rule.score == DSO_SCORE_SOFTMAX) {
      softmax(score, experts);
      return;
    }
    for (int e = lane; e < experts; e += WARP) {
      float z = score[e], small = expf(-fabsf(z));
      score[e] = rule.score == DSO_SCORE_SIGMOID ? (z >= 0.0f ? 1.0f : small) / (1.0f + small)
                                                 : sqrtf((z > 0.0f ? z : 0.0f) + log1pf(small));
    }
  }

  __device__ void keys() const {
    for (int e = lane; e < experts; e += WARP)
      key[e] = key_of(p.choice_bias ? score[e] + p.choice_bias[e] : score[e]);
    __syncwarp();
  }

  // 组得分：最高两项之和（只有一项时就是它），或最高项。
  __device__ void group_keys() const {
    int groups = static_cast<int>(rule.n_group), size = experts / groups;
    for (int g = 0; g < groups; g++) {
      int first = GONE, second = GONE;
      for (int e = lane; e < size; e += WARP) merge_top2(&first, &second, key[g * size + e], GONE);
#pragma unroll
      for (int step = WARP / 2; step > 0; step /= 2)
        merge_top2(&first, &second, __shfl_xor_sync(ALL_LANES, first, step),
                   __shfl_xor_sync(ALL_LANES, second, step));
      bool alone = rule.group_max || size < 2;
      if (lane == 0) group[g] = alone ? first : key_of(value_of(first) + value_of(second));
    }
    __syncwarp();
  }

  // 没有选中的组里的键换成 GONE。
  __device__ void choose_groups() const {
    int groups = static_cast<int>(rule.n_group), size = experts / groups;
    if (rule.topk_group == rule.n_group) return;
    group_keys();
    for (int64_t i = 0; i < rule.topk_group; i++) {
      Best best = best_of(group, groups);
      if (lane == 0) group[best.index] = GONE;
      __syncwarp();
    }
    for (int e = lane; e < experts; e += WARP)
      if (group[e / size] != GONE) key[e] = GONE;
    __syncwarp();
  }

  // 选中的依次写出；得分收进 key 的开头（已经不用了）。
  __device__ void choose() const {
    int64_t *indices = p.indices + token * rule.top_k;
    float *weights = p.weights + token * rule.top_k;
    for (int64_t j = 0; j < rule.top_k; j++) {
      Best best = best_of(key, experts);
      if (lane == 0) {
        key[best.index] = GONE;
        indices[j] = best.index, weights[j] = score[best.index];
      }
      __syncwarp();
    }
    mix(weights);
  }

  // 混合权重；先除后乘，与 transformers 的次序相同。
  __device__ void mix(float *weights) const {
    int count = static_cast<int>(rule.top_k);
    auto *picked = reinterpret_cast<float *>(key);
    for (int j = lane; j < count; j += WARP) picked[j] = weights[j];
    __syncwarp();
    if (rule.softmax_after) softmax(picked, count);
    __syncwarp();
    float sum = 0.0f;
    for (int j = lane; j < count; j += WARP) sum += picked[j];
    sum = warp_sum(sum);
    float divisor = rule.normalize ? sum + rule.eps : 1.0f;
    for (int j = lane; j < count; j += WARP) weights[j] = picked[j] / divisor * rule.scaling;
  }

  __device__ Best best_of(const int *keys, int count) const { return warp_best(keys, count, lane); }

  __device__ void run() {
    load();
    scores();
    keys();
    choose_groups();
    choose();
  }
};

// 各 warp 的共享内存：score、key [experts]，group [n_group]。
__host__ __device__ inline size_t row_bytes(const dso_moe_route_params &p) {
  return static_cast<size_t>((2 * p.experts + p.rule.n_group) * 4);
}

__global__ __launch_bounds__(THREADS) void moe_route_kernel(dso_moe_route_params p) {
  grid_release();
  grid_wait();
  int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
  int threads = static_cast<int>(blockDim.x);
  int64_t first = static_cast<int64_t>(blockIdx.x) * (threads / WARP), token = first + warp;
  if (token < p.tokens) {
    auto *score = reinterpret_cast<float *>(dynamic_shared() + warp * row_bytes(p));
    auto *key = reinterpret_cast<int *>(score + p.experts);
    Router router{p, p.rule, static_cast<int>(p.experts), lane, token, score, key, key + p.experts};
    router.run();
  }
  __syncthreads();
  // 这一块各专家的个数；只有一块时就是全部。
  auto *counts = reinterpret_cast<int *>(dynamic_shared());
  for (int e = static_cast<int>(threadIdx.x); e < p.experts; e += threads) counts[e] = 0;
  __syncthreads();
  int64_t last = first + threads / WARP;
  if (last > p.tokens) last = p.tokens;
  for (int64_t i = first * p.rule.top_k + threadIdx.x; i < last * p.rule.top_k; i += threads)
    atomicAdd(&counts[p.indices[i]], 1);
  __syncthreads();
  auto *total = reinterpret_cast<unsigned long long *>(p.counts);
  for (int e = static_cast<int>(threadIdx.x); e < p.experts; e += threads) {
    auto n = static_cast<unsigned long long>(counts[e]);
    if (gridDim.x == 1)
      total[e] = n;
    else if (n > 0)
      atomicAdd(&total[e], n);
  }
}

// ---- 词元少时的 logits：一个 CTA 一个专家、LOGIT_TOKENS 个词元；各 warp 分 K，读权重的请求才够多 ----

constexpr int LOGIT_TOKENS = 8, LOGIT_WARPS = 4, LOGIT_THREADS = LOGIT_WARPS * WARP;

template <int V>
__global__ __launch_bounds__(LOGIT_THREADS) void moe_logits_kernel(dso_moe_route_params p) {
  __shared__ float sums[LOGIT_WARPS][LOGIT_TOKENS];
  int thread = static_cast<int>(threadIdx.x);
  int64_t expert = blockIdx.x, first = static_cast<int64_t>(blockIdx.y) * LOGIT_TOKENS;
  int64_t bytes = p.k * bytes_of(p.weight.dtype);
  if (V > 1 && thread == 0 && bytes > 0)  // 等前一个核时，这一行权重先取进 L2
    prefetch_l2(
        static_cast<const char *>(p.weight.data) + expert * p.weight.rs * bytes_of(p.weight.dtype),
        static_cast<uint32_t>(bytes));
  grid_release();
  grid_wait();
  if (blockIdx.y == 0 && thread == 0) p.counts[expert] = 0;  // 下一个核要累加，不必另排一次清零
  float sum[LOGIT_TOKENS] = {};
#pragma unroll(V == 1 ? 1 : 4)
  for (int64_t k = static_cast<int64_t>(thread) * V; k < p.k; k += LOGIT_THREADS * V) {
    Vec<V> w = load<V>(p.weight.data, p.weight.dtype, expert * p.weight.rs + k);
#pragma unroll
    for (int t = 0; t < LOGIT_TOKENS; t++) {
      if (first + t >= p.tokens) break;
      Vec<V> x = load<V>(p.x.data, p.x.dtype, (first + t) * p.x.rs + k);
#pragma unroll
      for (int i = 0; i < V; i++) sum[t] += w.v[i] * x.v[i];
    }
  }
#pragma unroll
  for (int t = 0; t < LOGIT_TOKENS; t++) {
    float total = warp_sum(sum[t]);
    if (thread % WARP == 0) sums[thread / WARP][t] = total;
  }
  __syncthreads();
  if (thread >= LOGIT_TOKENS || first + thread >= p.tokens) return;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < LOGIT_WARPS; w++) total += sums[w][thread];
  p.logits[(first + thread) * p.experts + expert] = total;
}

}  // namespace

cudaError_t dso_cuda_moe_logits(const dso_moe_route_params *p, cudaStream_t stream) {
  dim3 grid(static_cast<unsigned>(p->experts),
            static_cast<unsigned>(ceil_div(p->tokens, LOGIT_TOKENS)));
  if (grid.x == 0 || grid.y == 0) return cudaSuccess;
  bool wide = p->k % 8 == 0 && wide_ok(p->x.data, p->x.dtype, p->x.rs) &&
              wide_ok(p->weight.data, p->weight.dtype, p->weight.rs);
  if (wide) return launch(moe_logits_kernel<8>, grid, dim3(LOGIT_THREADS), 0, stream, *p);
  return launch(moe_logits_kernel<1>, grid, dim3(LOGIT_THREADS), 0, stream, *p);
}

cudaError_t dso_cuda_moe_route(const dso_moe_route_params *p, cudaStream_t stream) {
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  // 专家极多时一块少几个词元。
  int warps = device.shared_limit / static_cast<int>(row_bytes(*p));
  if (warps > MOE_ROUTE_WARPS) warps = MOE_ROUTE_WARPS;
  if (warps == 0) return cudaErrorInvalidValue;
  int64_t blocks = ceil_div(p->tokens, warps);
  bool cleared = p->has_weight && p->tokens <= MOE_LOGITS_TOKENS;  // dso_cuda_moe_logits 清过
  if (blocks == 0 || (blocks > 1 && !cleared)) {
    error = cudaMemsetAsync(p->counts, 0, static_cast<size_t>(p->experts) * 8, stream);
    if (error != cudaSuccess || blocks == 0) return error;
  }
  return launch(moe_route_kernel, dim3(static_cast<unsigned>(blocks)),
                dim3(static_cast<unsigned>(warps * WARP)), warps * row_bytes(*p), stream, *p);
}
