// cuda/launch.cuh 的主机替身：在模拟器上运行核。
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <string>

namespace dso {

// DSO_HOST_FAIL=n：第 n 次起的启动都失败，什么也不运行（n:1 时只有那一次）；DSO_HOST_MAJOR 小于 8：没有这种卡的核。
inline cudaError_t refused() {
  static std::string last;
  static int left = 0;
  const char *major = std::getenv("DSO_HOST_MAJOR"), *fail = std::getenv("DSO_HOST_FAIL");
  if (major && std::atoi(major) < 8) return cudaErrorNoKernelImageForDevice;
  if (last != (fail ? fail : "")) last = fail ? fail : "", left = fail ? std::atoi(fail) : 0;
  const bool once = last.find(':') != std::string::npos;
  return fail && (once ? --left == 0 : --left <= 0) ? cudaErrorLaunchFailure : cudaSuccess;
}

template <class... P>
cudaError_t prefer_shared(void (*)(P...)) {
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t launch_cluster(void (*kernel)(P...), int cluster, dim3 grid, dim3 block,
                           size_t shared_bytes, cudaStream_t, A... args) {
  if (cudaError_t error = refused()) return error;
  return cuda_host::run_grid(grid, block, shared_bytes, cluster, [&] { kernel(args...); });
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, A... args) {
  return launch_cluster(kernel, 1, grid, block, shared_bytes, stream, args...);
}

// 模拟成一块 132 个 SM 的卡太慢；3 个足够让切分与合并都发生。DSO_HOST_SMS 可改个数，DSO_HOST_SHARED 可改共享内存的
// 上限。
struct Device {
  int sms, shared_limit, major;
};

inline cudaError_t device_of(Device *device) {
  const char *shared = std::getenv("DSO_HOST_SHARED"), *major = std::getenv("DSO_HOST_MAJOR");
  const char *sms = std::getenv("DSO_HOST_SMS");
  *device = {sms ? std::atoi(sms) : 3, shared ? std::atoi(shared) : 227 << 10,
             major ? std::atoi(major) : 8};
  return cudaSuccess;
}

}  // namespace dso
