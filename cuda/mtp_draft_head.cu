// mtp_draft_head：各行的草稿 argmax_v (W x + b)_v，约定同 csrc/mtp_draft_head.c；受限于读 W 的带宽。
//
//   score  一块 HEAD_TOKENS 个候选，各 warp 分 K：W 的行直接读进 mma 的片段，一个线程连续的 16 字节（8 个数）当作
//          两个 k16 的片段——点积与 k 的次序无关，x 按同样的次序读，所以不必经过共享内存重排；
//   choose 每行在各块的最大值里取最大的。
// 分数是 fp32，不写出。通用路径（fp32、混合类型、K 不是 8 的倍数）一个 warp 算一个候选，普通的乘加。
#include "dso_cuda.h"
#include "mma.cuh"
#include "vocab.cuh"

namespace {

using namespace dso;

constexpr int HEAD_THREADS = HEAD_WARPS * WARP;
constexpr int STEP = 32;  // 一个 warp 一次 32 个 k：4 个线程各 8 个

// 第 i 个候选是第几行权重；越界的是 -1。
__device__ int64_t candidate(const dso_mtp_draft_head_params &p, int64_t i) {
  int64_t token = p.vocabulary ? p.vocabulary[i] : i;
  return token >= 0 && token < p.vocab ? token : -1;
}

// 各行在这一块里最好的：一个 warp 看一行，score(第几个候选, 第几行) 是点积。
template <class F>
__device__ void keep_best(const dso_mtp_draft_head_params &p, Best *found, int64_t first_row,
                          int rows, F score) {
  int lane = static_cast<int>(threadIdx.x) % WARP;
  int64_t i = static_cast<int64_t>(blockIdx.x) * HEAD_TOKENS + lane;
  int64_t token = i < p.count ? candidate(p, i) : -1;
  for (int r = static_cast<int>(threadIdx.x) / WARP; r < rows && first_row + r < p.m;
       r += HEAD_WARPS) {
    Best best = 0;
    if (i < p.count) {
      float v = score(lane, r);
      if (p.bias && token >= 0) v += load_one(p.bias, p.weight.dtype, token);
      best = best_of(token >= 0 ? v : NAN, i);
    }
    best = warp_reduce(best, MaxOp());
    if (lane == 0) found[(first_row + r) * gridDim.x + blockIdx.x] = best;
  }
}

static_assert(HEAD_TOKENS == WARP, "一个线程一个候选");

__device__ Words<4> load_or_zero(const uint16_t *row, int64_t k, int64_t end) {
  return row && k < end ? *reinterpret_cast<const Words<4> *>(row + k) : Words<4>{};
}

template <class T, int ROWS>
__global__ void __launch_bounds__(HEAD_THREADS)
    head_kernel(dso_mtp_draft_head_params p, Best *found) {
  constexpr int N = ROWS / 8, PAD = HEAD_TOKENS + 1;
  __shared__ float part[HEAD_WARPS][ROWS * PAD];  // [行][候选]
  grid_wait();
  int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  int64_t first_row = static_cast<int64_t>(blockIdx.y) * ROWS;
  const uint16_t *w[4], *x[N];  // w：候选 8 j + lane / 4
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int64_t i = static_cast<int64_t>(blockIdx.x) * HEAD_TOKENS + 8 * j + lane / 4;
    int64_t token = i < p.count ? candidate(p, i) : -1;
    w[j] = token < 0 ? nullptr : static_cast<const uint16_t *>(p.weight.data) + token * p.weight.rs;
  }
#pragma unroll
  for (int n = 0; n < N; n++) {
    int64_t row = first_row + 8 * n + lane / 4;
    x[n] = row < p.m ? static_cast<const uint16_t *>(p.x.data) + row * p.x.rs : nullptr;
  }
  float acc[2][N][4] = {};
#pragma unroll 2
  for (int64_t k = warp * STEP + lane % 4 * 8; k < p.k + lane % 4 * 8; k += HEAD_WARPS * STEP) {
    Words<4> a[4];
#pragma unroll
    for (int j = 0; j < 4; j++) a[j] = load_or_zero(w[j], k, p.k);
#pragma unroll
    for (int n = 0; n < N; n++) {
      Words<4> b = load_or_zero(x[n], k, p.k);
#pragma unroll
      for (int m = 0; m < 2; m++) mma_rows<T>(acc[m][n], a[2 * m], a[2 * m + 1], b);
    }
  }
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int token = 16 * m + fragment_row() + 8 * (i / 2), row = 8 * n + fragment_column() + i % 2;
        part[warp][row * PAD + token] = acc[m][n][i];
      }
  __syncthreads();
  keep_best(p, found, first_row, ROWS, [&](int token, int row) {
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < HEAD_WARPS; other++) sum += part[other][row * PAD + token];
    return sum;
  });
}

__global__ void __launch_bounds__(HEAD_THREADS)
    generic_kernel(dso_mtp_draft_head_params p, Best *found) {
  __shared__ float score[HEAD_TOKENS][HEAD_ROWS];
  grid_wait();
  int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
  int64_t first_row = static_cast<int64_t>(blockIdx.y) * HEAD_ROWS;
  int rows = static_cast<int>(p.m - first_row < HEAD_ROWS ? p.m - first_row : HEAD_ROWS);
  for (int j = warp; j < HEAD_TOKENS; j += HEAD_WARPS) {
    int64_t i = static_cast<int64_t>(blockIdx.x) * HEAD_TOKENS + j;
    int64_t token = i < p.count ? candidate(p, i) : -1;
    float sum[HEAD_ROWS] = {};
    for (int64_t k = lane; token >= 0 && k < p.k; k += WARP) {
      float w = load_one(p.weight.data, p.weight.dtype, token * p.weight.rs + k);
#pragma unroll
      for (int r = 0; r < HEAD_ROWS; r++)
        if (r < rows) sum[r] += w * load_one(p.x.data, p.x.dtype, (first_row + r) * p.x.rs + k);
    }
#pragma unroll
    for (int r = 0; r < HEAD_ROWS; r++) {
      float whole = warp_sum(sum[r]);
      if (lane == 0) score[j][r] = whole;
    }
  }
  __syncthreads();
  keep_best(p, found, first_row, HEAD_ROWS, [&](int token, int row) { return score[token][row]; });
}

__global__ void __launch_bounds__(VOCAB_THREADS)
    choose_kernel(dso_mtp_draft_head_params p, const Best *found, int64_t parts) {
  grid_release();
  grid_wait();
  int64_t row = blockIdx.x;
  Best best = 0;
  for (int64_t i = threadIdx.x; i < parts; i += VOCAB_THREADS)
    best = MaxOp()(best, found[row * parts + i]);
  best = block_reduce(best, MaxOp());
  if (threadIdx.x == 0) p.token[row] = best_is_nan(best) ? -1 : candidate(p, best_index(best));
}

int64_t parts_of(const dso_mtp_draft_head_params *p) { return ceil_div(p->count, HEAD_TOKENS); }

bool can_multiply(const dso_mtp_draft_head_params *p) {
  return p->x.dtype == p->weight.dtype && p->x.dtype != DSO_F32 && p->k % 8 == 0 &&
         wide_ok(p->x.data, p->x.dtype, p->x.rs) &&
         wide_ok(p->weight.data, p->weight.dtype, p->weight.rs);
}

template <class T>
cudaError_t multiply(const dso_mtp_draft_head_params *p, Best *found, cudaStream_t stream) {
  unsigned parts = static_cast<unsigned>(parts_of(p));
  if (p->m <= HEAD_ROWS)
    return launch((head_kernel<T, HEAD_ROWS>), dim3(parts), dim3(HEAD_THREADS), 0, stream, *p,
                  found);
  dim3 grid(parts, static_cast<unsigned>(ceil_div(p->m, HEAD_MANY_ROWS)));
  return launch((head_kernel<T, HEAD_MANY_ROWS>), grid, dim3(HEAD_THREADS), 0, stream, *p, found);
}

}  // namespace

size_t dso_cuda_mtp_draft_head_scratch(const dso_mtp_draft_head_params *p) {
  return static_cast<size_t>(p->m * parts_of(p)) * sizeof(Best);
}

cudaError_t dso_cuda_mtp_draft_head(const dso_mtp_draft_head_params *p, void *scratch,
                                    cudaStream_t stream) {
  if (p->m == 0) return cudaSuccess;
  Best *found = static_cast<Best *>(scratch);
  int64_t parts = parts_of(p);
  cudaError_t error = cudaSuccess;
  if (can_multiply(p)) {
    error =
        p->x.dtype == DSO_BF16 ? multiply<Bf16>(p, found, stream) : multiply<F16>(p, found, stream);
  } else {
    dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(ceil_div(p->m, HEAD_ROWS)));
    error = launch(generic_kernel, grid, dim3(HEAD_THREADS), 0, stream, *p, found);
  }
  if (error != cudaSuccess) return error;
  return launch(choose_kernel, dim3(static_cast<unsigned>(p->m)), dim3(VOCAB_THREADS), 0, stream,
                *p, static_cast<const Best *>(found), parts);
}
