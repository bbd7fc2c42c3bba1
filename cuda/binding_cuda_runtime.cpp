// 这个库静态链接的 CUDA 运行库的版本（如 13000）：驱动老一个大版本，核就启动不了（deepseek_opt/_native.py）。
#include <cuda_runtime.h>

extern "C" __attribute__((visibility("default"))) int dso_cuda_runtime_version() {
  return CUDART_VERSION;
}
