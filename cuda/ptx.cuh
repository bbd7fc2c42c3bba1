// 每条 PTX 指令只在这里包一次；主机模拟（tests/cuda/host）有同名的一份，所以用 <ptx.cuh> 引入。
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dso {

// 动态共享内存的起点，1024 字节对齐（128 字节的交错以它为周期）。
__device__ inline unsigned char *dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return shared;
}

// 一次宽访存的几个字。
template <int V>
struct alignas(4 * V) Words {
  uint32_t v[V];
};

__device__ inline uint32_t shared_address(const void *p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- 提前启动（sm_90 起，更早的什么也不做）：约定见 launch.cuh ----

// 等流里前面的核都结束、写的都看得见。每个线程在碰到全局内存（例外见 launch.cuh）、提前返回之前都要走到。
__device__ inline void grid_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// grid_wait 之前读的，不是前一个核写的：条件见 launch.cuh，主机模拟核对。
__device__ inline void read_early() {}

// 后一个核可以开始占位了：各块都走到（或退出）之后才真的启动，所以不会抢走本核还没开始的块的位置。
__device__ inline void grid_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 请 L2 先去取 bytes 个字节（16 的倍数，地址同样对齐）。只动 L2，不读进来：grid_wait 之前也可以，前一个核随后写了也不会读到
// 旧的。
__device__ inline void prefetch_l2(const void *from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// ---- 异步拷贝（sm_80）：16（4）字节，valid 为假时填 0 而不读 ----

__device__ inline void cp_async_16(void *to, const void *from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// 4 字节的：行没有对齐到 16 字节的（尺度、零点）。
__device__ inline void cp_async_4(void *to, const void *from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}

// 同 cp_async_16，但在 grid_wait 之前：读的早已写好，条件见 launch.cuh。
__device__ inline void cp_async_16_early(void *to, const void *from, bool valid) {
  cp_async_16(to, from, valid);
}

// 只从 L2 读，不看 L1：grid_wait 之前读的，L1 里可能是更早的核留下的。
__device__ inline int64_t load_l2(const int64_t *from) {
  int64_t x;
  asm volatile("ld.global.cg.b64 %0, [%1];" : "=l"(x) : "l"(from));
  return x;
}

__device__ inline int32_t load_l2(const int32_t *from) {
  int32_t x;
  asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(x) : "l"(from));
  return x;
}

__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// 等到至多还有 LEFT 组没有完成。
template <int LEFT>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// base 起第 count 段（16 字节）：32 位够 64 GiB。写成一条指令，编译器才不会提前算好 64 位的偏移，多占寄存器。
__device__ inline const void *chunks_after(const void *base, uint32_t count) {
  uint64_t at;
  asm("mad.wide.u32 %0, %1, 16, %2;" : "=l"(at) : "r"(count), "l"(base));
  return reinterpret_cast<const void *>(at);
}

// ---- 矩阵片段（sm_80） ----

// 4 个 8x8 的 16 位矩阵；线程 i 给出第 i / 8 个矩阵第 i % 8 行的地址。
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8]，累加 fp32。
__device__ inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 两个 fp32 舍入成一对 16 位，a 在低位。
__device__ inline uint32_t pack_bf16(float a, float b) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}

__device__ inline uint32_t pack_f16(float a, float b) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}

// 一对 e4m3fn（低字节在前）转成一对 fp16；更早的架构没有这条指令，见 vec.cuh 的 e4m3_pair。
#if __CUDA_ARCH__ >= 890
__device__ inline uint32_t unpack_e4m3(unsigned short pair) {
  uint32_t r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
  return r;
}
#endif

// 成对的 16 位 a * b + c，逐个只舍入一次；次正规数照常。
__device__ inline uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ inline uint32_t fma_f16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// 按 SELECTOR 从 x（字节 0 到 3）与 0（字节 4 到 7）里选 4 个字节，最低的在最后一位。
template <unsigned SELECTOR>
__device__ __forceinline__ uint32_t select_bytes(uint32_t x) {
  return __byte_perm(x, 0, SELECTOR);
}

// ---- 显存里的数：valid 为假时不读，to 不变。不用 .nc：那样 ptxas 会把读移到 grid_wait 之后 ----

// 权重只读一遍：不在 L1 里留下，x 才留得住。

// 在 grid_wait 之后读的。
__device__ __forceinline__ Words<4> load_once(const void *from) {
  Words<4> r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
               : "l"(from));
  return r;
}

__device__ __forceinline__ void load_once(Words<4> &to, const void *from, bool valid) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0;\n"
      "@p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(to.v[0]), "+r"(to.v[1]), "+r"(to.v[2]), "+r"(to.v[3])
      : "l"(from), "r"(static_cast<int>(valid)));
}

__device__ __forceinline__ void load_once(Words<2> &to, const void *from, bool valid) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %3, 0;\n"
      "@p ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2]; }"
      : "+r"(to.v[0]), "+r"(to.v[1])
      : "l"(from), "r"(static_cast<int>(valid)));
}

__device__ __forceinline__ void load_once(Words<1> &to, const void *from, bool valid) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0;\n"
      "@p ld.global.L1::no_allocate.u32 %0, [%1]; }"
      : "+r"(to.v[0])
      : "l"(from), "r"(static_cast<int>(valid)));
}

// 相邻的还会再读（各组的尺度、零点）：留在 L1 里。
__device__ __forceinline__ void load_if(float &to, const float *from, bool valid) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.f32 %0, [%1]; }"
               : "+f"(to)
               : "l"(from), "r"(static_cast<int>(valid)));
}

__device__ __forceinline__ void load_if(uint32_t &to, const uint8_t *from, bool valid) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p ld.global.u8 %0, [%1]; }"
               : "+r"(to)
               : "l"(from), "r"(static_cast<int>(valid)));
}

// 同样的数，但编译器以为变了：由它算出的在这里重新算，不在长的循环里占着寄存器。
__device__ __forceinline__ int afresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 2 的 x 次方，约 2 ulp；-inf 得 0，NaN 得 NaN。
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace dso
