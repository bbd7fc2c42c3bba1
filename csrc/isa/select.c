/* 载入时按 CPU 能力选指令集；环境变量 DEEPSEEK_OPT_ISA 可强制。 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "isa.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#define DSO_X86 1
#endif

enum { SCALAR, AVX2, AVX512, AVX512_VNNI, AVX512_BF16, LEVELS };
static const char *const NAMES[LEVELS] = {"scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

static dso_isa table[LEVELS];
static int best = -1; /* 本机可用的最高级别；-1 为尚未初始化 */
static int current;

#ifdef DSO_X86
/* 操作系统保存了哪些寄存器（XCR0）：没有保存就不能用。 */
static uint64_t saved_state(void) {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return ((uint64_t)hi << 32) | lo;
}

static int cpu_level(void) {
  unsigned a, b, c, d, ext;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return SCALAR;
  unsigned need = bit_OSXSAVE | bit_AVX | bit_FMA | bit_F16C;
  if ((c & need) != need || (saved_state() & 6) != 6) return SCALAR;
  if (!__get_cpuid_count(7, 0, &ext, &b, &c, &d) || !(b & bit_AVX2)) return SCALAR;
  unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  if ((b & wide) != wide || (saved_state() & 0xe6) != 0xe6) return AVX2;
  if (!(c & (1u << 11))) return AVX512;
  if (ext < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return AVX512_VNNI;
  return AVX512_BF16;
}
#else
static int cpu_level(void) { return SCALAR; }
#endif

static int compiled_level(void) {
#if defined(DSO_HAVE_AVX512BF16)
  return AVX512_BF16;
#elif defined(DSO_HAVE_AVX512VNNI)
  return AVX512_VNNI;
#elif defined(DSO_HAVE_AVX512)
  return AVX512;
#elif defined(DSO_HAVE_AVX2)
  return AVX2;
#else
  return SCALAR;
#endif
}

static void fill_table(void) {
  for (int level = 0; level < LEVELS; level++) dso_isa_init_scalar(&table[level]);
#if defined(DSO_HAVE_AVX2)
  dso_isa_init_avx2(&table[AVX2]);
#endif
#if defined(DSO_HAVE_AVX512)
  dso_isa_init_avx512(&table[AVX512]);
#endif
#if defined(DSO_HAVE_AVX512VNNI)
  table[AVX512_VNNI] = table[AVX512];
  dso_isa_init_avx512vnni(&table[AVX512_VNNI]);
#endif
#if defined(DSO_HAVE_AVX512BF16)
  table[AVX512_BF16] = table[AVX512_VNNI];
  dso_isa_init_avx512bf16(&table[AVX512_BF16]);
#endif
}

static int find(const char *name) {
  for (int level = 0; level <= best; level++)
    if (strcmp(name, NAMES[level]) == 0) return level;
  return -1;
}

/* 由绑定在载入时（单线程）第一次调用；此后表只读。 */
static void init_once(void) {
  if (best >= 0) return;
  fill_table();
  int cpu = cpu_level(), built = compiled_level();
  best = cpu < built ? cpu : built;
  current = best;
  const char *forced = getenv("DEEPSEEK_OPT_ISA");
  if (!forced || !*forced) return;
  if (find(forced) >= 0)
    current = find(forced);
  else
    fprintf(stderr, "deepseek_opt：DEEPSEEK_OPT_ISA=%s 不可用（可用：%s），改用 %s\n", forced,
            dso_isa_available(), NAMES[current]);
}

const dso_isa *dso_isa_current(void) {
  init_once();
  return &table[current];
}

const char *dso_isa_name(const dso_isa *isa) { return isa->name; }

static const char *list_up_to(int level) {
  static const char *const LISTS[LEVELS] = {"scalar", "scalar,avx2", "scalar,avx2,avx512",
                                            "scalar,avx2,avx512,avx512_vnni",
                                            "scalar,avx2,avx512,avx512_vnni,avx512_bf16"};
  return LISTS[level];
}

const char *dso_isa_available(void) {
  init_once();
  return list_up_to(best);
}

const char *dso_isa_compiled(void) { return list_up_to(compiled_level()); }

int dso_isa_set(const char *name) {
  init_once();
  int level = find(name);
  if (level < 0) return -1;
  current = level;
  return 0;
}
