// wgmma、TMA 共用的共享内存块：一行 128 字节（64 个 16 位元素），128 字节交错，块从 1024 字节对齐处起。
// 更宽的矩阵是几个这样的块，一块接一块。
#pragma once

#include <ptx_sm90.cuh>

namespace dso {

constexpr int BOX_COLUMNS = 64, BOX_ROW = 128;  // 一块的列数；一行的字节

// 块内第 row 行第 column 列（元素）的字节偏移：16 字节的一段与行号的低 3 位异或。
__host__ __device__ constexpr int swizzled(int row, int column) {
  return row * BOX_ROW + ((column / 8) ^ (row % 8)) * 16 + column % 8 * 2;
}

// wgmma 的操作数描述符：起点、两个步距都以 16 字节计，62 位起是交错方式（1：128 字节）。
__device__ inline uint64_t descriptor(const void *start, int leading, int stride) {
  return static_cast<uint64_t>((shared_address(start) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         uint64_t{1} << 62;
}

// K 一维连续（键当作键、查询、P）：块的行是 M（N），列是 K；K 前进 16 个就是起点加 32 字节。
__device__ inline uint64_t k_major(const void *start) { return descriptor(start, 16, 8 * BOX_ROW); }

// M（N）一维连续（键当作值）：块的行是 K，列是 M（N），box 字节之后是下 64 列；K 前进 16 个是 16 行。
__device__ inline uint64_t mn_major(const void *start, int box) {
  return descriptor(start, box, 8 * BOX_ROW);
}

// 起点前进 bytes 字节的描述符。共享内存不到 256 KiB，起点的位数够用，不会进到别的字段，所以只加低 32 位：
// 高 32 位是常数，不必跟着进位。
__device__ inline uint64_t advance(uint64_t d, int bytes) {
  uint32_t low = static_cast<uint32_t>(d) + static_cast<uint32_t>(bytes >> 4);
  return (d & 0xffffffff00000000) | low;
}

// 描述符在一个 warp 里都一样，编译器却看不出来：广播一次，各个偏移就在标量寄存器里加，一条一个，夹在 wgmma 之间；
// 否则每个偏移占向量寄存器，再逐个搬过去，都堵在第一条 wgmma 之前。
__device__ inline uint64_t uniform(uint64_t d) {
  uint32_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(d), 0);
  return (d & 0xffffffff00000000) | low;
}

}  // namespace dso
