/* 选指令集（csrc/isa/select.c）：CPU 没有的一级，连填表的函数也不调用。
 *
 * 把 select.c 包含进来，改名，CPU 的级别与各级填表的函数换成替身：在哪种机器上都能测每一级。 */
#define _POSIX_C_SOURCE 200809L /* setenv */
#include <stdlib.h>
#include <string.h>

#include "harness.h"

#define dso_isa_current select_current
#define dso_isa_name select_name
#define dso_isa_available select_available
#define dso_isa_compiled select_compiled
#define dso_isa_set select_set
#define dso_cpu_level fake_level
#define dso_isa_init_scalar fake_scalar
#define dso_isa_init_avx2 fake_avx2
#define dso_isa_init_avx512 fake_avx512
#define dso_isa_init_avx512vnni fake_avx512vnni
#define dso_isa_init_avx512bf16 fake_avx512bf16
#undef DSO_HAVE_AVX2
#undef DSO_HAVE_AVX512
#undef DSO_HAVE_AVX512VNNI
#undef DSO_HAVE_AVX512BF16
#define DSO_HAVE_AVX2 1
#define DSO_HAVE_AVX512 1
#define DSO_HAVE_AVX512VNNI 1
#define DSO_HAVE_AVX512BF16 1

const dso_isa *select_current(void);
const char *select_name(const dso_isa *isa);
const char *select_available(void);
const char *select_compiled(void);
int select_set(const char *name);

static int cpu, calls[DSO_LEVELS];

static int fake_level(void) { return cpu; }

static void fill(dso_isa *isa, int level, const char *name) {
  calls[level]++;
  isa->name = name;
  isa->native_bf16 += 1 << level; /* 由低到高逐级覆盖：前面各级的都在 */
}
static void fake_scalar(dso_isa *isa) { fill(isa, DSO_SCALAR, "scalar"); }
static void fake_avx2(dso_isa *isa) { fill(isa, DSO_AVX2, "avx2"); }
static void fake_avx512(dso_isa *isa) { fill(isa, DSO_AVX512, "avx512"); }
static void fake_avx512vnni(dso_isa *isa) { fill(isa, DSO_AVX512_VNNI, "avx512_vnni"); }
static void fake_avx512bf16(dso_isa *isa) { fill(isa, DSO_AVX512_BF16, "avx512_bf16"); }

#include "isa/select.c"

/* 从头选一次。 */
static const dso_isa *choose(int level) {
  cpu = level, best = -1;
  memset(calls, 0, sizeof calls), memset(table, 0, sizeof table);
  return select_current();
}

void test_select(void) {
  const char *set = getenv("DEEPSEEK_OPT_ISA");
  char *kept = set ? strdup(set) : NULL;
  unsetenv("DEEPSEEK_OPT_ISA");
  for (int level = 0; level < DSO_LEVELS; level++) {
    const dso_isa *isa = choose(level);
    check(strcmp(select_name(isa), NAMES[level]) == 0, "select：%s 选了 %s", NAMES[level],
          select_name(isa));
    check(isa->native_bf16 == (2 << level) - 1, "select：%s 由前面各级逐级覆盖", NAMES[level]);
    for (int other = 0; other < DSO_LEVELS; other++)
      check(calls[other] == (other <= level), "select：CPU 是 %s 时，%s 的填表函数调用了 %d 次",
            NAMES[level], NAMES[other], calls[other]);
    check(select_set(NAMES[level]) == 0 && select_set("neon") == -1, "select：能选自己这一级");
    if (level + 1 < DSO_LEVELS)
      check(select_set(NAMES[level + 1]) == -1, "select：CPU 是 %s，不能选 %s", NAMES[level],
            NAMES[level + 1]);
    check(strcmp(select_compiled(), list_up_to(DSO_AVX512_BF16)) == 0, "select：编译了的各级");
    check(strcmp(select_available(), list_up_to(level)) == 0, "select：可用的各级");
  }
  setenv("DEEPSEEK_OPT_ISA", "avx2", 1);
  check(strcmp(choose(DSO_AVX512)->name, "avx2") == 0, "select：DEEPSEEK_OPT_ISA 选较低的一级");
  if (kept)
    setenv("DEEPSEEK_OPT_ISA", kept, 1);
  else
    unsetenv("DEEPSEEK_OPT_ISA");
  free(kept);
}
