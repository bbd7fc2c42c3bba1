// 启动核与查询设备。主机模拟（tests/cuda/host）有同名的一份，所以用 <launch.cuh> 引入。
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>

namespace dso {

// 动态共享内存超过 48 KiB 时先放开这个核的上限。
template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), size_t bytes) {
  if (bytes <= (48 << 10)) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// 排进 stream 后立即返回。
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, A... args) {
  cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
  return cudaGetLastError();
}

// 同上，x 一维上相邻的 cluster 块是一个 cluster（1：没有）；grid.x 是它的倍数。
template <class... P, class... A>
cudaError_t launch_cluster(void (*kernel)(P...), int cluster, dim3 grid, dim3 block,
                           size_t shared_bytes, cudaStream_t stream, A... args) {
  cudaError_t error = allow_shared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = &attribute, config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// 当前设备：SM 数、每块共享内存的上限（字节）、计算能力的主版本（DEEPSEEK_OPT_CUDA_MAJOR 可以当作较早的：测试与
// 比较 sm_80 的路径）。
struct Device {
  int sms, shared_limit, major;
};

inline cudaError_t device_of(Device *device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const cudaDeviceAttr wanted[] = {cudaDevAttrMultiProcessorCount,
                                   cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   cudaDevAttrComputeCapabilityMajor};
  int *found[] = {&device->sms, &device->shared_limit, &device->major};
  for (int i = 0; i < 3 && error == cudaSuccess; i++)
    error = cudaDeviceGetAttribute(found[i], wanted[i], index);
  const char *forced = std::getenv("DEEPSEEK_OPT_CUDA_MAJOR");
  if (forced && std::atoi(forced) < device->major) device->major = std::atoi(forced);
  return error;
}

}  // namespace dso
