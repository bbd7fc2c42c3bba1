// moe_experts 词元少时的权重：各种存法、一步读多少、码怎样变成 mma 的左操作数。
//
// int8、fp8 的码、int4 的码减零点（零点可以是任何一个字节）在 16 位里都是精确的：整行的尺度最后乘，组的乘在这一组的和上。
// 不用整数到浮点的转换：它是慢的一类指令，得到 fp32 之后还要再转成 16 位。
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "moe_common.cuh"

namespace dso::small {

// FP8 整行一个尺度，FP8_128 每 128 个一个。
enum Kind { PLAIN, INT8, FP8, FP8_128, INT4_32, INT4_64, INT4_128 };

inline Kind kind_of(const dso_expert &e) {
  if (e.down.dtype == DSO_I8) return INT8;
  if (e.down.dtype == DSO_F8) return e.down_quant.group ? FP8_128 : FP8;
  if (e.down.dtype != DSO_I4) return PLAIN;
  return e.down_quant.group == 32 ? INT4_32 : e.down_quant.group == 64 ? INT4_64 : INT4_128;
}

// 调用 f(元素, 存法)，都是类型。
template <class E, class F>
cudaError_t with_kind(Kind kind, F f) {
  switch (kind) {
    case INT8:
      return f(E{}, std::integral_constant<Kind, INT8>{});
    case FP8:
      return f(E{}, std::integral_constant<Kind, FP8>{});
    case FP8_128:
      return f(E{}, std::integral_constant<Kind, FP8_128>{});
    case INT4_32:
      return f(E{}, std::integral_constant<Kind, INT4_32>{});
    case INT4_64:
      return f(E{}, std::integral_constant<Kind, INT4_64>{});
    case INT4_128:
      return f(E{}, std::integral_constant<Kind, INT4_128>{});
    default:
      return f(E{}, std::integral_constant<Kind, PLAIN>{});
  }
}

template <class F>
cudaError_t with_types(dso_dtype dtype, Kind kind, F f) {
  return dtype == DSO_BF16 ? with_kind<Bf16>(kind, f) : with_kind<F16>(kind, f);
}

// 一步里每个线程从一行读多少个字（4 字节）、多少个 k；int4 一步就是一组。
template <Kind K>
struct Step {
  static constexpr bool int4 = K >= INT4_32;
  static constexpr bool grouped = int4 || K == FP8_128, row_scale = K == INT8 || K == FP8;
  static constexpr bool shrunk = int4 || K == INT8;  // 操作数是码除以 E::CODES
  static constexpr int words = K == INT4_32 ? 1 : K == INT4_64 ? 2 : 4;
  static constexpr int lane_k = K == PLAIN ? 8 : int4 ? 8 * words : 16;
  static constexpr int k = 4 * lane_k;
  static constexpr int row_bytes = 16 * words;
  static constexpr int per_group = K == FP8_128 ? 128 / k : 1;  // 几步一组
  static constexpr int x_words = K == INT4_32 ? 2 : 4;          // x 一次读几个字
};

// 一个线程在一步里的第一个 k：int4 的一段 32 个，低、高 4 位相隔 16。
template <Kind K>
__device__ __forceinline__ int lane_offset(int c) {
  if (K == INT4_64) return c / 2 * 32 + c % 2 * 8;
  if (K == INT4_32) return c * 4;
  return c * Step<K>::lane_k;
}

// 一组的尺度与零点：上、下两行；没有零点的是 8。
struct Group {
  float scale[2];
  uint32_t zero[2] = {8, 8};
};

// 一步：acc [份][词元 8 个一份] += 权重 · x。x(t, at)：第 t 份词元从本线程的第 at 个 k 起的一段。
//
// 两个操作数的 k 在一步里怎样排列无关紧要，只要相同：相邻的 4 个 k 就当作片段里同一个线程的那 4 个。int4 的另有一种次序
// （ALTERNATE）：x 的每 4 个先排成 0、2、1、3（alternate），码就不必展开成相邻的两个，一个字省一条指令。
template <class E, Kind K, int NT, int SETS, bool ALTERNATE = false>
struct Multiply {
  using S = Step<K>;
  using Weights = Words<S::words>[SETS][2];  // [份][上、下]
  using Sums = float[SETS][NT][4];
  using Input = Words<S::x_words>[NT];

  template <class X>
  __device__ static __forceinline__ void step(Sums &acc, const Weights &w,
                                              const Group (&group)[SETS], X x) {
    if constexpr (S::grouped) {
      Sums part = {};
      add(part, w, group, x);
#pragma unroll
      for (int s = 0; s < SETS; s++)
#pragma unroll
        for (int t = 0; t < NT; t++)
#pragma unroll
          for (int i = 0; i < 4; i++) acc[s][t][i] += group[s].scale[i / 2] * part[s][t][i];
    } else {
      add(acc, w, group, x);
    }
  }

 private:
  template <class X>
  __device__ static __forceinline__ void add(Sums &acc, const Weights &w,
                                             const Group (&group)[SETS], X x) {
    if constexpr (K == PLAIN)
      add_plain(acc, w, x);
    else if constexpr (S::int4)
      add_int4(acc, w, group, x);
    else
      add_bytes(acc, w, x);
  }

  template <class X>
  __device__ static __forceinline__ void read(Input &in, X x, int at) {
#pragma unroll
    for (int t = 0; t < NT; t++) in[t] = x(t, at);
  }

  // top、bottom：上、下两行 4 个相邻的 k；x 的那 4 个是一段里的第 i、i + 1 个字。
  __device__ static __forceinline__ void mma(float (&acc)[NT][4], const uint32_t (&top)[2],
                                             const uint32_t (&bottom)[2], const Input &in, int i) {
    uint32_t a[4] = {top[0], bottom[0], top[1], bottom[1]};
#pragma unroll
    for (int t = 0; t < NT; t++) E::mma(acc[t], a, in[t].v[i], in[t].v[i + 1]);
  }

  template <class X>
  __device__ static __forceinline__ void add_plain(Sums &acc, const Weights &w, X x) {
    Input in;
    read(in, x, 0);
#pragma unroll
    for (int i = 0; i < 4; i += 2)
#pragma unroll
      for (int s = 0; s < SETS; s++)
        mma(acc[s], {w[s][0].v[i], w[s][0].v[i + 1]}, {w[s][1].v[i], w[s][1].v[i + 1]}, in, i);
  }

  template <class X>
  __device__ static __forceinline__ void add_bytes(Sums &acc, const Weights &w, X x) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      Input in;
      read(in, x, 8 * half);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int s = 0; s < SETS; s++) {
          uint32_t a[2][2];
#pragma unroll
          for (int side = 0; side < 2; side++) bytes(a[side], w[s][side].v[2 * half + i]);
          mma(acc[s], a[0], a[1], in, 2 * i);
        }
    }
  }

  // 一个字里的 4 个一字节的码。
  __device__ static __forceinline__ void bytes(uint32_t (&to)[2], uint32_t word) {
    if constexpr (K == INT8) {
      word ^= 0x80808080u;  // 加 128
      to[0] = E::fma(select_bytes<0x4140>(word), E::RAISE, E::MINUS_128);
      to[1] = E::fma(select_bytes<0x4342>(word), E::RAISE, E::MINUS_128);
    } else {
      to[0] = E::e4m3(word), to[1] = E::e4m3(word >> 16);
    }
  }

  // 一次两个字（INT4_32 一个）：低 4 位配 x 的一段，高 4 位配隔 16 个 k 的一段。
  template <class X>
  __device__ static __forceinline__ void add_int4(Sums &acc, const Weights &w,
                                                  const Group (&group)[SETS], X x) {
    uint32_t minus[SETS][2];  // -零点 / CODES，两个
#pragma unroll
    for (int s = 0; s < SETS; s++)
#pragma unroll
      for (int side = 0; side < 2; side++)
        minus[s][side] = E::fma(select_bytes<0x4040>(group[s].zero[side]), E::LOWER, 0);
    constexpr int TOGETHER = S::words == 1 ? 1 : 2;
#pragma unroll
    for (int first = 0; first < S::words; first += TOGETHER) {
      Input low, high;
      read(low, x, 4 * first), read(high, x, 4 * first + 16);
#pragma unroll
      for (int i = 0; i < TOGETHER; i++)
#pragma unroll
        for (int s = 0; s < SETS; s++) {
          uint32_t a[2][2][2];  // [高][上、下][k]
#pragma unroll
          for (int side = 0; side < 2; side++)
            nibbles(a[0][side], a[1][side], w[s][side].v[first + i], minus[s][side]);
          mma(acc[s], a[0][0], a[0][1], low, 2 * i);
          mma(acc[s], a[1][0], a[1][1], high, 2 * i);
        }
    }
  }

  // 一个字里低、高 4 位的各 4 个码。
  __device__ static __forceinline__ void nibbles(uint32_t (&low)[2], uint32_t (&high)[2],
                                                 uint32_t word, uint32_t minus) {
    uint32_t pair[2] = {ALTERNATE ? word : select_bytes<0x4140>(word),
                        ALTERNATE ? word >> 8 : select_bytes<0x4342>(word)};
#pragma unroll
    for (int i = 0; i < 2; i++) {
      low[i] = E::fma(pair[i] & 0x000f000fu, E::RAISE, minus);
      high[i] = E::fma(pair[i] & 0x00f000f0u, E::RAISE_HIGH, minus);
    }
  }
};

// 8 个 16 位的数，每 4 个从 0、1、2、3 排成 0、2、1、3。
__device__ __forceinline__ uint4 alternate(uint4 x) {
  auto low = [](uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; };
  auto high = [](uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); };
  return make_uint4(low(x.x, x.y), high(x.x, x.y), low(x.z, x.w), high(x.z, x.w));
}

}  // namespace dso::small
