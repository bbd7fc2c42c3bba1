// sample_tokens：每行按概率抽一个词元，约定同 csrc/sample_tokens.c。
#include "dso_cuda.h"
#include "sample_pick.cuh"

namespace {

using namespace dso;

__device__ Weights weights_of(const dso_sample_tokens_params &p, int64_t row) {
  return {p.probs.data, nullptr, row * p.probs.rs, 0, p.probs.dtype, p.probs.dtype, p.vocab, -1};
}

__global__ void __launch_bounds__(VOCAB_THREADS)
    sum_kernel(dso_sample_tokens_params p, double *sum, int64_t chunks) {
  grid_release();
  grid_wait();
  int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  double total = chunk_sum(weights_of(p, row), chunk);
  if (threadIdx.x == 0) sum[row * chunks + chunk] = total;
}

__global__ void __launch_bounds__(VOCAB_THREADS)
    pick_kernel(dso_sample_tokens_params p, const double *sum, int64_t chunks) {
  grid_release();
  grid_wait();
  int64_t row = blockIdx.x;
  int64_t token = pick(weights_of(p, row), sum + row * chunks, p.uniform[row]);
  if (threadIdx.x == 0) p.token[row] = token;
}

}  // namespace

size_t dso_cuda_sample_tokens_scratch(const dso_sample_tokens_params *p) {
  return static_cast<size_t>(p->rows * vocab_chunks(p->vocab)) * sizeof(double);
}

cudaError_t dso_cuda_sample_tokens(const dso_sample_tokens_params *p, void *scratch,
                                   cudaStream_t stream) {
  if (p->rows == 0) return cudaSuccess;
  int64_t chunks = vocab_chunks(p->vocab);
  double *sum = static_cast<double *>(scratch);
  dim3 grid(static_cast<unsigned>(p->rows * chunks));
  cudaError_t error = launch(sum_kernel, grid, dim3(VOCAB_THREADS), 0, stream, *p, sum, chunks);
  if (error != cudaSuccess) return error;
  dim3 rows(static_cast<unsigned>(p->rows));
  return launch(pick_kernel, rows, dim3(VOCAB_THREADS), 0, stream, *p,
                static_cast<const double *>(sum), chunks);
}
