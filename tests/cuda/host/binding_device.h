// cuda/binding_device.h 的主机替身：CUDA 的绑定登记到 CPU 后端，盖住原来的 CPU 算子。
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>

#include "binding.h"
#include "config.cuh"

#define DSO_DEVICE_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CPU, m)

namespace dso {

// DSO_HOST_AWAY=地址：数据在这里的张量当作留在 CPU 上，其余的在设备上。
inline bool on_device(const Tensor &t) {
  const char *away = std::getenv("DSO_HOST_AWAY");
  return t.is_cpu() && !(away && reinterpret_cast<uintptr_t>(t.const_data_ptr()) ==
                                     std::strtoull(away, nullptr, 10));
}

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
  explicit Launch(const Tensor &t) {
    if (!on_device(t)) throw std::runtime_error("DeviceGuard(-1)");
  }
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace dso
