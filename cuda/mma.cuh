// 16 位矩阵块的公共部分：片段的读取、两种元素、softmax 的零碎。
//
// 共享内存里的块是行主序，行距（元素）= 宽 + 8，宽是 32 的倍数：行距是 16 字节的奇数倍，ldmatrix 的
// 8 行落在不同的库，没有冲突，也不用交错。
#pragma once

#include <ptx.cuh>

#include "vec.cuh"

namespace dso {

constexpr int TILE_PAD = 8;

struct Bf16 {
  static constexpr dso_dtype dtype = DSO_BF16;
  __device__ static uint32_t pack(float a, float b) { return pack_bf16(a, b); }
  __device__ static float low(uint32_t pair) { return bf16_bits(static_cast<uint16_t>(pair)); }
  __device__ static float high(uint32_t pair) {
    return bf16_bits(static_cast<uint16_t>(pair >> 16));
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(d, a, b0, b1);
  }
  // 零扩展到 16 位的码 u（0 到 255）就是（次正规的）数 u 2^-133，一次乘加得到精确的 (u - 零点) / CODES：
  // 乘 RAISE（2^127；码在高 4 位的乘 2^123），加 -零点 / CODES。减去的零点同样由字节得到：乘 -2^127。
  static constexpr float CODES = 64.0f;
  static constexpr uint32_t RAISE = 0x7f007f00u, RAISE_HIGH = 0x7d007d00u, LOWER = 0xff00ff00u;
  static constexpr uint32_t MINUS_128 = 0xc000c000u;  // -128 / CODES
  __device__ static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) { return fma_bf16(a, b, c); }
  // 低 16 位里的两个 e4m3fn。
  __device__ static uint32_t e4m3(uint32_t bits) {
    float2 x = e4m3_pair(bits);
    return pack(x.x, x.y);
  }
};

struct F16 {
  static constexpr dso_dtype dtype = DSO_F16;
  __device__ static uint32_t pack(float a, float b) { return pack_f16(a, b); }
  __device__ static float low(uint32_t pair) { return half_bits(static_cast<uint16_t>(pair)); }
  __device__ static float high(uint32_t pair) {
    return half_bits(static_cast<uint16_t>(pair >> 16));
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_f16(d, a, b0, b1);
  }
  // 同上：u 2^-24，乘 2^15、2^11。
  static constexpr float CODES = 512.0f;
  static constexpr uint32_t RAISE = 0x78007800u, RAISE_HIGH = 0x68006800u, LOWER = 0xf800f800u;
  static constexpr uint32_t MINUS_128 = 0xb400b400u;
  __device__ static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) { return fma_f16(a, b, c); }
  __device__ static uint32_t e4m3(uint32_t bits) {
#if __CUDA_ARCH__ >= 890
    return unpack_e4m3(static_cast<unsigned short>(bits));
#else
    float2 x = e4m3_pair(bits);
    return pack(x.x, x.y);
#endif
  }
};

// 线程在 16x8 结果片段里的位置：行 fragment_row() + 8 (i / 2)，列 fragment_column() + i % 2。
__device__ inline int fragment_row() { return static_cast<int>(threadIdx.x) % WARP / 4; }
__device__ inline int fragment_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }

// 左操作数：tile 里 [row, row + 16) x [column, column + 16)。
__device__ inline void load_a(uint32_t (&a)[4], const uint16_t *tile, int stride, int row,
                              int column) {
  int lane = static_cast<int>(threadIdx.x) % WARP;
  ldmatrix_x4(a, tile + (row + lane % 16) * stride + column + lane / 16 * 8);
}

// 左操作数，tile 按 [列][行] 存（例如 Pᵀ）：行 [row, row + 16)、列 [column, column + 16)。
__device__ inline void load_a_trans(uint32_t (&a)[4], const uint16_t *tile, int stride, int row,
                                    int column) {
  int lane = static_cast<int>(threadIdx.x) % WARP;
  ldmatrix_x4_trans(a,
                    tile + (column + lane / 16 * 8 + lane % 8) * stride + row + lane / 8 % 2 * 8);
}

// 右操作数，tile 按 [n][k] 存：8 个 n、32 个 k；(b[0], b[1]) 是前 16 个 k，(b[2], b[3]) 是后 16 个。
__device__ inline void load_b_8x32(uint32_t (&b)[4], const uint16_t *tile, int stride, int n,
                                   int k) {
  int lane = static_cast<int>(threadIdx.x) % WARP;
  ldmatrix_x4(b, tile + (n + lane % 8) * stride + k + lane / 8 * 8);
}

// 同上：16 个 n、16 个 k；(b[0], b[1]) 是前 8 个 n，(b[2], b[3]) 是后 8 个。
__device__ inline void load_b_16x16(uint32_t (&b)[4], const uint16_t *tile, int stride, int n,
                                    int k) {
  int lane = static_cast<int>(threadIdx.x) % WARP;
  ldmatrix_x4(b, tile + (n + lane / 16 * 8 + lane % 8) * stride + k + lane / 8 % 2 * 8);
}

// 右操作数，tile 按 [k][n] 存（例如值：行是键）：16 个 k、16 个 n，(b[0], b[1]) 是前 8 个 n。
__device__ inline void load_b_trans(uint32_t (&b)[4], const uint16_t *tile, int stride, int k,
                                    int n) {
  int lane = static_cast<int>(threadIdx.x) % WARP;
  ldmatrix_x4_trans(b, tile + (k + lane / 8 % 2 * 8 + lane % 8) * stride + n + lane / 16 * 8);
}

// 左操作数直接读自两行：一个线程持 top（第 fragment_row() 行）、bottom（其后第 8 行）与 x（右操作数的第 fragment_row() 列）
// 各自连续的 8 个 k，当作两个 k16 的片段里同一个线程的：求和与 k 的次序无关，不必经过共享内存重排。
template <class E>
__device__ __forceinline__ void mma_rows(float (&d)[4], const Words<4> &top, const Words<4> &bottom,
                                         const Words<4> &x) {
  const uint32_t low[4] = {top.v[0], bottom.v[0], top.v[1], bottom.v[1]};
  const uint32_t high[4] = {top.v[2], bottom.v[2], top.v[3], bottom.v[3]};
  E::mma(d, low, x.v[0], x.v[1]);
  E::mma(d, high, x.v[2], x.v[3]);
}

// 一个 warp 拷一行：from 的前 count 个元素，其后到 width 填 0；from 为空时整行填 0。都是 8 的倍数。
__device__ inline void copy_row_async(uint16_t *to, const uint16_t *from, int count, int width) {
  for (int c = static_cast<int>(threadIdx.x) % WARP * 8; c < width; c += WARP * 8) {
    bool inside = from && c < count;
    cp_async_16(to + c, inside ? from + c : nullptr, inside);
  }
}

// N 个（2 的幂）的最大值：两两比，链短。
template <int N>
__device__ inline float max_of(float (&x)[N]) {
#pragma unroll
  for (int half = 1; half < N; half *= 2)
#pragma unroll
    for (int i = 0; i < N; i += 2 * half) x[i] = fmaxf(x[i], x[i + half]);
  return x[0];
}

// 一行的 4 个线程（同一 fragment_row）之间。
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 1));
  return fmaxf(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(ALL_LANES, x, 1);
  return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// 一组 4 个线程里转置：之前第 q 个线程的 x[j]，之后是第 j 个线程的 x[q]。
__device__ inline void transpose_quad(uint32_t (&x)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool high = (threadIdx.x & static_cast<unsigned>(step)) != 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & step) continue;
      uint32_t &low = x[i], &other = x[i + step];
      const uint32_t found = __shfl_xor_sync(ALL_LANES, high ? low : other, step);
      (high ? low : other) = found;
    }
  }
}

// 最大值还是 -inf（什么都没看见）时按 0 算：exp2(-inf - 0) = 0，而不是 NaN。
__device__ inline float finite_max(float m) { return m == -INFINITY ? 0.0f : m; }

}  // namespace dso
