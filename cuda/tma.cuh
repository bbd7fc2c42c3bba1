// TMA 的张量描述（在主机上编码，作为 const __grid_constant__ CUtensorMap 传给核）。主机模拟有同名的一份，
// 所以用 <tma.cuh> 引入。驱动的函数由运行库取得：不链接 libcuda，没有驱动的机器也能载入这个库。
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "dso.h"

namespace dso {

// 16 位元素的张量与一次拷贝的框；从最内一维起，strides 以元素计（最内一维必须是 1）。
struct TensorBox {
  const void *base;
  dso_dtype dtype;  // DSO_BF16 或 DSO_F16
  int rank;
  int64_t dims[4], strides[4];
  int box[4];
  bool plain = false;  // 不交错
};

// 128 字节交错：box[0] 至多 64 个元素。只有一个的一维不看它的步长。
inline cudaError_t make_tensor_map(CUtensorMap *map, const TensorBox &t) {
  void *entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                       cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  cuuint64_t dims[4], strides[4];
  cuuint32_t box[4], steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < t.rank; i++) {
    dims[i] = static_cast<cuuint64_t>(t.dims[i]), box[i] = static_cast<cuuint32_t>(t.box[i]);
    if (i > 0) strides[i - 1] = t.dims[i] == 1 ? 16 : static_cast<cuuint64_t>(t.strides[i]) * 2;
  }
  auto type =
      t.dtype == DSO_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  CUresult result = encode(map, type, static_cast<cuuint32_t>(t.rank), const_cast<void *>(t.base),
                           dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           t.plain ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace dso
