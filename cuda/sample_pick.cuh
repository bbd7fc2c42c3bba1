// 逆累积分布抽样，约定同 csrc/sample_pick.c：先逐块求和（fp64），再在跨过目标的那一块里找。块的大小固定，
// 所以结果与网格无关。sample_tokens 与 mtp_verify_sample 共用。
#pragma once

#include <cfloat>

#include "vocab.cuh"

namespace dso {

// 权重 w = p；有 q 时是 max(0, p - q)；第 without 个（-1 没有）是 0。
struct Weights {
  const void *p, *q;
  int64_t p_at, q_at;
  dso_dtype p_dtype, q_dtype;
  int64_t n, without;
};

constexpr int64_t PICK_NOTHING = -1, PICK_INVALID = -2;  // 权重全是 0；p 或 q 里有 NaN、inf

// p 或 q 里有 NaN、inf 时是 NaN。
__device__ inline float weight_at(const Weights &w, int64_t i) {
  float v = load_one(w.p, w.p_dtype, w.p_at + i);
  bool valid = v <= FLT_MAX;
  if (w.q) {
    float q = load_one(w.q, w.q_dtype, w.q_at + i);
    valid = valid && q <= FLT_MAX;
    v -= q;
  }
  if (!valid) return NAN;
  return v > 0.0f && i != w.without ? v : 0.0f;
}

// 一块的权重之和，每个线程都有；不合法的是 NaN。
__device__ inline double chunk_sum(const Weights &w, int64_t chunk) {
  VocabChunk at(chunk, w.n);
  double sum = 0.0;
  for (int64_t i = at.begin + threadIdx.x; i < at.end; i += VOCAB_THREADS) sum += weight_at(w, i);
  return block_reduce(sum, AddOp());
}

// 整个线程块一起：第一个累计权重超过 u * 总和的下标，权重为 0 的不会被抽到；或上面的两个负数。
// u 不在 [0, 1) 时取第一个或最后一个。
__device__ inline int64_t pick(const Weights &w, const double *sum, double u) {
  int64_t chunks = vocab_chunks(w.n), chosen = 0;
  double total = 0.0, before = 0.0, start = 0.0;
  for (int64_t c = 0; c < chunks; c++) total += sum[c];
  if (!(total > 0.0)) return total == total ? PICK_NOTHING : PICK_INVALID;
  double target = u * total;
  for (int64_t c = 0; c < chunks; c++) {  // 舍入使得没有一块跨过时，是最后一个不空的块
    if (sum[c] <= 0.0) continue;
    chosen = c, start = before;
    before += sum[c];
    if (before > target) break;
  }
  constexpr int EACH = VOCAB_CHUNK / VOCAB_THREADS;  // 每个线程连续的几个
  VocabChunk at(chosen, w.n);
  int64_t mine = at.begin + static_cast<int64_t>(threadIdx.x) * EACH;
  double own = 0.0;
  for (int j = 0; j < EACH; j++)
    if (mine + j < at.end) own += weight_at(w, mine + j);
  double reached = start + block_before(own);
  int64_t first = at.end, last = -1;
  for (int j = 0; j < EACH; j++) {
    float v = mine + j < at.end ? weight_at(w, mine + j) : 0.0f;
    if (!(v > 0.0f)) continue;
    last = mine + j, reached += v;
    if (reached > target && first == at.end) first = mine + j;
  }
  first = block_reduce(first, MinOp());
  last = block_reduce(last, MaxOp());
  return first < at.end ? first : last;
}

}  // namespace dso
