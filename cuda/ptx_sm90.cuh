// Hopper（sm_90a）的指令，每条只在这里包一次；主机模拟（tests/cuda/host）有同名的一份，所以用 <ptx_sm90.cuh>
// 引入，而且只有 *_sm90.cu 引入。
#pragma once

#include <cuda.h>
#include <ptx.cuh>

namespace dso {

// ---- mbarrier：arrivals 次到达、expect 的字节都写完，这一相才结束；相从 0 起，奇偶交替 ----

__device__ inline void mbarrier_init(uint64_t *barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// 初始化之后、__syncthreads 之前：让 TMA 也看得见。
__device__ inline void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint64_t *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// 到达，并说明这一相还有多少字节由 TMA 写入。
__device__ inline void mbarrier_expect(uint64_t *barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// 这个线程此前的 cp.async 都写完时到达一次（算在 arrivals 里）；不在这里等。
__device__ inline void mbarrier_arrive_copies(uint64_t *barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// 等奇偶为 parity 的一相结束；刚初始化时等 1 立即返回。
__device__ inline void mbarrier_wait(uint64_t *barrier, int parity) {
  uint32_t address = shared_address(barrier), done;
  do {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- cluster：几个 CTA 互相看得见共享内存 ----

__device__ inline int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// 全部 CTA 的全部线程都到了，等的才继续。
__device__ inline void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ inline void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// 第 rank 个 CTA 里同样偏移的 mbarrier（可以是自己的）。只用来放行异步读完（wgmma_wait 之后）的缓冲，不传数据，
// 所以不写 .release.cluster：那会先等这个线程的全部访存（MEMBAR.GPU）。
__device__ inline void mbarrier_arrive_at(uint64_t *barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// 整个 warp 一起调用（各线程都在）：恰好一个线程得到真。编译器认得它：其中的 TMA 用标量寄存器，不必逐个线程地试。
__device__ inline bool elected() {
  uint32_t chosen;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(chosen));
  return chosen != 0;
}

// ---- TMA：一个线程发起，把 map 的一个框（坐标从最内一维起，界外填 0）拷进共享内存，写完记在 barrier 上 ----

__device__ inline void tma_load(void *to, const CUtensorMap *map, uint64_t *barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

__device__ inline void tma_load(void *to, const CUtensorMap *map, uint64_t *barrier, int x, int y,
                                int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ inline void tma_load(void *to, const CUtensorMap *map, uint64_t *barrier, int x, int y,
                                int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// 写到 cluster 里 mask 的各个 CTA：同样的偏移，各记在自己的 barrier 上。L2 只读一次。
__device__ inline void tma_load_multicast(void *to, const CUtensorMap *map, uint64_t *barrier,
                                          unsigned mask, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(mask)), "r"(x), "r"(y),
      "r"(z)
      : "memory");
}

__device__ inline void tma_load_multicast(void *to, const CUtensorMap *map, uint64_t *barrier,
                                          unsigned mask, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(mask)), "r"(x), "r"(y),
      "r"(z), "r"(w)
      : "memory");
}

// 不经张量描述：相接的 bytes 个字节，地址、大小都是 16 的倍数。
__device__ inline void bulk_load(void *to, const void *from, int bytes, uint64_t *barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// 只读进 L2，不等：之后的 tma_load 不必等显存。
__device__ inline void tma_prefetch(const CUtensorMap *map, int x, int y, int z) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map),
               "r"(x), "r"(y), "r"(z)
               : "memory");
}

__device__ inline void tma_prefetch(const CUtensorMap *map, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map),
               "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// 普通的写（含 cp.async、stmatrix）要给 wgmma、TMA 看见：写的线程各自执行，然后才是屏障。
__device__ inline void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- 具名屏障（1 到 15；0 是 __syncthreads）：threads 是 32 的倍数 ----

__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- 寄存器在 warp 组之间的分配：COUNT 是 8 的倍数，24 到 240 ----

template <int COUNT>
__device__ inline void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ inline void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- stmatrix：ldmatrix 的反向；线程 i 给出第 i / 8 个矩阵第 i % 8 行的地址 ----

__device__ inline void stmatrix_x4(void *row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// 转置着写；x2 只用前 16 个线程的地址。
__device__ inline void stmatrix_x2_trans(void *row, const uint32_t (&r)[2]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1])
      : "memory");
}

// ---- wgmma：4 个 warp 一组，异步；操作数是共享内存的描述符（tile_sm90.cuh）或寄存器 ----

// 第一条 wgmma 之前，以及别的指令写过累加器（或寄存器操作数）之后。
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// 等到至多还有 LEFT 组没有完成。
template <int LEFT>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// wgmma_wait 之后、读累加器之前：编译器不知道 wgmma 是异步的，不许它把读提到等待之前。
template <int R>
__device__ inline void wgmma_settle(float (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// 内联汇编不能带数组：N / 2 个累加器逐个写出。
#define DSO_OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DSO_OUT8(i) DSO_OUT4(i), DSO_OUT4(i + 4)
#define DSO_OUT16(i) DSO_OUT8(i), DSO_OUT8(i + 8)
#define DSO_OUT32(i) DSO_OUT16(i), DSO_OUT16(i + 16)
#define DSO_OUT64(i) DSO_OUT32(i), DSO_OUT32(i + 32)
#define DSO_OUT128(i) DSO_OUT64(i), DSO_OUT64(i + 64)
#define DSO_OUT96(i) DSO_OUT64(i), DSO_OUT32(i + 64)
#define DSO_TEN(t) \
  "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define DSO_REG4 "%0,%1,%2,%3"
#define DSO_REG8 DSO_REG4 ",%4,%5,%6,%7"
#define DSO_REG16 DSO_TEN() ",%10,%11,%12,%13,%14,%15"
#define DSO_REG32 DSO_TEN() "," DSO_TEN(1) "," DSO_TEN(2) ",%30,%31"
#define DSO_REG60 \
  DSO_TEN() "," DSO_TEN(1) "," DSO_TEN(2) "," DSO_TEN(3) "," DSO_TEN(4) "," DSO_TEN(5)
#define DSO_REG64 DSO_REG60 ",%60,%61,%62,%63"
#define DSO_REG96 DSO_REG60 "," DSO_TEN(6) "," DSO_TEN(7) "," DSO_TEN(8) ",%90,%91,%92,%93,%94,%95"
#define DSO_REG128                                                                   \
  DSO_REG60 "," DSO_TEN(6) "," DSO_TEN(7) "," DSO_TEN(8) "," DSO_TEN(9) "," DSO_TEN( \
      10) "," DSO_TEN(11) ",%120,%121,%122,%123,%124,%125,%126,%127"

#define DSO_WGMMA_TYPE(N, R, TYPE, OPERANDS, PREDICATE, ...)                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " PREDICATE                                   \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" DSO_REG##R \
               "}, " OPERANDS ";\n}"                                                           \
               : DSO_OUT##R(0)                                                                 \
               : __VA_ARGS__)
#define DSO_WGMMA(N, R, OPERANDS, PREDICATE, ...)                   \
  if constexpr (BF16)                                               \
    DSO_WGMMA_TYPE(N, R, "bf16", OPERANDS, PREDICATE, __VA_ARGS__); \
  else                                                              \
    DSO_WGMMA_TYPE(N, R, "f16", OPERANDS, PREDICATE, __VA_ARGS__)
// A 在共享内存：操作数 a、b 的描述符，是否累加，两个转置。
#define DSO_WGMMA_SS(N, R, A, B, P, TA, TB)                                             \
  DSO_WGMMA(N, R, "%" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB, "%" #P, "l"(a), "l"(b), \
            "r"(static_cast<int>(accumulate)), "n"(TRANS_A), "n"(TRANS_B))
// A 在寄存器。
#define DSO_WGMMA_RS(N, R, A0, A1, A2, A3, B, P, TB)                                               \
  DSO_WGMMA(N, R, "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, %" #TB, "%" #P,        \
            "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
            "n"(TRANS_B))

// d [64, N] (+)= a [64, 16] b [N, 16]ᵀ，N = 2 R；TRANS 为 1：操作数在内存里以 M（N）一维连续。
// 线程 t 的 d[4 j + 2 h + e] 是第 t / 32 * 16 + t % 32 / 4 + 8 h 行、第 8 j + t % 4 * 2 + e 列。
template <bool BF16, int TRANS_A, int TRANS_B, int R>
__device__ inline void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(R == 4 || R == 8 || R == 16 || R == 32 || R == 64 || R == 128, "N = 2 R");
  if constexpr (R == 4) {
    DSO_WGMMA_SS(8, 4, 4, 5, 6, 7, 8);
  } else if constexpr (R == 8) {
    DSO_WGMMA_SS(16, 8, 8, 9, 10, 11, 12);
  } else if constexpr (R == 16) {
    DSO_WGMMA_SS(32, 16, 16, 17, 18, 19, 20);
  } else if constexpr (R == 32) {
    DSO_WGMMA_SS(64, 32, 32, 33, 34, 35, 36);
  } else if constexpr (R == 64) {
    DSO_WGMMA_SS(128, 64, 64, 65, 66, 67, 68);
  } else {
    DSO_WGMMA_SS(256, 128, 128, 129, 130, 131, 132);
  }
}

// a 是 m16n8k16 的左片段，各 warp 管自己的 16 行。
template <bool BF16, int TRANS_B, int R>
__device__ inline void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(R == 32 || R == 64 || R == 96 || R == 128, "N = 2 R");
  if constexpr (R == 32) {
    DSO_WGMMA_RS(64, 32, 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (R == 64) {
    DSO_WGMMA_RS(128, 64, 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (R == 96) {
    DSO_WGMMA_RS(192, 96, 96, 97, 98, 99, 100, 101, 102);
  } else {
    DSO_WGMMA_RS(256, 128, 128, 129, 130, 131, 132, 133, 134);
  }
}

#undef DSO_OUT4
#undef DSO_OUT8
#undef DSO_OUT16
#undef DSO_OUT32
#undef DSO_OUT64
#undef DSO_OUT128
#undef DSO_OUT96
#undef DSO_TEN
#undef DSO_REG4
#undef DSO_REG8
#undef DSO_REG16
#undef DSO_REG32
#undef DSO_REG60
#undef DSO_REG64
#undef DSO_REG96
#undef DSO_REG128
#undef DSO_WGMMA_TYPE
#undef DSO_WGMMA
#undef DSO_WGMMA_SS
#undef DSO_WGMMA_RS

}  // namespace dso
