// 展开式注意力的反向：delta，与选路径。K、V 按头分组重新展开，概率由前向的 lse 重算。
//
// 三个核：delta = 逐行 Σ dO · O；dq 一块查询，逐块键累加；dkv 一块槽位，逐块查询累加（mla_prefill_backward_{mma,general}.cu，
// Hopper 是 mla_prefill_backward_{dkv,dq}_sm90.cu）。分成两个核而不是用原子加：多算一遍得分，换来逐位确定、而且没有 fp32
// 的 dq 中间张量。同一行的几个 span 的键可以重叠：dkv 的一块依次看这一行的每个 span。
#include "mla_prefill.cuh"

namespace {

using namespace dso;

using Params = dso_cuda_mla_prefill_backward_params;

// ---- delta：8 个线程一行，一次各读 V 个 ----

constexpr int DELTA_LANES = 8, DELTA_THREADS = 256, DELTA_ROWS = DELTA_THREADS / DELTA_LANES;

template <int V>
__global__ void mla_backward_delta(Params p) {
  grid_wait();
  const dso_mla_inputs &in = p.in.in;
  int64_t row = static_cast<int64_t>(blockIdx.x) * DELTA_ROWS + threadIdx.x / DELTA_LANES;
  bool real = row < in.b * in.t * in.heads;
  float sum = 0.0f;
  for (int64_t c = threadIdx.x % DELTA_LANES * V; real && c < in.v_dim; c += DELTA_LANES * V) {
    Vec<V> x = load<V>(p.grad, in.q_dtype, row * in.v_dim + c),
           y = load<V>(p.in.out, in.q_dtype, row * in.v_dim + c);
#pragma unroll
    for (int i = 0; i < V; i++) sum += x.v[i] * y.v[i];
  }
#pragma unroll
  for (int step = DELTA_LANES / 2; step > 0; step /= 2)
    sum += __shfl_xor_sync(ALL_LANES, sum, step);
  if (real && threadIdx.x % DELTA_LANES == 0) p.delta[row] = sum;
}

}  // namespace

cudaError_t dso_cuda_mla_backward_delta(const Params *p, cudaStream_t stream) {
  int64_t rows = p->in.in.b * p->in.in.t * p->in.in.heads;
  if (rows == 0) return cudaSuccess;
  dim3 grid(static_cast<unsigned>(ceil_div(rows, DELTA_ROWS)));
  const dso_mla_inputs &in = p->in.in;
  bool wide = wide_ok(p->grad, in.q_dtype, in.v_dim) && wide_ok(p->in.out, in.q_dtype, in.v_dim);
  return wide ? launch(mla_backward_delta<8>, grid, dim3(DELTA_THREADS), 0, stream, *p)
              : launch(mla_backward_delta<1>, grid, dim3(DELTA_THREADS), 0, stream, *p);
}

int dso_cuda_mla_prefill_backward_shared(const dso_mla_inputs *in, dso_dtype dtype) {
  int bytes = backward_general_bytes(*in);
  Params p{};
  p.in.in = *in, p.in.dtype = dtype;
  if (dtype != DSO_F32) run_backward_mma(p, {dim3(), dim3(), nullptr, &bytes, 0});
  return bytes;
}

cudaError_t dso_cuda_mla_prefill_backward(const Params *p, cudaStream_t stream) {
  const dso_mla_inputs &in = p->in.in;
  if (in.b * in.s == 0 || p->in.heads == 0) return cudaSuccess;
  bool mma = p->in.dtype != DSO_F32;
  int64_t tile = mma ? BACKWARD_TILE : GENERAL_ROWS;
  auto heads = static_cast<unsigned>(p->in.heads);
  BackwardLaunch to{dim3(static_cast<unsigned>(in.b * ceil_div(in.s, tile)), heads),
                    dim3(static_cast<unsigned>(ceil_div(in.b * in.t, tile) + in.n_spans), heads),
                    stream, nullptr, 0};
  if (!mma) return run_backward_general(*p, to);
  Device device;
  cudaError_t error = device_of(&device);
  if (error != cudaSuccess) return error;
  if (prefill_sm90_fits(in, device)) {
    error = run_backward_dkv_sm90(*p, stream);
    return error == cudaSuccess ? run_backward_dq_sm90(*p, stream) : error;
  }
  to.shared_limit = device.shared_limit;
  return run_backward_mma(*p, to);
}
