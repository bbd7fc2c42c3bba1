// 启动核与查询设备。主机模拟（tests/cuda/host）有同名的一份，所以用 <launch.cuh> 引入。
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>

namespace dso {

// 排进 stream 后立即返回；动态共享内存超过 48 KiB 时先放开这个核的上限。
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, A... args) {
  if (shared_bytes > (48 << 10)) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(args...);
  return cudaGetLastError();
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

// 同 launch，但 Hopper 上不等前一个核做完就可以启动（它的各块都调用过 start_next 或已退出）：两个核之间的空隙、起头的
// 几次读都盖住。核里每个线程退出之前、读写与前一个核有关的数之前都要 wait_previous。
template <class... P, class... A>
cudaError_t launch_after(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                         cudaStream_t stream, A... args) {
  Device device;
  int driver = 0;
  cudaError_t error = device_of(&device);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return error;
  constexpr int CAPTURES = 12030;  // 更早的驱动不能录进图
  if (device.major < 9 || driver < CAPTURES || shared_bytes > (48 << 10))
    return launch(kernel, grid, block, shared_bytes, stream, args...);
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes;
  config.stream = stream, config.attrs = &overlap, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, P(args)...);
}

}  // namespace dso
