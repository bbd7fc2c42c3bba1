// cuda/binding_device.h 的主机替身：CUDA 的绑定登记到 CPU 后端，盖住原来的 CPU 算子。
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>

#include <cstdlib>

#include "binding.h"
#include "config.cuh"

#define DSO_DEVICE_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m)

namespace dso {

inline bool on_device(const Tensor &t) { return t.is_cpu(); }

// DSO_HOST_EXPAND 可改：小的形状也分得成几组。
inline int64_t expand_limit() {
  const char *bytes = std::getenv("DSO_HOST_EXPAND");
  return bytes ? std::atoll(bytes) : EXPAND_BYTES;
}

// CPU 上没有。
constexpr bool HAS_WIDE_MM = false;

// DSO_HOST_RESIDENT=1：spans、offsets 当作在设备上，绑定不读它们的内容。
inline bool on_host(const Tensor &) { return !std::getenv("DSO_HOST_RESIDENT"); }

class Launch {
 public:
  explicit Launch(const Tensor &) {}
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace dso
