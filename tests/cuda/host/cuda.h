// CUDA 驱动头文件的主机替身：只有 TMA 的张量描述，编码之后的内容由模拟自己定。
#pragma once

#include <cstdint>

struct alignas(64) CUtensorMap {
  char *base;
  int rank;
  int64_t dims[4], strides[4];  // 从最内一维起；步长以字节计
  int box[4];
  int swizzle;  // 交错的字节数：128；16 是不交错
};
