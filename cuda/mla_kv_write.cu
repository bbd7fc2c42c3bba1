// 解码的一步：kv_a 投影的输出归一化、旋转、写进缓存，写出 spans，前移 offsets，旋转查询。blockIdx.y 为 0 的一块写一行
// （批里的），一个 warp 一个词元；同一行的位置只有这一块读，所以读完就可以前移。其余的块旋转查询，一个 warp 一个头。
#include <assert.h>

#include "mla_cache_row.cuh"

namespace {

using namespace dso;

constexpr int MOST_WARPS = 16;    // 一次 16 个词元：解码一步很少更多，多了就再走一轮
constexpr int LEAST_WARPS = 4;    // 词元少时旋转查询的块也不至于太小
constexpr int MOST_PAIRS = WARP;  // 旋转查询时一个线程至多一对；更宽的另排一个核

// 归一化之后的一行：各步的舍入同 rms_norm.cu。
template <int V>
struct NormedRow {
  StoredRow<V> row;
  const void *weight;
  dso_dtype weight_dtype;
  float scale;
  __device__ Vec<V> operator()(int64_t i) const {
    Vec<V> x = row(i), w = load<V>(weight, weight_dtype, i);
#pragma unroll
    for (int j = 0; j < V; j++)
      x.v[j] = round_to(row.dtype, round_to(row.dtype, x.v[j] * scale) * w.v[j]);
    return x;
  }
};

template <int V>
__device__ NormedRow<V> normed(const dso_cuda_mla_kv_write_params &k, int64_t b, int64_t t) {
  const dso_mla_cache_write_params &p = k.write;
  StoredRow<V> row{p.latent, p.latent_dtype, b * p.latent_bs + t * p.latent_ts};
  float sum = 0.0f;
  for (int64_t i = static_cast<int64_t>(threadIdx.x) * V; i < p.rank; i += WARP * V) {
    Vec<V> x = row(i);
#pragma unroll
    for (int j = 0; j < V; j++) sum += x.v[j] * x.v[j];
  }
  float scale = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(p.rank) + k.eps);
  return {row, k.norm, k.norm_dtype, scale};
}

// 旋转一个词元的键；一个线程一对。
__device__ void write_rope(const dso_cuda_mla_kv_write_params &k, int64_t b, int64_t t,
                           int64_t slot) {
  const dso_mla_cache_write_params &p = k.write;
  int64_t half = p.rope_dim / 2, from = b * p.rope_bs + t * p.rope_ts;
  int64_t to = b * p.rope_cache_bs + slot * p.rope_cache_ts, angle = b * k.cs_bs + t * k.cs_ts;
  for (int64_t i = threadIdx.x; i < half; i += WARP) {
    float x = load_one(p.rope, p.rope_dtype, from + (k.interleaved ? 2 * i : i));
    float y = load_one(p.rope, p.rope_dtype, from + (k.interleaved ? 2 * i + 1 : half + i));
    float c = k.cos[angle + i], s = k.sin[angle + i];
    store_one(p.rope_cache, p.rope_cache_dtype, to + i, round_to(p.rope_dtype, x * c - y * s));
    store_one(p.rope_cache, p.rope_cache_dtype, to + half + i,
              round_to(p.rope_dtype, y * c + x * s));
  }
}

// 就地旋转第 b 行的第 index 个（词元，头）；整个 warp 都读完才写。
__device__ void rotate_query(const dso_rope_params &p, int64_t b, int64_t index) {
  int64_t t = index / p.h, half = p.d / 2, i = threadIdx.x;
  int64_t at = b * p.x_bs + t * p.x_ts + index % p.h * p.x_hs, angle = b * p.cs_bs + t * p.cs_ts;
  float x = 0.0f, y = 0.0f;
  if (i < half) {
    x = load_one(p.x, p.dtype, at + (p.interleaved ? 2 * i : i));
    y = load_one(p.x, p.dtype, at + (p.interleaved ? 2 * i + 1 : half + i));
  }
  __syncwarp();
  if (i >= half) return;
  float c = p.cos[angle + i], s = p.sin[angle + i];
  store_one(p.y, p.dtype, at + i, x * c - y * s);
  store_one(p.y, p.dtype, at + half + i, y * c + x * s);
}

template <int V>
__global__ void mla_kv_write_kernel(dso_cuda_mla_kv_write_params k) {
  grid_release();
  grid_wait();
  const dso_mla_cache_write_params &p = k.write;
  if (blockIdx.y > 0) {
    int64_t index = static_cast<int64_t>(blockIdx.y - 1) * blockDim.y + threadIdx.y;
    if (index < k.queries.t * k.queries.h) rotate_query(k.queries, blockIdx.x, index);
    return;
  }
  int64_t b = blockIdx.x, start = p.offsets[b];
  __syncthreads();  // 各线程都读过了
  if (threadIdx.x == 0 && threadIdx.y == 0) {
    if (k.spans)
      k.spans[b] = {b * p.t, (b + 1) * p.t, b * k.capacity, b * k.capacity + start + p.t};
    if (k.advance) k.advance[b] = start + p.t;
  }
  for (int64_t t = threadIdx.y; t < p.t; t += blockDim.y) {
    int64_t slot = start + t;
    assert(slot >= 0 && slot < k.capacity);
    write_latent<V>(p, b, slot, normed<V>(k, b, t));
    write_rope(k, b, t, slot);
  }
}

}  // namespace

cudaError_t dso_cuda_mla_kv_write(const dso_cuda_mla_kv_write_params *p, cudaStream_t stream) {
  const dso_mla_cache_write_params &w = p->write;
  if (w.b * w.t == 0) return cudaSuccess;
  int64_t warps = w.t < LEAST_WARPS ? LEAST_WARPS : w.t < MOST_WARPS ? w.t : MOST_WARPS;
  int64_t turned = p->queries.x ? ceil_div(p->queries.t * p->queries.h, warps) : 0;
  if (p->queries.d / 2 > MOST_PAIRS) {
    cudaError_t error = dso_cuda_rope(&p->queries, stream);
    if (error != cudaSuccess) return error;
    turned = 0;
  }
  dim3 grid(static_cast<unsigned>(w.b), static_cast<unsigned>(1 + turned));
  dim3 block(WARP, static_cast<unsigned>(warps));
  if (wide_latent(w) && wide_ok(p->norm, p->norm_dtype, w.rank))
    return launch(mla_kv_write_kernel<8>, grid, block, 0, stream, *p);
  return launch(mla_kv_write_kernel<1>, grid, block, 0, stream, *p);
}
