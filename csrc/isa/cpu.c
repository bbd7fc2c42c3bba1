/* 这台机器的 CPU 支持到哪一级（dso_level）。 */
#include "isa.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>

/* 操作系统保存了哪些寄存器（XCR0）：没有保存就不能用。 */
static uint64_t saved_state(void) {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return ((uint64_t)hi << 32) | lo;
}

int dso_cpu_level(void) {
  unsigned a, b, c, d, ext;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return DSO_SCALAR;
  unsigned need = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
  if ((c & need) != need || (saved_state() & 6) != 6) return DSO_SCALAR;
  if (!__get_cpuid_count(7, 0, &ext, &b, &c, &d) || !(b & bit_AVX2)) return DSO_SCALAR;
  unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  if ((b & wide) != wide || (saved_state() & 0xe6) != 0xe6) return DSO_AVX2;
  if (!(c & (1u << 11))) return DSO_AVX512;
  if (ext < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5)))
    return DSO_AVX512_VNNI;
  return DSO_AVX512_BF16;
}
#else
int dso_cpu_level(void) { return DSO_SCALAR; }
#endif
