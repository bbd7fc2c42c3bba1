// CUDA 算子登记到哪个后端、当前设备与流。主机模拟（tests/cuda/host）有同名的一份，所以用
// <binding_device.h> 引入。
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "binding.h"
#include "config.cuh"

#define DSO_DEVICE_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(deepseek_opt, CUDA, m)

namespace dso {

inline bool on_device(const Tensor &t) { return t.is_cuda(); }

// 一组头展开的 K、V 至多多少字节。
inline int64_t expand_limit() { return EXPAND_BYTES; }

// aten::mm 的 fp32 输出（两个输入是 16 位的）。
constexpr bool HAS_WIDE_MM = true;

// 内容可以在主机上直接读（设备上的要等 GPU，不读）。
inline bool on_host(const Tensor &t) { return t.is_cpu(); }

// 切换到 t 的设备并取它的当前流；析构时恢复原来的设备。
class Launch {
 public:
  explicit Launch(const Tensor &t) : guard_(t.get_device()) {
    void *stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace dso
