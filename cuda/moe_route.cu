// moe_route：打分、（分组，）选 top-k、混合权重、计数；规则同 csrc/moe_route.c。
//
// 一个 warp 一个词元，得分与整数键在共享内存里：键由浮点保序地换来（NaN 最大），相同时取下标小的，所以与线程数、次序无关。
// 选择时一个线程连续的 PER 个键在寄存器里，一轮两条 warp 的归约指令；组按名次选，不必一轮一轮。专家、组、top_k 太多时
// （PER 为 0）都在共享内存里一轮一轮取，取过的换成 GONE。
// 词元少时（SPREAD）一个 CTA 一个词元，读与打分由全部 warp 做：logits 是几份部分和，读它的请求才够多。
// 计数是整数的原子加；只有一个 CTA 时不必先清零。
#include <ptx.cuh>

#include "config.cuh"
#include "dso_cuda.h"
#include "moe_key.cuh"

namespace {

using namespace dso;

constexpr int THREADS = MOE_ROUTE_WARPS * WARP;  // 至多

// 由主机定好的。
struct Plan {
  const float *parts;  // 部分和 [count][tokens][experts]；count 为 1 时 logits 已在 p.logits 里
  int count;
  int group_size, group_shift;  // 一组几个专家，由 2 的几次方个线程看
  bool add;                     // counts 已经清零，累加上去；否则只有一个 CTA，写出全部
};

// 一个词元的键占几个。
__host__ __device__ constexpr int key_slots(int per, int experts) {
  return per > 0 ? per * WARP : experts;
}

// 各词元的共享内存：key、score [experts]，group [n_group]（PER 为 0 时）；16 字节对齐。
__host__ __device__ inline size_t row_bytes(const dso_moe_route_params &p, int per) {
  int experts = static_cast<int>(p.experts), groups = static_cast<int>(p.rule.n_group);
  int words = key_slots(per, experts) + experts + (per > 0 ? 0 : groups);
  return static_cast<size_t>((words + 3) / 4 * 16);
}

template <int PER, bool SPREAD>
struct Router {
  static constexpr int SLOTS = MOE_LOGITS_PARTS;
  static constexpr int STEP = SPREAD ? THREADS : WARP;  // 读与打分时几个线程一个词元
  // 一次发出几个专家的读。
  static constexpr int BATCH = PER == 0 ? 4 : SPREAD ? (PER * WARP + THREADS - 1) / THREADS : 8;

  const dso_moe_route_params &p;
  const dso_route_rule &rule;
  const Plan &plan;
  int experts, top_k, lane;
  int64_t token;
  int *key, *group;
  float *score;
  int *counts;  // 这一块各专家的个数 [experts]；SPREAD 时没有

  __device__ Router(const dso_moe_route_params &params, const Plan &planned, int slot,
                    int64_t first)
      : p(params),
        rule(params.rule),
        plan(planned),
        experts(static_cast<int>(params.experts)),
        top_k(static_cast<int>(params.rule.top_k)),
        lane(static_cast<int>(threadIdx.x) % WARP),
        token(first + slot) {
    key = reinterpret_cast<int *>(dynamic_shared() + slot * row_bytes(p, PER));
    score = reinterpret_cast<float *>(key + key_slots(PER, experts));
    group = reinterpret_cast<int *>(score + experts);
  }

  __device__ bool over_all() const {  // 得分是全部专家的 softmax
    return rule.score == DSO_SCORE_SOFTMAX && !rule.softmax_after;
  }

  // 一个 logits 的各份，依次相加。
  __device__ __forceinline__ float summed(int e) const {
    const float *at = plan.parts + token * experts + e;
    int64_t step = p.tokens * experts;
    float part[SLOTS], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SLOTS; i++) part[i] = i < plan.count ? at[i * step] : 0.0f;
#pragma unroll
    for (int i = 0; i < SLOTS; i++) sum += part[i];
    return sum;
  }

  // 给定的 logits；类型的分支在读的外面，一批读才能一起发出。
  template <class Each>
  __device__ __forceinline__ void given(float (&x)[BATCH], Each each) const {
    int64_t row = token * p.x.rs;
    if (p.x.dtype == DSO_F32) {
      const float *from = static_cast<const float *>(p.x.data) + row;
      each([&](int i, int e) { x[i] = from[e]; });
      return;
    }
    const auto *from = static_cast<const unsigned short *>(p.x.data) + row;
    unsigned short bits[BATCH];
    each([&](int i, int e) { bits[i] = from[e]; });
    bool bf16 = p.x.dtype == DSO_BF16;
    each([&](int i, int) { x[i] = bf16 ? bf16_bits(bits[i]) : half_bits(bits[i]); });
  }

  // 从第 first 个起每隔 STEP 个专家：logits 加上偏置写出。先把一批都读来。
  // score 里先放 logits，key 里先放 choice_bias。
  __device__ void load(int first) const {
    float *z = p.logits + token * experts;
    bool write = p.logit_bias || !p.has_weight || plan.count > 1;
#pragma unroll 1
    for (int base = first; base < experts; base += STEP * BATCH) {
      float x[BATCH], bias[BATCH], choice[BATCH];
      auto each = [&](auto visit) {
#pragma unroll
        for (int i = 0; i < BATCH; i++)
          if (base + i * STEP < experts) visit(i, base + i * STEP);
      };
      if (p.logit_bias) each([&](int i, int e) { bias[i] = p.logit_bias[e]; });
      if (p.choice_bias) each([&](int i, int e) { choice[i] = p.choice_bias[e]; });
      if (!SPREAD && !p.has_weight)  // SPREAD 时都有
        given(x, each);
      else if (SPREAD && plan.count > 1)
        each([&](int i, int e) { x[i] = summed(e); });
      else
        each([&](int i, int e) { x[i] = z[e]; });
      each([&](int i, int e) {
        if (p.logit_bias) x[i] += bias[i];
        if (write) z[e] = x[i];
        score[e] = x[i];
        if (p.choice_bias) key[e] = static_cast<int>(__float_as_uint(choice[i]));
      });
    }
#pragma unroll 1
    for (int e = experts + first; e < key_slots(PER, experts); e += STEP) key[e] = GONE;
  }

  // softmax 的最大值不看 NaN：有 NaN 时和是 NaN，整行都是。
  __device__ void softmax(float *values, int count) const {
    float top = -INFINITY, sum = 0.0f;
    for (int e = lane; e < count; e += WARP) top = fmaxf(top, values[e]);
    top = warp_top(top);
    for (int e = lane; e < count; e += WARP) sum += values[e] = expf(values[e] - top);
    float inverse = 1.0f / warp_sum(sum);
    for (int e = lane; e < count; e += WARP) values[e] *= inverse;
  }

  __device__ static float warp_top(float top) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, step));
    return top;
  }

  // 同样的次序，在寄存器里；连同键。
  __device__ void softmax_scores() const {
    float value[PER], top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      value[i] = lane + i * WARP < experts ? score[lane + i * WARP] : -INFINITY;
      top = fmaxf(top, value[i]);
    }
    top = warp_top(top);
#pragma unroll
    for (int i = 0; i < PER; i++)
      if (lane + i * WARP < experts) sum += value[i] = expf(value[i] - top);
    float inverse = 1.0f / warp_sum(sum);
#pragma unroll
    for (int i = 0; i < PER; i++)
      if (lane + i * WARP < experts) {
        float s = __fmul_rn(value[i], inverse);  // 不与加偏置合成一次乘加
        score[lane + i * WARP] = s;
        set_key(lane + i * WARP, s);
      }
  }

  // 从第 first 个起每隔 EVERY 个：得分与键。
  template <int EVERY>
  __device__ void scores(int first) const {
#pragma unroll 1
    for (int e = first; e < experts; e += EVERY) {
      float s = score[e];
      if (rule.score != DSO_SCORE_SOFTMAX) {
        float small = expf(-fabsf(s));
        s = rule.score == DSO_SCORE_SIGMOID ? (s >= 0.0f ? 1.0f : small) / (1.0f + small)
                                            : sqrtf((s > 0.0f ? s : 0.0f) + log1pf(small));
        score[e] = s;
      }
      set_key(e, s);
    }
  }

  __device__ void set_key(int e, float s) const {
    key[e] = key_of(p.choice_bias ? s + __uint_as_float(static_cast<unsigned>(key[e])) : s);
  }

  // 组得分：最高两项之和（只有一项时就是它），或最高项。
  __device__ int group_key(int first, int second, int size) const {
    bool alone = rule.group_max || size < 2;
    return alone ? first : key_of(value_of(first) + value_of(second));
  }

  // (first, second) 合并 width 个线程的。
  __device__ void merge(int *first, int *second, int width) const {
    for (int step = width / 2; step > 0; step /= 2)
      merge_top2(first, second, __shfl_xor_sync(ALL_LANES, *first, step),
                 __shfl_xor_sync(ALL_LANES, *second, step));
  }

  // 没有选中的组里的键换成 GONE。几个线程看一组；名次是得分更高的（相同时下标更小的）组数。
  __device__ void choose_groups() const {
    int groups = static_cast<int>(rule.n_group), size = plan.group_size, shift = plan.group_shift;
    int mine = lane >> shift, at = lane - (mine << shift), first = GONE, second = GONE, before = 0;
    int *keys = key + mine * size + at;
    int many = mine < groups ? (size - at + (1 << shift) - 1) >> shift : 0;  // 本线程的
#pragma unroll 4
    for (int i = 0; i < many; i++) merge_top2(&first, &second, keys[i << shift], GONE);
    merge(&first, &second, 1 << shift);
    int own = group_key(first, second, size);
#pragma unroll 4
    for (int g = 0; g < groups; g++) {
      int other = __shfl_sync(ALL_LANES, own, g << shift);
      before += other > own || (other == own && g < mine);
    }
    if (before >= rule.topk_group)
#pragma unroll 1
      for (int i = 0; i < many; i++) keys[i << shift] = GONE;
    __syncwarp();
  }

  // 第 lane 个选中的专家。
  __device__ int choose() const {
    int keys[PER], chosen = 0;
#pragma unroll
    for (int i = 0; i < PER; i += 4) {
      auto four = *reinterpret_cast<const Words<4> *>(key + lane * PER + i);
#pragma unroll
      for (int j = 0; j < 4; j++) keys[i + j] = static_cast<int>(four.v[j]);
    }
    for (int j = 0; j < top_k; j++) {
      int best = keys[0], at = 0;
#pragma unroll
      for (int i = 1; i < PER; i++) best = keys[i] > best ? keys[i] : best;
      int top = __reduce_max_sync(ALL_LANES, best);
      unsigned owners = __ballot_sync(ALL_LANES, best == top);
      int owner = __ffs(static_cast<int>(owners)) - 1;
#pragma unroll
      for (int i = PER - 1; i >= 0; i--) at = keys[i] == best ? i : at;
#pragma unroll
      for (int i = 0; i < PER; i++) keys[i] = lane == owner && i == at ? GONE : keys[i];
      int index = __shfl_sync(ALL_LANES, lane * PER + at, owner);
      chosen = lane == j ? index : chosen;
    }
    return chosen;
  }

  // 混合权重；先除后乘，与 transformers 的次序相同。
  __device__ void mix(int chosen) const {
    bool valid = lane < top_k;
    float picked = valid ? score[chosen] : 0.0f;
    if (rule.softmax_after) {
      float top = warp_top(valid ? fmaxf(-INFINITY, picked) : -INFINITY);
      picked = valid ? expf(picked - top) : 0.0f;
      picked = __fmul_rn(picked, 1.0f / warp_sum(picked));  // 不与求和合成乘加
    }
    float sum = warp_sum(picked);
    float divisor = rule.normalize ? sum + rule.eps : 1.0f;
    if (!valid) return;
    p.indices[token * top_k + lane] = chosen;
    p.weights[token * top_k + lane] = picked / divisor * rule.scaling;
    count(chosen);
  }

  // ---- 一般的情形：都在共享内存里 ----

  __device__ void choose_groups_slowly() const {
    int groups = static_cast<int>(rule.n_group), size = experts / groups;
    for (int g = 0; g < groups; g++) {
      int first = GONE, second = GONE;
      for (int e = lane; e < size; e += WARP) merge_top2(&first, &second, key[g * size + e], GONE);
      merge(&first, &second, WARP);
      if (lane == 0) group[g] = group_key(first, second, size);
    }
    __syncwarp();
    for (int64_t i = 0; i < rule.topk_group; i++) {
      Best best = warp_best(group, groups, lane);
      if (lane == 0) group[best.index] = GONE;
      __syncwarp();
    }
    for (int e = lane; e < experts; e += WARP)
      if (group[e / size] != GONE) key[e] = GONE;
    __syncwarp();
  }

  // 选中的依次写出；得分收进 key 的开头（已经不用了）。
  __device__ void choose_slowly() const {
    int64_t *indices = p.indices + token * top_k;
    float *weights = p.weights + token * top_k;
    for (int j = 0; j < top_k; j++) {
      Best best = warp_best(key, experts, lane);
      if (lane == 0) {
        key[best.index] = GONE;
        indices[j] = best.index, weights[j] = score[best.index];
        count(best.index);
      }
      __syncwarp();
    }
    auto *picked = reinterpret_cast<float *>(key);
    for (int j = lane; j < top_k; j += WARP) picked[j] = weights[j];
    __syncwarp();
    if (rule.softmax_after) softmax(picked, top_k);
    __syncwarp();
    float sum = 0.0f;
    for (int j = lane; j < top_k; j += WARP) sum += picked[j];
    sum = warp_sum(sum);
    float divisor = rule.normalize ? sum + rule.eps : 1.0f;
    for (int j = lane; j < top_k; j += WARP) weights[j] = picked[j] / divisor * rule.scaling;
  }

  __device__ void count(int expert) const {
    if (SPREAD)
      atomicAdd(reinterpret_cast<unsigned long long *>(p.counts) + expert, 1ull);
    else
      atomicAdd(&counts[expert], 1);
  }

  __device__ void run() const {
    bool grouped = rule.topk_group != rule.n_group;
    if constexpr (PER > 0) {
      if (over_all()) softmax_scores();
      __syncwarp();
      if (grouped) choose_groups();
      mix(choose());
    } else {
      if (over_all()) {
        softmax(score, experts);
        scores<WARP>(lane);
      }
      __syncwarp();
      if (grouped) choose_groups_slowly();
      choose_slowly();
    }
  }
};

template <int PER, bool SPREAD>
__global__ __launch_bounds__(THREADS) void moe_route_kernel(dso_moe_route_params p, Plan plan) {
  int thread = static_cast<int>(threadIdx.x), warp = thread / WARP, lane = thread % WARP;
  int threads = static_cast<int>(blockDim.x), slots = SPREAD ? 1 : threads / WARP;
  auto *counts = reinterpret_cast<int *>(dynamic_shared() + slots * row_bytes(p, PER));
  if (!SPREAD)
    for (int e = thread; e < p.experts; e += threads) counts[e] = 0;
  grid_release();
  grid_wait();
  using Here = Router<PER, SPREAD>;
  Here router(p, plan, SPREAD ? 0 : warp, static_cast<int64_t>(blockIdx.x) * slots);
  router.counts = counts;
  bool real = router.token < p.tokens;
  int first = SPREAD ? thread : lane;
  if (real) {
    router.load(first);
    if (!router.over_all()) router.template scores<Here::STEP>(first);
  }
  __syncthreads();
  if (real && (!SPREAD || warp == 0)) router.run();
  if (SPREAD) return;
  __syncthreads();
  auto *total = reinterpret_cast<unsigned long long *>(p.counts);
  for (int e = thread; e < p.experts; e += threads) {
    auto n = static_cast<unsigned long long>(counts[e]);
    if (!plan.add)
      total[e] = n;
    else if (n > 0)
      atomicAdd(&total[e], n);
  }
}

template <int PER>
cudaError_t run(const dso_moe_route_params &p, Plan plan, cudaStream_t stream) {
  if (plan.count > 0)
    return launch(moe_route_kernel<PER, true>, dim3(static_cast<unsigned>(p.tokens)), dim3(THREADS),
                  row_bytes(p, PER), stream, p, plan);
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  // 专家极多时一块少几个词元。
  int64_t left = device.shared_limit - p.experts * 4;
  int64_t warps = left / static_cast<int64_t>(row_bytes(p, PER));
  if (warps > MOE_ROUTE_WARPS) warps = MOE_ROUTE_WARPS;
  if (warps < 1) return cudaErrorInvalidValue;
  int64_t blocks = ceil_div(p.tokens, warps);
  plan.add = blocks != 1;
  if (plan.add) {
    error = cudaMemsetAsync(p.counts, 0, static_cast<size_t>(p.experts) * 8, stream);
    if (error != cudaSuccess || blocks == 0) return error;
  }
  return launch(moe_route_kernel<PER, false>, dim3(static_cast<unsigned>(blocks)),
                dim3(static_cast<unsigned>(warps * WARP)),
                warps * row_bytes(p, PER) + p.experts * 4, stream, p, plan);
}

}  // namespace

cudaError_t dso_cuda_moe_route(const dso_moe_route_params *p, const float *parts,
                               cudaStream_t stream) {
  // 部分和来自 dso_cuda_moe_logits，它也把 counts 清过了。
  Plan plan = {parts, p->tokens > 0 ? static_cast<int>(dso_cuda_moe_logits_parts(p)) : 0,
               static_cast<int>(p->experts / p->rule.n_group), 5, false};
  while (plan.group_shift > 0 && p->rule.n_group << plan.group_shift > WARP) plan.group_shift--;
  bool few = p->rule.n_group <= WARP && p->rule.top_k <= WARP;
  if (few && p->experts <= 8 * WARP) return run<8>(*p, plan, stream);
  if (few && p->experts <= 16 * WARP) return run<16>(*p, plan, stream);
  return run<0>(*p, plan, stream);
}
