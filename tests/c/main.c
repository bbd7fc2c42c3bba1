/* 全部 C 测试。用法：run_tests [随机种子] */
#include <stdlib.h>

#include "harness.h"

int main(int argc, char **argv) {
  seed_random(argc > 1 ? strtoull(argv[1], NULL, 10) : 1);
  test_select();
  test_isa();
  test_dense();
  test_rows();
  test_mla();
  test_moe();
  test_moe_route();
  test_quant();
  test_mtp();
  return report();
}
