// 解码的一步：kv_a 投影的输出归一化、旋转、写进缓存，写出 spans，前移 offsets，旋转查询。blockIdx.y 为 0 的一块写一行
// （批里的），一个 warp 一个词元；同一行的位置只有这一块读，所以读完就可以前移。其余的块旋转查询，一个 warp 一个头。
#include <assert.h>

#include "mla_cache_row.cuh"
#include "rms_norm.cuh"

namespace {

using namespace dso;

constexpr int MOST_WARPS = 16;          // 一次 16 个词元：解码一步很少更多，多了就再走一轮
constexpr int LEAST_WARPS = 4;          // 词元少时旋转查询的块也不至于太小
constexpr int MOST_PAIRS = WARP;        // 旋转查询时一个线程至多一对；更宽的另排一个核
constexpr int64_t MOST_TURNED = 65534;  // 网格的 y 至多 65535
constexpr int KEPT = 2;  // 一个词元的潜变量留在寄存器里：一个线程 2 个 8，至多 512 个

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

// 第 i 对的第 which 个数的位置：pairs 为成对排列，否则前后两半。
__device__ int64_t pair_at(int pairs, int64_t half, int64_t i, int which) {
  return pairs ? 2 * i + which : i + which * half;
}

// 旋转一个词元的键；一个线程一对。
__device__ void write_rope(const dso_cuda_mla_kv_write_params &k, int64_t b, int64_t t,
                           int64_t slot) {
  const dso_mla_cache_write_params &p = k.write;
  int64_t half = p.rope_dim / 2, from = b * p.rope_bs + t * p.rope_ts;
  int64_t to = b * p.rope_cache_bs + slot * p.rope_cache_ts, angle = b * k.cs_bs + t * k.cs_ts;
  for (int64_t i = threadIdx.x; i < half; i += WARP) {
    float x = load_one(p.rope, p.rope_dtype, from + pair_at(k.interleaved, half, i, 0));
    float y = load_one(p.rope, p.rope_dtype, from + pair_at(k.interleaved, half, i, 1));
    float c = k.cos[angle + i], s = k.sin[angle + i];
    store_one(p.rope_cache, p.rope_cache_dtype, to + pair_at(k.keep_pairs, half, i, 0),
              round_to(p.rope_dtype, x * c - y * s));
    store_one(p.rope_cache, p.rope_cache_dtype, to + pair_at(k.keep_pairs, half, i, 1),
              round_to(p.rope_dtype, y * c + x * s));
  }
}

// 写出 spans，前移 offsets。一行只有一块管，读完（屏障之后）就可以写。
__device__ void advance(const dso_cuda_mla_kv_write_params &k, int64_t b, int64_t start) {
  const dso_mla_cache_write_params &p = k.write;
  __syncthreads();  // 各线程都读过了
  if (threadIdx.x != 0 || threadIdx.y != 0) return;
  if (k.spans) k.spans[b] = {b * p.t, (b + 1) * p.t, b * k.capacity, b * k.capacity + start + p.t};
  if (k.advance) k.advance[b] = start + p.t;
}

// 就地旋转第 b 行的第 index 个（词元，头）；整个 warp 都读完才写。
__device__ void rotate_query(const dso_rope_params &p, dso_dtype dtype, int64_t b, int index) {
  int heads = static_cast<int>(p.h), t = index / heads, half = static_cast<int>(p.d) / 2;
  int i = static_cast<int>(threadIdx.x);
  int64_t at = b * p.x_bs + t * p.x_ts + (index - t * heads) * p.x_hs;
  int64_t angle = b * p.cs_bs + t * p.cs_ts;
  float x = 0.0f, y = 0.0f, c = 0.0f, s = 0.0f;
  if (i < half) {
    x = load_one(p.x, dtype, at + pair_at(p.interleaved, half, i, 0));
    y = load_one(p.x, dtype, at + pair_at(p.interleaved, half, i, 1));
    c = p.cos[angle + i], s = p.sin[angle + i];
  }
  __syncwarp();
  if (i >= half) return;
  store_one(p.y, dtype, at + pair_at(p.keep_pairs, half, i, 0), x * c - y * s);
  store_one(p.y, dtype, at + pair_at(p.keep_pairs, half, i, 1), y * c + x * s);
}

// blockIdx.y 大于 0 的块旋转查询，极多时轮着做；返回是不是。
__device__ bool rotates(const dso_cuda_mla_kv_write_params &k, dso_dtype dtype) {
  if (blockIdx.y == 0) return false;
  const int count = static_cast<int>(k.queries.t * k.queries.h);
  const int step = static_cast<int>((gridDim.y - 1) * blockDim.y);
  for (int i = static_cast<int>((blockIdx.y - 1) * blockDim.y + threadIdx.y); i < count; i += step)
    rotate_query(k.queries, dtype, blockIdx.x, i);
  return true;
}

template <int V>
__global__ void mla_kv_write_kernel(dso_cuda_mla_kv_write_params k) {
  grid_release();
  grid_wait();
  const dso_mla_cache_write_params &p = k.write;
  if (rotates(k, k.queries.dtype)) return;
  int64_t b = blockIdx.x, start = p.offsets[b];
  advance(k, b, start);
  for (int64_t t = threadIdx.y; t < p.t; t += blockDim.y) {
    int64_t slot = start + t;
    assert(slot >= 0 && slot < k.capacity);
    write_latent<V>(p, b, slot, normed<V>(k, b, t));
    write_rope(k, b, t, slot);
  }
}

// ---- 16 位的、一行留得下的：同样的结果，一个词元要读的一次都发出去 ----

template <dso_dtype D>
struct Token {
  Words<4> row[KEPT], weight[KEPT];
  float x, y, c, s;  // 旋转的键里一个线程的一对

  __device__ void read(const dso_cuda_mla_kv_write_params &k, int64_t b, int64_t t) {
    const dso_mla_cache_write_params &p = k.write;
    const int lane = static_cast<int>(threadIdx.x), rank = static_cast<int>(p.rank);
    const int half = static_cast<int>(p.rope_dim) / 2;
    const int64_t at = b * p.latent_bs + t * p.latent_ts;
#pragma unroll
    for (int n = 0; n < KEPT; n++) {
      const int i = (n * WARP + lane) * 8;
      row[n] = {}, weight[n] = {};
      load_once(row[n], chunk(p.latent, at + i), i < rank);
      load_once(weight[n], chunk(k.norm, i), i < rank);
    }
    x = y = c = s = 0.0f;
    if (lane >= half) return;
    const int64_t from = b * p.rope_bs + t * p.rope_ts, angle = b * k.cs_bs + t * k.cs_ts;
    x = load_one(p.rope, D, from + pair_at(k.interleaved, half, lane, 0));
    y = load_one(p.rope, D, from + pair_at(k.interleaved, half, lane, 1));
    c = k.cos[angle + lane], s = k.sin[angle + lane];
  }

  // 归一化之后的一行；各步的舍入同 NormedRow。
  __device__ void normalize(const dso_cuda_mla_kv_write_params &k, Vec<8> (&to)[KEPT]) const {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < KEPT; n++) {
      to[n] = unpack<D>(row[n]);
#pragma unroll
      for (int j = 0; j < 8; j++) sum += to[n].v[j] * to[n].v[j];
    }
    float scale = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(k.write.rank) + k.eps);
#pragma unroll
    for (int n = 0; n < KEPT; n++) {
      to[n] = scaled<8>(to[n], scale, D, unpack<D>(weight[n]));
#pragma unroll
      for (int j = 0; j < 8; j++) to[n].v[j] = round_to(D, to[n].v[j]);
    }
  }

  __device__ void write(const dso_cuda_mla_kv_write_params &k, int64_t b, int64_t slot) const {
    const dso_mla_cache_write_params &p = k.write;
    const int lane = static_cast<int>(threadIdx.x), rank = static_cast<int>(p.rank);
    const int half = static_cast<int>(p.rope_dim) / 2;
    if (lane < half) {
      int64_t to = b * p.rope_cache_bs + slot * p.rope_cache_ts;
      store_one(p.rope_cache, p.rope_cache_dtype, to + pair_at(k.keep_pairs, half, lane, 0),
                round_to(D, x * c - y * s));
      store_one(p.rope_cache, p.rope_cache_dtype, to + pair_at(k.keep_pairs, half, lane, 1),
                round_to(D, y * c + x * s));
    }
    Vec<8> latent[KEPT];
    normalize(k, latent);
    const bool codes = quantized(p.latent_cache_dtype);
    float scale = 0.0f;
    if (codes) {
      float amax = 0.0f;
#pragma unroll
      for (int n = 0; n < KEPT; n++) amax = most_of(amax, latent[n]);
      scale = start_codes(p, amax, p.scale_cache + b * p.scale_cache_bs + slot);
    }
    int64_t to = b * p.latent_cache_bs + slot * p.latent_cache_ts;
#pragma unroll
    for (int n = 0; n < KEPT; n++) {
      const int i = (n * WARP + lane) * 8;
      if (i >= rank) continue;
      if (codes)
        store_codes(p, to + i, latent[n], scale);
      else
        store<8>(p.latent_cache, p.latent_cache_dtype, to + i, latent[n]);
    }
  }
};

template <dso_dtype D>
__global__ void mla_kv_write_kept(dso_cuda_mla_kv_write_params k) {
  grid_release();
  const dso_mla_cache_write_params &p = k.write;
  if (blockIdx.x + blockIdx.y + threadIdx.x + threadIdx.y == 0)
    prefetch_l2(k.norm, static_cast<uint32_t>(p.rank * 2));
  grid_wait();
  if (rotates(k, D)) return;
  int64_t b = blockIdx.x, start = p.offsets[b], t = threadIdx.y;
  Token<D> token;
  if (t < p.t) token.read(k, b, t);
  advance(k, b, start);
  while (t < p.t) {
    assert(start + t >= 0 && start + t < k.capacity);
    token.write(k, b, start + t);
    t += blockDim.y;
    if (t < p.t) token.read(k, b, t);
  }
}

__global__ void mla_kv_rewind_kernel(int64_t *offsets, int64_t b, int64_t t) {
  grid_wait();
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < b) offsets[i] -= t;
}

bool keeps(const dso_cuda_mla_kv_write_params &k, bool turns) {
  const dso_mla_cache_write_params &p = k.write;
  return bytes_of(p.latent_dtype) == 2 && k.norm_dtype == p.latent_dtype &&
         p.rope_dtype == p.latent_dtype && p.rank <= KEPT * WARP * 8 && p.rope_dim / 2 <= WARP &&
         (!turns || k.queries.dtype == p.latent_dtype);
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
  if (turned > MOST_TURNED) turned = MOST_TURNED;
  dim3 grid(static_cast<unsigned>(w.b), static_cast<unsigned>(1 + turned));
  dim3 block(WARP, static_cast<unsigned>(warps));
  bool wide = wide_latent(w) && wide_ok(p->norm, p->norm_dtype, w.rank);
  if (wide && keeps(*p, turned > 0))
    return launch(
        w.latent_dtype == DSO_BF16 ? mla_kv_write_kept<DSO_BF16> : mla_kv_write_kept<DSO_F16>, grid,
        block, 0, stream, *p);
  if (wide) return launch(mla_kv_write_kernel<8>, grid, block, 0, stream, *p);
  return launch(mla_kv_write_kernel<1>, grid, block, 0, stream, *p);
}

cudaError_t dso_cuda_mla_kv_rewind(int64_t *offsets, int64_t b, int64_t t, cudaStream_t stream) {
  if (b == 0) return cudaSuccess;
  dim3 grid(static_cast<unsigned>(ceil_div(b, WARP))), block(WARP);
  return launch(mla_kv_rewind_kernel, grid, block, 0, stream, offsets, b, t);
}
