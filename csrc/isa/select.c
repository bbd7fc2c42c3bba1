/* 载入时按 CPU 能力（cpu.c）选指令集；环境变量 DEEPSEEK_OPT_ISA 可强制。 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "isa.h"

static const char *const NAMES[DSO_LEVELS] = {"scalar", "avx2", "avx512", "avx512_vnni",
                                              "avx512_bf16"};

/* 各级怎样填表，由低到高逐级覆盖；没有编译的是 NULL。填表的函数也是用那一级的指令编译的（编译器用宽的寄存器搬指针），
 * 所以 CPU 没有的一级不能调用。 */
static void (*const FILL[DSO_LEVELS])(dso_isa *) = {
    [DSO_SCALAR] = dso_isa_init_scalar,
#if defined(DSO_HAVE_AVX2)
    [DSO_AVX2] = dso_isa_init_avx2,
#endif
#if defined(DSO_HAVE_AVX512)
    [DSO_AVX512] = dso_isa_init_avx512,
#endif
#if defined(DSO_HAVE_AVX512VNNI)
    [DSO_AVX512_VNNI] = dso_isa_init_avx512vnni,
#endif
#if defined(DSO_HAVE_AVX512BF16)
    [DSO_AVX512_BF16] = dso_isa_init_avx512bf16,
#endif
};

static dso_isa table[DSO_LEVELS];
static int best = -1; /* 本机可用的最高级别；-1 为尚未初始化 */
static int current;

/* 编译了的最高级别：后一级编译了，前一级也编译了。 */
static int compiled_level(void) {
  int level = DSO_SCALAR;
  while (level + 1 < DSO_LEVELS && FILL[level + 1]) level++;
  return level;
}

static void fill_table(int most) {
  for (int level = 0; level <= most; level++) {
    if (level > 0) table[level] = table[level - 1];
    FILL[level](&table[level]);
  }
}

static int find(const char *name) {
  for (int level = 0; level <= best; level++)
    if (strcmp(name, NAMES[level]) == 0) return level;
  return -1;
}

/* 由绑定在载入时（单线程）第一次调用；此后表只读。 */
static void init_once(void) {
  if (best >= 0) return;
  int cpu = dso_cpu_level(), built = compiled_level();
  best = cpu < built ? cpu : built;
  fill_table(best);
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
  static const char *const LISTS[DSO_LEVELS] = {"scalar", "scalar,avx2", "scalar,avx2,avx512",
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
