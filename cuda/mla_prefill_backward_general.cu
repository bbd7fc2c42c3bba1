// 展开式注意力的反向，通用路径：fp32，任何维度；一个 warp 一行（查询或键），另一边每个线程一个。
#include "mla_prefill.cuh"

namespace {

using namespace dso;

using Params = dso_cuda_mla_prefill_backward_params;

struct GeneralLayout {
  int qk, dv, other, stride, own_qk, own_dv, a, b, p, d, out_qk, out_dv, bytes;
  __host__ __device__ explicit GeneralLayout(const dso_mla_inputs &in) {
    qk = static_cast<int>(in.nope_dim + in.rope_dim), dv = static_cast<int>(in.v_dim);
    stride = (qk + dv) | 1;  // 另一边的一行：qk 个之后 dv 个
    own_qk = 0, own_dv = own_qk + GENERAL_ROWS * qk;
    other = own_dv + GENERAL_ROWS * dv;
    p = other + GENERAL_KEYS * stride, d = p + GENERAL_ROWS * GENERAL_KEYS;
    a = d + GENERAL_ROWS * GENERAL_KEYS, b = a + GENERAL_KEYS;
    out_qk = b + GENERAL_KEYS, out_dv = out_qk + GENERAL_ROWS * qk;
    bytes = (out_dv + GENERAL_ROWS * dv) * 4;
  }
};

// 一行查询：q 与 dO，[qk + dv]。
__device__ float query_element(const Params &p, const Place &at, int query, int head, int c,
                               int qk) {
  const dso_mla_inputs &in = p.in.in;
  int64_t token = at.q_begin + query, full = p.in.first_head + head;
  if (c < qk) return load_one(in.q, in.q_dtype, query_at(in, token, full) + c);
  return load_one(p.grad, in.q_dtype, (token * in.heads + full) * in.v_dim + c - qk);
}

// 一行键：K、旋转部分、V，[qk + dv]。
__device__ float key_element(const Params &p, int row, int slot, int head, int c, int qk) {
  const dso_mla_inputs &in = p.in.in;
  int nope = static_cast<int>(in.nope_dim);
  const auto *kv = static_cast<const float *>(p.in.kv) + expanded_at(p.in, row, slot, head);
  if (c < nope) return kv[c];
  if (c >= qk) return kv[nope + c - qk];
  return load_one(in.rope, in.rope_dtype,
                  slot_at(in, row, slot, in.rope_bs, in.rope_ts) + c - nope);
}

// P 与 dS：x、y 是一行查询与一行键。
__device__ void pair_terms(const Params &p, const float *query, const float *query_grad,
                           const float *key, const float *value, int qk, int dv, float lse,
                           float delta, bool seen, float *prob, float *ds) {
  *prob = *ds = 0.0f;
  if (!seen) return;
  float s = 0.0f, dp = 0.0f, scale = p.in.in.softmax_scale;
  for (int c = 0; c < qk; c++) s += query[c] * key[c];
  for (int c = 0; c < dv; c++) dp += query_grad[c] * value[c];
  *prob = fast_exp2((s * scale - finite_max(lse)) * LOG2_E);
  *ds = *prob * (dp - delta) * scale;
}

__device__ bool key_seen(const dso_mla_inputs &in, const Place &at, int query, int key) {
  return query < at.q_len && key >= 0 && key < visible_keys(in, at, query) &&
         slot_seen(in, at, at.slot + key);
}

__global__ __launch_bounds__(GENERAL_THREADS, 2) void mla_backward_dq_general(Params p) {
  grid_wait();
  const dso_mla_inputs &in = p.in.in;
  Place at;
  int first;
  if (!find_tile(in, GENERAL_ROWS, gridDim.x - 1 - blockIdx.x, &at, &first)) return;
  GeneralLayout to(in);
  auto *shared = reinterpret_cast<float *>(dynamic_shared());
  int row = static_cast<int>(threadIdx.x) / WARP, lane = static_cast<int>(threadIdx.x) % WARP;
  int head = static_cast<int>(blockIdx.y), query = first + row;
  bool real = query < at.q_len;
  float *q = shared + to.own_qk + row * to.qk, *g = shared + to.own_dv + row * to.dv;
  float *ds = shared + to.d + row * GENERAL_KEYS, *dq = shared + to.out_qk + row * to.qk;
  for (int c = lane; c < to.qk; c += WARP)
    q[c] = real ? query_element(p, at, query, head, c, to.qk) : 0.0f, dq[c] = 0.0f;
  for (int c = lane; c < to.dv; c += WARP)
    g[c] = real ? query_element(p, at, query, head, to.qk + c, to.qk) : 0.0f;
  int64_t flat = (at.q_begin + query) * in.heads + p.in.first_head + head;
  float lse = real ? p.in.lse[flat] : 0.0f, delta = real ? p.delta[flat] : 0.0f;
  int last = first + GENERAL_ROWS < at.q_len ? first + GENERAL_ROWS : at.q_len;
  int end = visible_keys(in, at, last - 1), width = to.qk + to.dv;
  for (int begin = 0; begin < end; begin += GENERAL_KEYS) {
    for (int i = static_cast<int>(threadIdx.x); i < GENERAL_KEYS * width; i += GENERAL_THREADS) {
      int key = begin + i / width, c = i % width;
      bool seen = key < at.kv_len && slot_seen(in, at, at.slot + key);
      shared[to.other + i / width * to.stride + c] =
          seen ? key_element(p, at.row, at.slot + key, head, c, to.qk) : 0.0f;
    }
    __syncthreads();
    const float *key = shared + to.other + lane * to.stride;
    float prob;
    pair_terms(p, q, g, key, key + to.qk, to.qk, to.dv, lse, delta,
               key_seen(in, at, query, begin + lane), &prob, ds + lane);
    __syncwarp();
    for (int c = lane; c < to.qk; c += WARP) {
      float sum = 0.0f;
      for (int j = 0; j < GENERAL_KEYS; j++) sum += ds[j] * shared[to.other + j * to.stride + c];
      dq[c] += sum;
    }
    __syncthreads();
  }
  if (!real) return;
  for (int c = lane; c < to.qk; c += WARP) store_one(p.dq, in.q_dtype, flat * to.qk + c, dq[c]);
}

__global__ __launch_bounds__(GENERAL_THREADS, 2) void mla_backward_dkv_general(Params p) {
  grid_wait();
  const dso_mla_inputs &in = p.in.in;
  GeneralLayout to(in);
  auto *shared = reinterpret_cast<float *>(dynamic_shared());
  int lane = static_cast<int>(threadIdx.x) % WARP, own = static_cast<int>(threadIdx.x) / WARP;
  int head = static_cast<int>(blockIdx.y), nope = static_cast<int>(in.nope_dim);
  int tiles = static_cast<int>((in.s + GENERAL_ROWS - 1) / GENERAL_ROWS);
  int row = static_cast<int>(blockIdx.x) / tiles;
  int first = static_cast<int>(blockIdx.x) % tiles * GENERAL_ROWS, slot = first + own;
  float *k = shared + to.own_qk + own * to.qk, *v = shared + to.own_dv + own * to.dv;
  float *prob = shared + to.p + own * GENERAL_KEYS, *ds = shared + to.d + own * GENERAL_KEYS;
  float *dk = shared + to.out_qk + own * to.qk, *dv = shared + to.out_dv + own * to.dv;
  bool usable = slot < in.s && slot_seen(in, row, slot);
  for (int c = lane; c < to.qk; c += WARP) dk[c] = 0.0f;
  for (int c = lane; c < to.dv; c += WARP) dv[c] = 0.0f;
  int width = to.qk + to.dv;
  for (int64_t i = 0; i < in.n_spans; i++) {
    Place at = locate(in, i);
    int end = at.slot + at.kv_len;
    if (at.row != row || at.q_len == 0 || first + GENERAL_ROWS <= at.slot || first >= end) continue;
    bool inside = usable && slot >= at.slot && slot < end;
    for (int c = lane; c < to.qk; c += WARP)
      k[c] = inside ? key_element(p, row, slot, head, c, to.qk) : 0.0f;
    for (int c = lane; c < to.dv; c += WARP)
      v[c] = inside ? key_element(p, row, slot, head, to.qk + c, to.qk) : 0.0f;
    int from = in.causal ? first - at.slot - (at.kv_len - at.q_len) : 0;
    for (int begin = from > 0 ? from : 0; begin < at.q_len; begin += GENERAL_KEYS) {
      __syncthreads();
      for (int n = static_cast<int>(threadIdx.x); n < GENERAL_KEYS * width; n += GENERAL_THREADS) {
        int query = begin + n / width;
        shared[to.other + n / width * to.stride + n % width] =
            query < at.q_len ? query_element(p, at, query, head, n % width, to.qk) : 0.0f;
      }
      if (own == 0) {
        bool real = begin + lane < at.q_len;
        int64_t flat = (at.q_begin + begin + lane) * in.heads + p.in.first_head + head;
        shared[to.a + lane] = real ? p.in.lse[flat] : 0.0f;
        shared[to.b + lane] = real ? p.delta[flat] : 0.0f;
      }
      __syncthreads();
      const float *query = shared + to.other + lane * to.stride;
      bool seen = inside && key_seen(in, at, begin + lane, slot - at.slot);
      pair_terms(p, query, query + to.qk, k, v, to.qk, to.dv, shared[to.a + lane],
                 shared[to.b + lane], seen, prob + lane, ds + lane);
      __syncwarp();
      for (int c = lane; c < width; c += WARP) {
        const float *weight = c < to.qk ? ds : prob;
        float sum = 0.0f;
        for (int j = 0; j < GENERAL_KEYS; j++)
          sum += weight[j] * shared[to.other + j * to.stride + c];
        (c < to.qk ? dk[c] : dv[c - to.qk]) += sum;
      }
      __syncwarp();
    }
    __syncthreads();
  }
  if (slot >= in.s) return;
  auto *dkv = static_cast<float *>(p.dkv) + expanded_at(p.in, row, slot, head);
  float *drope = p.drope + ((row * in.s + slot) * p.in.heads + head) * in.rope_dim;
  for (int c = lane; c < to.qk; c += WARP) (c < nope ? dkv[c] : drope[c - nope]) = dk[c];
  for (int c = lane; c < to.dv; c += WARP) dkv[nope + c] = dv[c];
}

}  // namespace

int dso::backward_general_bytes(const dso_mla_inputs &in) { return GeneralLayout(in).bytes; }

cudaError_t dso::run_backward_general(const Params &p, const BackwardLaunch &to) {
  auto bytes = static_cast<size_t>(GeneralLayout(p.in.in).bytes);
  cudaError_t error =
      launch(mla_backward_dkv_general, to.dkv, dim3(GENERAL_THREADS), bytes, to.stream, p);
  if (error != cudaSuccess) return error;
  return launch(mla_backward_dq_general, to.dq, dim3(GENERAL_THREADS), bytes, to.stream, p);
}
