// 展开式注意力的反向（Hopper）：TMA 搬运，wgmma 累加；K、V 的展开、两个核的分工同 mla_prefill_backward.cu。
//
// dkv：一块 128 个键、一个头，键放在 M 一维：Sᵀ = K Qᵀ、dPᵀ = V dOᵀ，Pᵀ、dSᵀ 在寄存器里直接作
// dV += Pᵀ dO、dK += dSᵀ Q 的左操作数，不经共享内存。dq：一块 128 个查询，同样 dS 在寄存器里，dQ += dS K。
//
// 两个消费者组（4 个 warp）各 64 行，轮流（具名屏障）发 wgmma，一组算 P 或 dS 时另一组占着矩阵单元。一步发两次：
// dV 与 dP 一起，dK（dQ）与下一步的 S 一起。S 与 dP 因此可以是同样的寄存器，两次之间只留下 16 位的 P；要是同时
// 算出 S 与 dP，就再也放不下 dK 与 dV 的累加器。生产者组两个 warp 干活：一个发 TMA，一个读 lse、delta，清掉
// 不该参与的行（那里可能是 NaN，而 0 * NaN 会混进累加）。
#pragma once

#include "mla_prefill_sm90.cuh"

namespace dso::backward {

using Params = dso_cuda_mla_prefill_backward_params;

constexpr int GROUP = 4 * WARP, GROUPS = 2, CONSUMERS = GROUPS * GROUP;
constexpr int THREADS = CONSUMERS + GROUP;  // 生产者占一组：寄存器才让得出来
constexpr int COPY_WARP = CONSUMERS / WARP, ROW_WARP = COPY_WARP + 1;
constexpr int TURN_BARRIER = 1;

struct Maps {
  PrefillMaps in;
  CUtensorMap grad;
};

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ inline int warp_of() { return static_cast<int>(threadIdx.x) / WARP; }

// 一次 queries 个查询、keys 个键。
inline cudaError_t make_maps(const Params &p, int queries, int keys, Maps *maps) {
  const dso_mla_inputs &in = p.in.in;
  cudaError_t error = make_prefill_maps(p.in, queries, keys, &maps->in);
  if (error != cudaSuccess) return error;
  return make_tensor_map(&maps->grad,
                         {p.grad,
                          p.in.dtype,
                          4,
                          {in.v_dim, in.heads, in.t, in.b},
                          {1, in.v_dim, in.heads * in.v_dim, in.t * in.heads * in.v_dim},
                          {BOX_COLUMNS, 1, queries, 1}});
}

// 第 row 行从词元 token 起的 dO。
template <int BOXES>
__device__ void load_grad(const Maps &maps, int row, int token, int head, unsigned char *to,
                          int box, uint64_t *barrier) {
  for (int i = 0; i < BOXES; i++)
    tma_load(to + i * box, &maps.grad, barrier, i * BOX_COLUMNS, head, token, row);
}

// 一个 warp 把 count 块（各 rows 行）里 hidden(行) 的行清零。
template <class Hidden>
__device__ void clear_rows(unsigned char *boxes, int count, int rows, Hidden hidden) {
  for (int i = lane_of(); i < rows * 8; i += WARP) {
    if (!hidden(i / 8)) continue;
    for (int b = 0; b < count; b++)
      *reinterpret_cast<uint4 *>(boxes + b * rows * BOX_ROW + i * 16) = make_uint4(0, 0, 0, 0);
  }
  fence_proxy_async();
}

// 一个 warp 到达一次；各线程此前的写都算在内。
__device__ inline void arrive(uint64_t *barrier) {
  __syncwarp();
  if (lane_of() == 0) mbarrier_arrive(barrier);
}

// 一个乘法的操作数的描述符：轮到之前先算好，轮到了就发。
struct Operands {
  uint64_t a, b;
};

__device__ inline Operands operands(const void *a, const void *b) {
  return {uniform(k_major(a)), uniform(k_major(b))};
}

// d [64, 2 R] = a bᵀ：两个操作数都是 CHUNKS 个 16 列，分成 64 列的块。
template <bool BF16, int CHUNKS, int R>
__device__ void multiply(float (&d)[R], const Operands &from, int a_box, int b_box) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
    wgmma<BF16, 0, 0>(d, advance(from.a, c / 4 * a_box + c % 4 * 32),
                      advance(from.b, c / 4 * b_box + c % 4 * 32), c > 0);
}

// d [64, 2 R] += a b：a 是寄存器里的片段，b 的行是求和的一维。
template <bool BF16, int CHUNKS, int R>
__device__ void accumulate(float (&d)[R], const uint32_t (&a)[CHUNKS][4], uint64_t b) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) wgmma<BF16, 1>(d, a[c], advance(b, c * 16 * BOX_ROW), true);
}

__device__ inline void take_turn(int group) { named_barrier_sync(TURN_BARRIER + group, CONSUMERS); }
__device__ inline void pass_turn(int group) {
  named_barrier_arrive(TURN_BARRIER + 1 - group, CONSUMERS);
}

}  // namespace dso::backward
