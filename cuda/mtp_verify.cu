// mtp_verify_greedy、mtp_verify_sample：逐行核对草稿，约定与接受的规则同 csrc/mtp_verify.c。
//
// 一行几个位置的词表一起分给许多 CTA（先读完，再决定停在哪里：logits 刚写出，多半还在 L2）；停下之后的位置
// 虽然读了，其中的 NaN 仍然无妨。草稿、长度在设备上，没有先查内容：长度截到 [0, D]，越界的草稿贪心时不接受，
// 采样时当作坏的草稿。
#include "dso_cuda.h"
#include "sample_pick.cuh"

namespace {

using namespace dso;

__device__ int64_t draft_count(const dso_mtp_rows &in, int64_t row) {
  int64_t given = in.draft_len ? in.draft_len[row] : in.drafts;
  return given < 0 ? 0 : given > in.drafts ? in.drafts : given;
}

// ---- 贪心 ----

// found [R, D + 1, 块]
template <int V>
__global__ void __launch_bounds__(VOCAB_THREADS)
    argmax_kernel(dso_mtp_verify_greedy_params p, Best *found, int64_t chunks) {
  grid_release();
  grid_wait();
  int64_t place = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  int64_t row = place / (p.in.drafts + 1), i = place % (p.in.drafts + 1);
  if (i > draft_count(p.in, row)) return;  // 整个块一起退出
  VocabChunk at(chunk, p.in.vocab);
  int64_t from = row * p.logits.rs + i * p.logits.ps;
  Best best = 0;
  for (int64_t j = at.begin + static_cast<int64_t>(threadIdx.x) * V; j < at.end;
       j += VOCAB_THREADS * V) {
    Vec<V> x = load<V>(p.logits.data, p.logits.dtype, from + j);
#pragma unroll
    for (int n = 0; n < V; n++) best = MaxOp()(best, best_of(x.v[n], j + n));
  }
  best = block_reduce(best, MaxOp());
  if (threadIdx.x == 0) found[blockIdx.x] = best;
}

// 一个 warp 一行。
__global__ void greedy_kernel(dso_mtp_verify_greedy_params p, const Best *found, int64_t chunks) {
  grid_release();
  grid_wait();
  int64_t row = blockIdx.x, count = draft_count(p.in, row), accepted = 0, next = 0;
  for (int64_t i = 0; i <= count; i++) {
    const Best *mine = found + (row * (p.in.drafts + 1) + i) * chunks;
    Best best = 0;
    for (int64_t c = threadIdx.x; c < chunks; c += WARP) best = MaxOp()(best, mine[c]);
    best = warp_reduce(best, MaxOp());
    accepted = i, next = best_index(best);
    if (best_is_nan(best)) {
      accepted = DSO_MTP_BAD_TARGET, next = -1 - i;
      break;
    }
    if (i < count && p.in.draft[row * p.in.drafts + i] != next) break;
  }
  if (threadIdx.x == 0) p.in.accepted[row] = accepted, p.in.next[row] = next;
}

// ---- 采样 ----

struct Stop {
  int64_t at;  // 停下的位置，即接受的个数
  int fault;   // dso_mtp_fault，或 -1
};

__device__ Stop stop_of(const dso_mtp_verify_sample_params &p, int64_t row) {
  int64_t count = draft_count(p.in, row);
  for (int64_t i = 0; i < count; i++) {
    int64_t token = p.in.draft[row * p.in.drafts + i];
    if (token < 0 || token >= p.in.vocab) return {i, DSO_MTP_BAD_DRAFT};
    float prob =
        load_one(p.target.data, p.target.dtype, row * p.target.rs + i * p.target.ps + token);
    float q = 1.0f;
    if (!p.one_hot)
      q = load_one(p.proposal.data, p.proposal.dtype,
                   row * p.proposal.rs + i * p.proposal.ps + token);
    if (!(prob >= 0.0f && prob <= FLT_MAX)) return {i, DSO_MTP_BAD_TARGET};
    if (!(q > 0.0f && q <= FLT_MAX)) return {i, DSO_MTP_BAD_DRAFT};
    if (!(p.uniform[row * (p.in.drafts + 1) + i] * q < prob)) return {i, -1};
  }
  return {count, -1};
}

// 停下处目标的分布。
__device__ Weights target_at(const dso_mtp_verify_sample_params &p, int64_t row, int64_t at) {
  return {p.target.data,
          nullptr,
          row * p.target.rs + at * p.target.ps,
          0,
          p.target.dtype,
          p.target.dtype,
          p.in.vocab,
          -1};
}

// 不接受时的剩余：max(0, p - q)，或去掉草稿的 p。
__device__ Weights residual_at(const dso_mtp_verify_sample_params &p, int64_t row, int64_t at) {
  Weights w = target_at(p, row, at);
  if (p.one_hot) {
    w.without = p.in.draft[row * p.in.drafts + at];
  } else {
    w.q = p.proposal.data, w.q_dtype = p.proposal.dtype;
    w.q_at = row * p.proposal.rs + at * p.proposal.ps;
  }
  return w;
}

// sum [2, R, 块]：剩余的与目标的；全部接受时只有后者。
__global__ void __launch_bounds__(VOCAB_THREADS)
    sums_kernel(dso_mtp_verify_sample_params p, double *sum, int64_t chunks) {
  grid_release();
  grid_wait();
  int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  Stop stop = stop_of(p, row);
  if (stop.fault >= 0) return;
  bool rejected = stop.at < draft_count(p.in, row);
  double whole = chunk_sum(target_at(p, row, stop.at), chunk), rest = 0.0;
  if (rejected) rest = chunk_sum(residual_at(p, row, stop.at), chunk);
  if (threadIdx.x != 0) return;
  sum[row * chunks + chunk] = rest;
  sum[(p.in.rows + row) * chunks + chunk] = whole;
}

__global__ void __launch_bounds__(VOCAB_THREADS)
    sample_kernel(dso_mtp_verify_sample_params p, const double *sum, int64_t chunks) {
  grid_release();
  grid_wait();
  int64_t row = blockIdx.x, token = PICK_NOTHING;
  Stop stop = stop_of(p, row);
  if (stop.fault < 0) {
    double u = p.uniform[row * (p.in.drafts + 1) + p.in.drafts];
    if (stop.at < draft_count(p.in, row))
      token = pick(residual_at(p, row, stop.at), sum + row * chunks, u);
    // 剩余处处为 0 只出于舍入（p 与 q 相同时本应接受），改从 p 抽
    if (token == PICK_NOTHING)
      token = pick(target_at(p, row, stop.at), sum + (p.in.rows + row) * chunks, u);
    if (token < 0) stop.fault = DSO_MTP_BAD_TARGET;
  }
  if (threadIdx.x != 0) return;
  p.in.accepted[row] = stop.fault < 0 ? stop.at : stop.fault;
  p.in.next[row] = stop.fault < 0 ? token : -1 - stop.at;
}

}  // namespace

size_t dso_cuda_mtp_verify_greedy_scratch(const dso_mtp_rows *in) {
  return static_cast<size_t>(in->rows * (in->drafts + 1) * vocab_chunks(in->vocab)) * sizeof(Best);
}

cudaError_t dso_cuda_mtp_verify_greedy(const dso_mtp_verify_greedy_params *p, void *scratch,
                                       cudaStream_t stream) {
  if (p->in.rows == 0) return cudaSuccess;
  int64_t chunks = vocab_chunks(p->in.vocab);
  Best *found = static_cast<Best *>(scratch);
  dim3 grid(static_cast<unsigned>(p->in.rows * (p->in.drafts + 1) * chunks)), block(VOCAB_THREADS);
  cudaError_t error = wide_positions(p->logits, p->in.vocab)
                          ? launch(argmax_kernel<8>, grid, block, 0, stream, *p, found, chunks)
                          : launch(argmax_kernel<1>, grid, block, 0, stream, *p, found, chunks);
  if (error != cudaSuccess) return error;
  return launch(greedy_kernel, dim3(static_cast<unsigned>(p->in.rows)), dim3(WARP), 0, stream, *p,
                static_cast<const Best *>(found), chunks);
}

size_t dso_cuda_mtp_verify_sample_scratch(const dso_mtp_rows *in) {
  return static_cast<size_t>(2 * in->rows * vocab_chunks(in->vocab)) * sizeof(double);
}

cudaError_t dso_cuda_mtp_verify_sample(const dso_mtp_verify_sample_params *p, void *scratch,
                                       cudaStream_t stream) {
  if (p->in.rows == 0) return cudaSuccess;
  int64_t chunks = vocab_chunks(p->in.vocab);
  double *sum = static_cast<double *>(scratch);
  dim3 grid(static_cast<unsigned>(p->in.rows * chunks)), block(VOCAB_THREADS);
  cudaError_t error = launch(sums_kernel, grid, block, 0, stream, *p, sum, chunks);
  if (error != cudaSuccess) return error;
  return launch(sample_kernel, dim3(static_cast<unsigned>(p->in.rows)), block, 0, stream, *p,
                static_cast<const double *>(sum), chunks);
}
