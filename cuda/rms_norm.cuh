// 逐行归一化的核共用（rms_norm、mtp_input、mla_kv_write）：一行分给几个线程、怎样归约。
#pragma once

#include "vec.cuh"

namespace dso {

constexpr int ROW_THREADS = 256;     // 长行：一个线程块一行，8 个 warp 足够藏住访存延迟
constexpr int64_t SHORT_ROW = 1024;  // 这么短的行一个 warp 一行，不必跨 warp 归约

// 一行的 N 个部分和：warp 内洗牌，再（一块一行时）经共享内存跨 warp，次序固定。
template <int N>
__device__ void row_sum(float (&sum)[N]) {
  __shared__ float partial[N][ROW_THREADS / WARP];
#pragma unroll
  for (int n = 0; n < N; n++) sum[n] = warp_sum(sum[n]);
  if (blockDim.x == WARP) return;
  if (threadIdx.x % WARP == 0) {
    for (int n = 0; n < N; n++) partial[n][threadIdx.x / WARP] = sum[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) {
    sum[n] = 0;
#pragma unroll
    for (int w = 0; w < ROW_THREADS / WARP; w++) sum[n] += partial[n][w];
  }
}

// 行短的核几乎全是等显存：x、残差、权重的读要一起发出，所以读（load_once）与换成 fp32 分开；类型在编译时定，中间就没有
// 分支。只做 16 位的。
template <dso_dtype D>
__device__ Vec<8> unpack(const Words<4> &raw) {
  Vec<8> x;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    unsigned short bits = static_cast<unsigned short>(raw.v[j / 2] >> 16 * (j % 2));
    x.v[j] = D == DSO_BF16 ? bf16_bits(bits) : half_bits(bits);
  }
  return x;
}

// 第 i 个起的 8 个 16 位元素的地址。
__device__ inline const void *chunk(const void *data, int64_t i) {
  return static_cast<const unsigned short *>(data) + i;
}

// 归一化之后的 V 个：先舍入到 x 的类型，再乘权重。
template <int V>
__device__ Vec<V> scaled(Vec<V> x, float scale, dso_dtype dtype, const Vec<V> &weight) {
#pragma unroll
  for (int j = 0; j < V; j++) x.v[j] = round_to(dtype, x.v[j] * scale) * weight.v[j];
  return x;
}

// 短行一个 warp 一行、一块 8 行；长行一块一行。
inline dim3 row_block(int64_t dim) {
  return dim <= SHORT_ROW ? dim3(WARP, ROW_THREADS / WARP) : dim3(ROW_THREADS);
}

inline dim3 row_grid(int64_t rows, int64_t dim) {
  return dim3(static_cast<unsigned>(ceil_div(rows, row_block(dim).y)));
}

// 主机侧：能否用 V = 8 的宽访存。
inline bool aligned(const dso_mat &m) { return !m.data || wide_ok(m.data, m.dtype, m.rs); }

inline bool aligned(const void *data, dso_dtype dtype, int64_t dim) {
  return !data || wide_ok(data, dtype, dim);
}

}  // namespace dso
