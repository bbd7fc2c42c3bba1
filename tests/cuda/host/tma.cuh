// cuda/tma.cuh 的主机替身：同样的限制，违反时编码失败。
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "dso.h"

namespace dso {

struct TensorBox {
  const void *base;
  dso_dtype dtype;
  int rank;
  int64_t dims[4], strides[4];
  int box[4];
  bool plain = false;
};

inline cudaError_t make_tensor_map(CUtensorMap *map, const TensorBox &t) {
  bool ok = reinterpret_cast<uintptr_t>(t.base) % 16 == 0 && t.box[0] * 2 <= 128 &&
            t.box[0] * 2 % 16 == 0 && t.strides[0] == 1 && t.rank >= 1 && t.rank <= 4;
  *map = {static_cast<char *>(const_cast<void *>(t.base)), t.rank, {}, {}, {}, t.plain ? 16 : 128};
  for (int i = 0; i < t.rank; i++) {
    int64_t stride = t.dims[i] == 1 && i > 0 ? 16 : t.strides[i] * 2;
    ok = ok && t.dims[i] > 0 && t.dims[i] <= int64_t{1} << 32 && t.box[i] > 0 && t.box[i] <= 256;
    ok = ok && (i == 0 || (stride > 0 && stride % 16 == 0 && stride < int64_t{1} << 40));
    map->dims[i] = t.dims[i], map->strides[i] = stride, map->box[i] = t.box[i];
  }
  return ok ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace dso
