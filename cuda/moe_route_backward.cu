// moe_route 的反向：公式见 csrc/moe_route_backward.c。一个 warp 一个词元，所选的得分在寄存器之外只有 top_k 个，
// 放在共享内存里；logits 的一行从显存再读（在 L1 里）。
#include <assert.h>

#include <ptx.cuh>

#include "config.cuh"
#include "dso_cuda.h"
#include "vec.cuh"

namespace {

using namespace dso;

constexpr int THREADS = MOE_ROUTE_WARPS * WARP;

__device__ float logit_score(dso_score score, float z) {
  float small = expf(-fabsf(z));
  return score == DSO_SCORE_SIGMOID ? (z >= 0.0f ? 1.0f : small) / (1.0f + small)
                                    : sqrtf((z > 0.0f ? z : 0.0f) + log1pf(small));
}

__device__ float slope(dso_score score, float s) {
  if (score == DSO_SCORE_SIGMOID) return s * (1.0f - s);
  return -expm1f(-s * s) / fmaxf(2.0f * s, 1e-37f);  // 极小的 logits 得分下溢为 0
}

struct Row {
  const dso_moe_route_backward_params &p;
  const dso_route_rule &rule;
  int lane, experts, top_k;
  const float *logits;   // [experts]
  const int64_t *index;  // [top_k]
  float *out;            // [experts]
  float *score, *grad;   // [top_k]：所选的得分、得分的梯度

  __device__ bool is_softmax() const { return rule.score == DSO_SCORE_SOFTMAX; }
  __device__ bool over_all() const { return is_softmax() && !rule.softmax_after; }

  // softmax 的最大值不看 NaN：有 NaN 时和是 NaN，整行都是。
  template <class Value>
  __device__ void normalizer(int count, Value value, float *top, float *inverse) const {
    float most = -INFINITY, sum = 0.0f;
    for (int i = lane; i < count; i += WARP) most = fmaxf(most, value(i));
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
      most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
    for (int i = lane; i < count; i += WARP) sum += expf(value(i) - most);
    *top = most, *inverse = 1.0f / warp_sum(sum);
  }

  __device__ void scores(float *top, float *inverse) const {
    if (!is_softmax()) {
      for (int j = lane; j < top_k; j += WARP) score[j] = logit_score(rule.score, logits[index[j]]);
      return;
    }
    if (over_all())
      normalizer(experts, [&](int e) { return logits[e]; }, top, inverse);
    else
      normalizer(top_k, [&](int j) { return logits[index[j]]; }, top, inverse);
    for (int j = lane; j < top_k; j += WARP) score[j] = expf(logits[index[j]] - *top) * *inverse;
  }

  // Σ_j grad_j score_j
  __device__ float dot() const {
    float sum = 0.0f;
    for (int j = lane; j < top_k; j += WARP) sum += grad[j] * score[j];
    return warp_sum(sum);
  }

  // 混合权重的梯度换成得分的梯度；各线程只看自己的那些 j。
  __device__ void score_grads(const float *d_weights) const {
    float sum = 0.0f;
    for (int j = lane; j < top_k; j += WARP) {
      grad[j] = rule.scaling * d_weights[j];
      sum += score[j];
    }
    if (!rule.normalize) return;
    sum = warp_sum(sum) + rule.eps;
    float common = dot() / sum;
    for (int j = lane; j < top_k; j += WARP) grad[j] = (grad[j] - common) / sum;
  }

  __device__ void run(const float *d_logits, const float *d_weights) const {
    float top = 0.0f, inverse = 0.0f, common = 0.0f;
    if (d_weights) {
      scores(&top, &inverse);
      score_grads(d_weights);
      if (is_softmax()) common = dot();
    }
    for (int e = lane; e < experts; e += WARP) out[e] = d_logits ? d_logits[e] : 0.0f;
    if (d_weights && over_all())
      for (int e = lane; e < experts; e += WARP)
        out[e] -= common * (expf(logits[e] - top) * inverse);
    __syncwarp();
    if (!d_weights) return;
    // 每个 logits 只归一个线程：下标重复时也依次相加
    for (int j = lane; j < top_k; j += WARP)
      score[j] = is_softmax() ? score[j] * (over_all() ? grad[j] : grad[j] - common)
                              : grad[j] * slope(rule.score, score[j]);
    __syncwarp();
    for (int j = 0; j < top_k; j++)
      if (index[j] % WARP == lane) out[index[j]] += score[j];
  }
};

__global__ __launch_bounds__(THREADS) void moe_route_backward_kernel(
    dso_moe_route_backward_params p) {
  grid_wait();
  int warp = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
  int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / WARP) + warp;
  if (token >= p.tokens) return;
  int64_t top_k = p.rule.top_k;
  auto *shared = reinterpret_cast<float *>(dynamic_shared()) + warp * 2 * top_k;
  const int64_t *index = p.indices + token * top_k;
  for (int64_t j = lane; j < top_k; j += WARP) assert(index[j] >= 0 && index[j] < p.experts);
  Row row{p,
          p.rule,
          lane,
          static_cast<int>(p.experts),
          static_cast<int>(top_k),
          p.logits + token * p.experts,
          index,
          p.out + token * p.experts,
          shared,
          shared + top_k};
  row.run(p.d_logits ? p.d_logits + token * p.experts : nullptr,
          p.d_weights ? p.d_weights + token * top_k : nullptr);
}

}  // namespace

cudaError_t dso_cuda_moe_route_backward(const dso_moe_route_backward_params *p,
                                        cudaStream_t stream) {
  if (p->tokens == 0 || p->experts == 0) return cudaSuccess;
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  auto each = static_cast<size_t>(2 * p->rule.top_k * 4);
  int warps = MOE_ROUTE_WARPS;
  if (each > 0 && static_cast<size_t>(device.shared_limit) / each < MOE_ROUTE_WARPS)
    warps = device.shared_limit / static_cast<int>(each);
  if (warps == 0) return cudaErrorInvalidValue;
  dim3 grid(static_cast<unsigned>(ceil_div(p->tokens, warps)));
  return launch(moe_route_backward_kernel, grid, dim3(static_cast<unsigned>(warps * WARP)),
                warps * each, stream, *p);
}
